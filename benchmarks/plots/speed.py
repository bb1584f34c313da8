"""Speed-ups: over torch, over every competitor, of the whole pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..store import MachineResults
from .style import ACCENT, INK, MUTED, Rows, file_name, finish, ok_rows, plain_log, pyplot, times


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
    """Steps beside torch's forms: of `step`, and where that was not run of `compare`, which times them too."""
    steps = results.rows("step")
    seen = {_cell(r)[1:] for r in steps}
    return [*steps, *(r for r in results.rows("compare") if _cell(r)[1:] not in seen)]


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
        paths.append(_speedup_figure(results, cells, profiles, optimizers, precision, out))
    return paths


def _speedup_figure(
    results: MachineResults,
    cells: Sequence[tuple[dict[str, Any], str, float]],
    profiles: list[str],
    optimizers: list[str],
    precision: str,
    out: Path,
) -> Path:
    plt = pyplot()
    columns = min(4, len(profiles))
    lines = -(-len(profiles) // columns)
    size = (max(6.5, 2.6 * columns), 1.3 + lines * (0.75 + 0.26 * len(optimizers)))
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, squeeze=False)
    ratios = [ratio for _, _, ratio in cells]
    limits = min(0.5, *ratios) * 0.9, max(3, 2.2 * max(ratios))
    for axis in axes.flat[len(profiles) :]:
        axis.set_visible(False)
    for i, (axis, profile) in enumerate(zip(axes.flat, profiles, strict=False)):
        mine = {ours["optimizer"]: (form, ratio) for ours, form, ratio in cells if ours["profile"] == profile}
        tensors = next(ours for ours, _, _ in cells if ours["profile"] == profile)
        axis.set_title(profile)
        axis.text(1, 1.02, _shape_note(tensors), transform=axis.transAxes, ha="right", fontsize=7.5, color=MUTED)
        for y, optimizer in enumerate(optimizers):
            if optimizer not in mine:
                axis.text(1.06, y, "-", va="center", fontsize=8, color=MUTED)
                continue
            _, ratio = mine[optimizer]
            axis.barh(y, ratio - 1, left=1, height=0.68, color=ACCENT if ratio >= 1 else "#c2571a")
            where = max(ratio, 1) * 1.06
            axis.text(where, y, times(ratio), va="center", fontsize=8.5, color=INK)
        axis.set_xscale("log")
        axis.set_xlim(*limits)
        plain_log(axis.xaxis)
        axis.tick_params(axis="x", labelbottom=i + columns >= len(profiles))  # the lowest of each column
        axis.axvline(1, color=INK, linewidth=1)
        axis.grid(axis="x")
        axis.set_yticks(range(len(optimizers)), optimizers)
        axis.set_ylim(len(optimizers) - 0.4, -0.6)
        if axis in axes[:, 1:]:
            axis.set_yticklabels([])
            axis.tick_params(axis="y", length=0)
    note = f"{precision} · time of torch's best form (fused, foreach or for-loop) / ours; right of 1: ours is faster"
    return finish(figure, results, "Speed-up of one optimizer step", out / f"speedup-{file_name(precision)}.png", note)


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
        note = f"{precision} · one mark per optimizer and profile"
        path = out / f"compare-{file_name(precision)}.png"
        paths.append(finish(figure, results, "Against every competitor importable here", path, note, top=0.22))
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
    figure, axis = plt.subplots(figsize=(7.4, 1.6 + 0.34 * len(cells)))
    names = [f"{ours['optimizer']}  {ours['profile']}" for ours, _, _ in cells]
    axis.barh(range(len(cells)), [ratio - 1 for *_, ratio in cells], left=1, height=0.66, color=ACCENT)
    for y, (ours, _, ratio) in enumerate(cells):
        axis.text(max(ratio, 1) * 1.04, y, f"{times(ratio)}   {ours['median_ms']:.3g} ms", va="center", fontsize=8.5)
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, *(r for *_, r in cells)) * 0.95, max(r for *_, r in cells) * 2)
    plain_log(axis.xaxis)
    axis.axvline(1, color=INK, linewidth=1)
    axis.grid(axis="x")
    axis.set_yticks(range(len(cells)), names)
    axis.set_ylim(len(cells) - 0.4, -0.6)
    note = "torch's GradScaler.unscale_ + clip_grad_norm_ + its best step, over ours (and our time)"
    return [finish(figure, results, "Unscale + inf check + clip + step", out / "pipeline.png", note)]
