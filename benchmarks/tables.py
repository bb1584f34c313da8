"""Markdown tables of published results: what the README holds between its markers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .load import company
from .plots.speed import best_torch, step_rows
from .report import Result, Row, number
from .store import MachineResults

MARKERS = re.compile(r"(<!-- benchmarks: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /benchmarks -->)", re.DOTALL)


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    head = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def _source(results: MachineResults, *benches: str) -> str:
    """Machine, versions, date and what disturbed, of the sections that rows of the benches (or the goals) are from."""
    sections = [s for s in results.sections.values() if (s.goals and "goals" in benches) or _has(s, benches)]
    when = max((s.when for s in sections), default="")[:10]
    noise = sorted({w for s in sections for w in s.warnings if w.startswith(("other processes", "the hypervisor"))})
    warning = f" Warnings: {'; '.join(noise)}." if noise else ""
    commits = dict.fromkeys(s.settings.get("commit") or results.machine.get("commit") or "?" for s in sections)
    where = ", ".join(filter(None, [results.title, results.condition, f"commit {' and '.join(commits)}", when]))
    return f"{where}.{warning}\n"


def _has(section: Result, benches: tuple[str, ...]) -> bool:
    return any(row.get("bench") in benches for row in section.rows)


def speed(results: MachineResults) -> str:
    """Optimizer by profile: our milliseconds, and the best torch form's time over ours."""
    rows = [r for r in step_rows(results) if r["status"] == "ok" and r["precision"] == "fp32"]
    cells = {(ours["optimizer"], ours["profile"]): (ours, ratio) for ours, _, ratio in best_torch(rows)}
    if not cells:
        return ""
    profiles = list(dict.fromkeys(profile for _, profile in cells))
    lines = []
    for optimizer in dict.fromkeys(o for o, _ in cells):
        line = [optimizer]
        for profile in profiles:
            cell = cells.get((optimizer, profile))
            line.append(f"{_ratio(cell[1])} ({number(cell[0]['median_ms'])} ms)" if cell else "")
        lines.append(line)
    copy = max((s.bandwidth.get("copy") or 0 for s in results.sections.values()), default=0)
    text = "One float32 step: torch's best form (fused, foreach or for-loop) over ours, and our time."
    bandwidth = f" Measured copy: {copy:,.1f} GB/s."
    return f"{text}{bandwidth} {_source(results, 'step', 'compare')}\n" + markdown(["", *profiles], lines)


def pipeline(results: MachineResults) -> str:
    cells = best_torch([r for r in results.rows("pipeline") if r["status"] == "ok"])
    if not cells:
        return ""
    lines = [
        [f"{ours['optimizer']}, {ours['profile']}", _ratio(ratio), f"{number(ours['median_ms'])} ms"]
        for ours, _, ratio in cells
    ]
    text = "Unscale + inf check + clip + step: torch's GradScaler, clip_grad_norm_ and best step over ours."
    return f"{text} {_source(results, 'pipeline')}\n" + markdown(["", "speed-up", "ours"], lines)


def compare(results: MachineResults) -> str:
    """System by optimizer: lowest and highest ratio over the profiles; then, in words, where ours is not first."""
    from .commands.compare import verdict

    rows = [r for r in results.rows("compare") if r["system"] != "fused" and r["precision"] == "fp32"]
    timed = [r for r in rows if r["status"] == "ok" and r.get("ratio")]
    if not timed:
        return ""
    optimizers = list(dict.fromkeys(r["optimizer"] for r in timed))
    lines = []
    for system in dict.fromkeys(r["system"] for r in rows):
        mine = [r for r in timed if r["system"] == system]
        if not mine:
            if all(r["status"] == "not installed" for r in rows if r["system"] == system):
                lines.append([f"{system} (not installed)", *[""] * len(optimizers)])
            continue
        version = (mine[0].get("version") or "").partition("+")[0]
        line = [f"{system} {version}"]
        for optimizer in optimizers:
            ratios = [float(r["ratio"]) for r in mine if r["optimizer"] == optimizer]
            line.append(f"{_ratio(min(ratios))} - {_ratio(max(ratios))}" if ratios else "")
        lines.append(line)
    first, *slower = verdict([Row(**r) for r in results.rows("compare") if r["precision"] == "fp32"])
    text = "Float32 steps: the competitor's time over ours, lowest and highest over the profiles."
    table = markdown(["", *optimizers], lines)
    return f"{text} {_source(results, 'compare')}\n{table}\n" + "\n".join([_sentence(first), *_bullets(slower)]) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(":") else ".")


def _bullets(lines: Iterable[str]) -> list[str]:
    items = [f"- {line.strip()}" for line in lines]
    return ["", *items] if items else []


def memory(results: MachineResults) -> str:
    rows = [r for r in results.rows("memory") if r["status"] == "ok" and r["system"] == "fused"]
    if not rows:
        return ""
    optimizers = list(dict.fromkeys(r["optimizer"] for r in rows))
    held = {(r["precision"], r["optimizer"]): r["held_bytes"] for r in rows}
    lines = []
    for precision in dict.fromkeys(r["precision"] for r in rows):
        values = [held.get((precision, o)) for o in optimizers]
        lines.append([precision, *("" if v is None else f"{v:.2f}" for v in values)])
    return "Bytes per parameter and its state, counted from the tensors.\n\n" + markdown(["", *optimizers], lines)


