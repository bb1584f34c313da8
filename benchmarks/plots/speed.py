"""Speed-ups: over torch, over every competitor, of the whole pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import number
from ..store import MachineResults
from .style import INK, LIGHT, MUTED, Rows, file_name, finish, ok_rows, plain_log, pyplot, ratio_bars, times

READ_RATIOS = "right of 1: ours is faster; hatched: torch is"


def best_torch(rows: Rows) -> list[tuple[dict[str, Any], str, float]]:
    """(our row, the best torch form, its time / ours) for each cell where both were timed."""
    out = []
    for ours in rows:
        if ours["system"] != "fused":
            continue
        cell = [r for r in rows if _cell(r) == _cell(ours) and r["system"].startswith("torch.") and r.get("ratio")]
        if cell:
            best = min(cell, key=lambda r: float(r["ratio"]))
            out.append((ours, best["label"], float(best["ratio"])))
    return out


def step_rows(results: MachineResults) -> Rows:
    """Steps beside torch's forms: of `step`, and before them those of `compare`, which times the forms too."""
    steps = results.rows("step")
    seen = {_cell(r)[1:] for r in steps}
    return [*(r for r in results.rows("compare") if _cell(r)[1:] not in seen), *steps]


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["bench"], row["optimizer"], row["precision"], row["profile"], row.get("groups")


def speedup(results: MachineResults, out: Path) -> list[Path]:
    """Bars per optimizer, one panel per profile: time of the best torch form over ours."""
    paths = []
    rows = ok_rows(step_rows(results))
    for precision in dict.fromkeys(r["precision"] for r in rows):
        cells = best_torch([r for r in rows if r["precision"] == precision])
        profiles = list(dict.fromkeys(ours["profile"] for ours, _, _ in cells))
        optimizers = list(dict.fromkeys(ours["optimizer"] for ours, _, _ in cells))
        if not cells:
            continue
        note = f"{precision} · time of torch's best form (fused, foreach or for-loop) / ours; {READ_RATIOS}"
        panels = [(p, _shape_note(next(ours for ours, _, _ in cells if ours["profile"] == p))) for p in profiles]
        ratios = {(ours["profile"], ours["optimizer"]): ratio for ours, _, ratio in cells}
        figure = bar_panels(panels, optimizers, ratios)
        path = out / f"speedup-{file_name(precision)}.png"
        paths.append(finish(figure, results, ("step", "compare"), "Speed-up of one optimizer step", path, note))
    return paths


def gradients(results: MachineResults, out: Path) -> list[Path]:
    """Norm and clipping functions: bars per shape, one panel per function."""
    from ..gradients import FUNCTIONS

    cells = best_torch(ok_rows(results.rows(*FUNCTIONS)))
    if not cells:
        return []
    panels = [(name, "") for name in FUNCTIONS if any(ours["bench"] == name for ours, _, _ in cells)]
    shapes = list(dict.fromkeys(ours["profile"] for ours, _, _ in cells))
    ratios = {(ours["bench"], ours["profile"]): ratio for ours, _, ratio in cells}
    times_of = {(ours["bench"], ours["profile"]): f"{number(ours['median_ms'])} ms" for ours, _, _ in cells}
    note = f"time of torch.nn.utils' function / ours, and ours; {READ_RATIOS}"
    figure = bar_panels(panels, shapes, ratios, times_of, room=6.0)
    return [finish(figure, results, tuple(FUNCTIONS), "Norms and clipping alone, float32", out / "clip.png", note)]


def bar_panels(
    panels: Sequence[tuple[str, str]],
    names: Sequence[str],
    ratios: dict[tuple[str, str], float],
    more: dict[tuple[str, str], str] | None = None,
    room: float = 2.2,
) -> Any:
    """A panel (title, note) with a bar per name for each; `more` is written behind the ratio, which takes `room`."""
    plt = pyplot()
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (max(6.5, 2.6 * columns), 1.3 + lines * (0.75 + 0.26 * len(names)))
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, squeeze=False)
    limits = min(0.5, *ratios.values()) * 0.9, max(3, room * max(ratios.values()))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for i, (axis, (panel, note)) in enumerate(zip(axes.flat, panels, strict=False)):
        axis.set_title(panel)
        axis.text(1, 1.02, note, transform=axis.transAxes, ha="right", fontsize=7.5, color=MUTED)
        mine = [ratios.get((panel, name)) for name in names]
        behind = [(more or {}).get((panel, name), "") for name in names]
        labels = [f"{times(r or 0)}  {text}".rstrip() for r, text in zip(mine, behind, strict=True)]
        ratio_bars(axis, mine, labels)
        axis.set_xlim(*limits)
        plain_log(axis.xaxis)
        axis.tick_params(axis="x", labelbottom=i + columns >= len(panels))  # the lowest of each column
        axis.set_yticks(range(len(names)), names)
        if axis in axes[:, 1:]:
            axis.set_yticklabels([])
            axis.tick_params(axis="y", length=0)
    return figure


