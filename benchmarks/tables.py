"""Markdown tables of published results: what the README holds between its markers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .load import company
from .plots.speed import best_torch, step_rows
from .report import Row, number
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
    sections = results.sections_of(*benches)
    noise = sorted({w for s in sections for w in s.warnings if w.startswith(("other processes", "the hypervisor"))})
    warning = f" Warnings: {'; '.join(noise)}." if noise else ""
    where = ", ".join(filter(None, [results.title, results.condition(*benches), results.origin(*benches)]))
    return f"{where}.{warning}\n"


def speed(results: MachineResults) -> str:
    """Optimizer by profile: our milliseconds, and the best torch form's time over ours."""
    rows = [r for r in step_rows(results) if r["status"] == "ok" and r["precision"] == "fp32"]
    cells = {(ours["optimizer"], ours["profile"]): (ours, label, ratio) for ours, label, ratio in best_torch(rows)}
    if not cells:
        return ""
    profiles = list(dict.fromkeys(profile for _, profile in cells))
    lines = []
    for optimizer in dict.fromkeys(o for o, _ in cells):
        line = [optimizer]
        for profile in profiles:
            cell = cells.get((optimizer, profile))
            line.append(f"{_ratio(cell[2])} ({number(cell[0]['median_ms'])} ms)" if cell else "")
        lines.append(line)
    copy = max((s.bandwidth.get("copy") or 0 for s in results.sections.values()), default=0)
    text = "One float32 step: torch's best form (fused, foreach or for-loop) over ours, and our time."
    bandwidth = f" Measured copy: {copy:,.1f} GB/s."
    table = markdown(["", *profiles], lines)
    first = not_first([(f"{o} {p}", *cells[o, p][1:]) for o, p in cells])
    return f"{text}{bandwidth} {_source(results, 'step', 'compare')}\n{table}\n{first}"


def not_first(cells: Iterable[tuple[str, str, float]], margin: float = 0.97) -> str:
    """Of (where, who, their time over ours): in how many ours is first, and the list of the others, the worst first."""
    cells = sorted(cells, key=lambda cell: cell[2])
    slower = [cell for cell in cells if cell[2] < margin]
    if not slower:
        return f"Ours is first, within 3 %, in each of {len(cells)} cells.\n"
    first = f"Ours is first, within 3 %, in {len(cells) - len(slower)} of {len(cells)} cells; not first:"
    return "\n".join([first, *_bullets(f"{w}: {who} takes {1 - r:.0%} less time" for w, who, r in slower)]) + "\n"


def pipeline(results: MachineResults) -> str:
    rows = [r for r in results.rows("pipeline") if r["status"] == "ok"]
    cells = best_torch(rows)
    if not cells:
        return ""
    lines = []
    for ours, label, ratio in cells:
        mine = [r for r in rows if (r["optimizer"], r["profile"]) == (ours["optimizer"], ours["profile"])]
        both = (ours, next(r for r in mine if r["label"] == label))
        costs = [f"{number(r['median_ms'])} ms, {r['model_bytes']:.0f} B" for r in both]
        lines.append([f"{ours['optimizer']}, {ours['profile']}", _ratio(ratio), *costs, label])
    text = (
        "Unscale + inf check + clip + step: torch's GradScaler.unscale_, clip_grad_norm_ and best step over ours, with "
        "the bytes that each must move per element."
    )
    table = markdown(["", "speed-up", "ours", "torch's", "its step"], lines)
    first = not_first((f"{o['optimizer']} {o['profile']}", label, ratio) for o, label, ratio in cells)
    return f"{text} {_source(results, 'pipeline')}\n{table}\n{first}"


def clip(results: MachineResults) -> str:
    """Norm and clipping functions alone, by shape."""
    from .gradients import FUNCTIONS

    rows = [r for r in results.rows(*FUNCTIONS) if r["status"] == "ok" and r["precision"] == "fp32"]
    cells = {(ours["bench"], ours["profile"]): (ours, ratio) for ours, _, ratio in best_torch(rows)}
    if not cells:
        return ""
    names = [name for name in FUNCTIONS if any(bench == name for bench, _ in cells)]
    lines = []
    for shape in dict.fromkeys(profile for _, profile in cells):
        found = [cells.get((name, shape)) for name in names]
        lines.append([shape, *(f"{_ratio(c[1])} ({number(c[0]['median_ms'])} ms)" if c else "" for c in found)])
    text = "Functions on gradients alone, float32: the time of torch.nn.utils' over ours, and our time."
    table = markdown(["", *names], lines)
    first = not_first((f"{name} {shape}", "torch", ratio) for (name, shape), (_, ratio) in cells.items())
    return f"{text} {_source(results, *FUNCTIONS)}\n{table}\n{first}"


def compare(results: MachineResults) -> str:
    """For each storage: system by optimizer, lowest and highest ratio over the profiles; then, in words, where ours is
    not first."""
    rows = results.rows("compare")
    parts = [_compared(rows, precision) for precision in dict.fromkeys(r["precision"] for r in rows)]
    if not any(parts):
        return ""
    profiles = ", ".join(dict.fromkeys(r["profile"] for r in rows if r["precision"] == "fp32"))
    text = (
        f"Steps: the competitor's time over ours, lowest and highest over the profiles ({profiles} for float32). A "
        "system is asked for the nearest it has: one without masters or 8-bit states does less."
    )
    return f"{text} {_source(results, 'compare')}\n" + "\n".join(filter(None, parts))


def _compared(everything: list[dict[str, Any]], precision: str) -> str:
    from .commands.compare import verdict

    mine = [r for r in everything if r["precision"] == precision]
    rows = [r for r in mine if r["system"] != "fused"]
    timed = [r for r in rows if r["status"] == "ok" and r.get("ratio")]
    optimizers = list(dict.fromkeys(r["optimizer"] for r in timed))
    lines = []
    for system in dict.fromkeys(r["system"] for r in rows):
        its = [r for r in timed if r["system"] == system]
        if not its:
            if all(r["status"] == "not installed" for r in rows if r["system"] == system):
                lines.append([f"{system} (not installed)", *[""] * len(optimizers)])
            continue
        version = (its[0].get("version") or "").partition("+")[0]
        line = [f"{system} {version}"]
        for optimizer in optimizers:
            ratios = [float(r["ratio"]) for r in its if r["optimizer"] == optimizer]
            line.append(_range(ratios))
        lines.append(line)
    if not timed:
        return ""
    first, *slower = verdict([Row(**r) for r in mine])
    table = markdown([precision, *optimizers], lines)
    return f"{table}\n" + "\n".join([_sentence(first), *_bullets(slower)]) + "\n"


def _range(ratios: list[float]) -> str:
    if not ratios:
        return ""
    low, high = _ratio(min(ratios)), _ratio(max(ratios))
    return low if low == high else f"{low} - {high}"


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
        of = f" (commit {goal['commit']}, {goal['when'][:10]})" if goal.get("when") else ""
        line = [goal["goal"], f"{sign} {goal['bound']:g} {goal['unit']}", *_measured(goal, ""), goal["verdict"] + of]
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
    "clip": clip,
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