def host(results: MachineResults) -> str:
    rows = [r for r in results.rows("host") if r["status"] == "ok"]
    if not rows:
        return ""
    systems = list(dict.fromkeys(r["system"] for r in rows))
    lines = []
    for tensors in sorted({r["tensors"] for r in rows}):
        by_system = {r["system"]: r for r in rows if r["tensors"] == tensors}
        line = [f"{tensors:,}"]
        line += [f"{1e3 * by_system[s]['host_ms']:,.0f}" if s in by_system else "" for s in systems]
        lines.append(line)
    text = "Python and launch, microseconds per AdamW step, by number of tensors (one element each)."
    return f"{text} {_source(results, 'host')}\n" + markdown(["tensors", *systems], lines)


def goals(results: MachineResults) -> str:
    records = [g for s in results.sections.values() for g in s.goals]
    if not records:
        return ""
    beside = max(g.get("beside", 0) for g in records)
    lines = []
    for goal in records:
        sign = "at most" if goal["at_most"] else "at least"
        line = [goal["goal"], f"{sign} {goal['bound']:g} {goal['unit']}", *_measured(goal, ""), goal["verdict"]]
        lines.append([*line, *_measured(goal, "beside_"), goal.get("beside_verdict", "")] if beside else line)
    columns = ["goal", "bound", "measured", ""]
    text = ""
    if beside:
        columns = ["goal", "bound", "alone", "", company(beside), ""]
        text = "Each goal alone, which decides, and with the cores shared, as they are with a data loader's workers. "
    return f"{text}{_source(results, 'goals')}\n" + markdown(columns, lines)


def _measured(goal: dict[str, Any], prefix: str) -> list[str]:
    value = goal.get(f"{prefix}value")
    return ["" if value is None else f"{number(value)} {goal['unit']}"]


def quality(results: MachineResults) -> str:
    from .commands.converge import summary

    records = results.rows("converge")
    if not records:
        return ""
    rows = summary(records)
    seeds = len({r["seed"] for r in records})
    lines = [[r["format"], f"{r['loss']:.4f}", f"{r['difference']:+.4f}", f"{r['worst']:.4f}"] for r in rows]
    text = (
        f"A small GPT on real text, {records[0]['steps']} steps, {seeds} seeds: validation loss in nats per byte, mean "
        f"difference from torch's float32 AdamW with the same seed and batches, and the largest. "
        f"Float32 itself spreads over {rows[0]['spread']:.4f} from seed to seed."
    )
    return f"{text}\n\n" + markdown(["storage", "loss", "difference", "largest"], lines)


def decay(results: MachineResults) -> str:
    from .decay import COLUMNS, DECAY, STEPS, cells_of

    records = results.rows("decay")
    if not records:
        return ""
    text = (
        f"Nothing but weight decay, lr x weight decay = {DECAY:g}, {STEPS} steps of AdamW: how much of float32's "
        "decay the weights have seen, how far their mean is off, and the worst of 4096 weights."
    )
    return f"{text}\n\n" + markdown(list(COLUMNS), [cells_of(r) for r in records])


TABLES: dict[str, Callable[[MachineResults], str]] = {
    "speed": speed,
    "pipeline": pipeline,
    "compare": compare,
    "memory": memory,
    "host": host,
    "goals": goals,
    "quality": quality,
    "decay": decay,
}


def plots(machines: list[MachineResults], name: str, folder: Path, base: Path) -> str:
    """The picture of each machine that has one, as a link relative to `base`."""
    lines = [
        f"![{name}, {results.title}]({Path(os.path.relpath(path, base)).as_posix()})"
        for results in machines
        if (path := folder / results.slug / f"{name}.png").exists()
    ]
    return "\n\n".join(lines) + "\n" if lines else ""


def fill(text: str, machines: list[MachineResults], folder: Path, base: Path) -> str:
    """The text, for a file in `base`, with everything between benchmark markers generated anew.

    Names: a table (speed, ...), for every machine; cpu-speed or gpu-speed for one kind of machine; plot-NAME a picture
    from `folder`.
    """

    def body(name: str) -> str:
        kind, _, rest = name.partition("-")
        chosen = machines
        if kind in ("cpu", "gpu"):
            chosen = [m for m in machines if (m.machine["device"] != "cpu") == (kind == "gpu")]
            name = rest
        if name.startswith("plot-"):
            return plots(chosen, name.removeprefix("plot-"), folder, base)
        if name not in TABLES:
            raise ValueError(f"no benchmark table {name!r}: one of {', '.join(TABLES)}, plot-...")
        return "\n".join(filter(None, (TABLES[name](m) for m in chosen)))

    return MARKERS.sub(lambda m: m[1] + body(m["name"]) + m[4], text)
