"""Markdown tables of published results: what the README holds between its markers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .plots.speed import best_torch
from .report import number
from .store import MachineResults

MARKERS = re.compile(r"(<!-- benchmarks: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /benchmarks -->)", re.DOTALL)


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    head = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def _source(results: MachineResults, *commands: str) -> str:
    sections = [s for s in results.sections.values() if s.command in commands]
    when = max((s.when for s in sections), default="")[:10]
    noise = sorted({w for s in sections for w in s.warnings if w.startswith(("other processes", "the hypervisor"))})
    warning = f" Warnings: {'; '.join(noise)}." if noise else ""
    return f"{results.title}, commit {results.machine.get('commit') or '?'}, {when}.{warning}\n"


def speed(results: MachineResults) -> str:
    """Optimizer by profile: our milliseconds, and the best torch form's time over ours."""
    rows = [r for r in results.rows("step") if r["status"] == "ok" and r["precision"] == "fp32"]
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
    return f"{text}{bandwidth} {_source(results, 'step')}\n" + markdown(["", *profiles], lines)


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
    """System by optimizer: median and worst ratio over the profiles."""
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
    slower = [r for r in timed if r["ratio"] < 0.97]
    first = f"Ours is first in {len(timed) - len(slower)} of {len(timed)} cells."
    where = "; ".join(f"{r['label']} {r['optimizer']} {r['profile']} {_ratio(r['ratio'])}" for r in slower)
    losing = f" Not first: {where}." if where else ""
    text = "Float32 steps: the competitor's time over ours, lowest and highest over the profiles."
    return f"{text} {first}{losing} {_source(results, 'compare')}\n" + markdown(["", *optimizers], lines)


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
    lines = []
    for goal in records:
        value: Any = goal.get("value")
        sign = "at most" if goal["at_most"] else "at least"
        measured = "" if value is None else f"{number(value)} {goal['unit']}"
        lines.append([goal["goal"], f"{sign} {goal['bound']:g} {goal['unit']}", measured, goal["verdict"]])
    if not lines:
        return ""
    return f"{_source(results, 'targets')}\n" + markdown(["goal", "bound", "measured", ""], lines)


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


TABLES: dict[str, Callable[[MachineResults], str]] = {
    "speed": speed,
    "pipeline": pipeline,
    "compare": compare,
    "memory": memory,
    "host": host,
    "goals": goals,
    "quality": quality,
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