def _shape_note(row: dict[str, Any]) -> str:
    elements = row["elements"]
    size = (
        f"{elements / 1e6:,.0f} M"
        if elements >= 1e7
        else f"{elements / 1e6:.1f} M"
        if elements >= 1e5
        else f"{elements:,}"
    )
    return f"{row['tensors']:,} tensor{'s' if row['tensors'] != 1 else ''}, {size}"


def rivals(results: MachineResults, out: Path) -> list[Path]:
    """One line per competitor, one mark per optimizer and profile."""
    plt = pyplot()
    paths = []
    markers = "os^Dv<>P*X"
    rows = [r for r in ok_rows(results.rows("compare")) if r["system"] != "fused" and r.get("ratio")]
    for precision in dict.fromkeys(r["precision"] for r in rows):
        mine = [r for r in rows if r["precision"] == precision]
        systems = list(dict.fromkeys(r["system"] for r in mine))
        optimizers = list(dict.fromkeys(r["optimizer"] for r in mine))
        figure, axis = plt.subplots(figsize=(8.6, 1.9 + 0.42 * len(systems)))
        shades = plt.get_cmap("cividis")([i / max(1, len(optimizers) - 1) * 0.9 for i in range(len(optimizers))])
        for i, optimizer in enumerate(optimizers):
            dots = [(float(r["ratio"]), systems.index(r["system"])) for r in mine if r["optimizer"] == optimizer]
            offset = (i - (len(optimizers) - 1) / 2) * 0.09
            axis.scatter(
                [x for x, _ in dots], [y + offset for _, y in dots], s=34, marker=markers[i % len(markers)],
                color=shades[i], edgecolor="white", linewidth=0.5, label=optimizer, zorder=3,
            )  # fmt: skip
        for y, system in enumerate(systems):
            if y % 2:
                axis.axhspan(y - 0.5, y + 0.5, color=LIGHT, alpha=0.35, linewidth=0, zorder=0)
            middle = statistics.median(float(r["ratio"]) for r in mine if r["system"] == system)
            axis.text(1.01, y, times(middle), transform=axis.get_yaxis_transform(), va="center", fontsize=9)
        axis.text(1.01, -0.8, "median", transform=axis.get_yaxis_transform(), fontsize=8, color=MUTED, va="center")
        axis.set_xscale("log")
        plain_log(axis.xaxis)
        axis.axvline(1, color=INK, linewidth=1)
        axis.grid(axis="x")
        axis.set_yticks(range(len(systems)), [f"{s} {_version(mine, s)}" for s in systems])
        axis.set_ylim(len(systems) - 0.4, -0.6)
        axis.set_xlabel("their time / ours (right of 1: ours is faster)")
        figure.legend(loc="upper right", ncols=len(optimizers), fontsize=8.5, handletextpad=0.1, columnspacing=0.8,
                      bbox_to_anchor=(0.995, 1 - 0.5 / figure.get_size_inches()[1]))  # fmt: skip
        first = sum(float(r["ratio"]) >= 0.97 for r in mine)
        note = f"{precision} · a mark per optimizer and profile; ours is first, within 3 %, in {first} of {len(mine)}"
        path = out / f"compare-{file_name(precision)}.png"
        title = "Against every competitor importable here"
        paths.append(finish(figure, results, ("compare",), title, path, note, top=0.22))
    return paths


def _version(rows: Rows, system: str) -> str:
    return str(next((r.get("version", "") for r in rows if r["system"] == system), "")).partition("+")[0]


def pipeline(results: MachineResults, out: Path) -> list[Path]:
    """unscale + clip + step: bars of time, ours and torch's."""
    rows = ok_rows(results.rows("pipeline"))
    cells = best_torch(rows)
    if not cells:
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.6, 1.7 + 0.34 * len(cells)))
    labels = []
    for ours, label, ratio in cells:
        torchs = next(r for r in rows if _cell(r) == _cell(ours) and r["label"] == label)
        both = (f"{number(r['median_ms'])} ms, {number(r['model_bytes'])} B" for r in (ours, torchs))
        labels.append(f"{times(ratio)}   {' against '.join(both)}")
    ratio_bars(axis, [ratio for *_, ratio in cells], labels, height=0.66)
    axis.set_xlim(min(0.8, *(r for *_, r in cells)) * 0.95, max(4, 12 * max(r for *_, r in cells)))
    plain_log(axis.xaxis)
    axis.set_yticks(range(len(cells)), [f"{ours['optimizer']}  {ours['profile']}" for ours, _, _ in cells])
    axis.set_xlabel("torch's time / ours")
    note = (
        "torch's GradScaler.unscale_ + clip_grad_norm_ + its best step, over ours; times and bytes that must move per "
        "element"
    )
    return [finish(figure, results, ("pipeline",), "Unscale + inf check + clip + step", out / "pipeline.png", note)]
