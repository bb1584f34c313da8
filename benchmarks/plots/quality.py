"""Convergence in low precision, and the goals."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any

from ..load import company
from ..store import MachineResults
from .style import ACCENT, INK, LIGHT, MUTED, WORSE, finish, pyplot


def convergence(results: MachineResults, out: Path) -> list[Path]:
    """Loss curves, and the final validation loss of each format against float32, seed by seed."""
    from ..commands.converge import summary

    records = results.rows("converge")
    if not records:
        return []
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), gridspec_kw={"width_ratios": [1.15, 1]})
    formats = list(dict.fromkeys(r["format"] for r in records))
    styles = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
    shades = plt.get_cmap("viridis")([i / max(1, len(formats) - 1) * 0.85 for i in range(len(formats))])
    for i, name in enumerate(formats):
        curves = [r["losses"] for r in records if r["format"] == name]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        width = records[0]["steps"] / len(mean)
        steps = [(k + 0.5) * width for k in range(len(mean))]
        left.plot(steps, mean, color=shades[i], linestyle=styles[i % len(styles)], linewidth=1.5, label=name)
    left.set_title("training loss, mean of the seeds")
    left.set_xlabel("step (the first twelfth lies above)")
    left.set_ylabel("nats per byte")
    left.grid()
    left.legend()
    left.set_ylim(*_last_stretch([line.get_ydata() for line in left.get_lines()]))
    rows = summary(records)
    reference = {r["seed"]: r["validation_loss"] for r in records if r["format"] == "torch float32"}
    spread = rows[0]["spread"]
    right.axvspan(-spread, spread, color=LIGHT, zorder=0)
    right.axvline(0, color=INK, linewidth=1)
    for y, name in enumerate(formats):
        for record in (r for r in records if r["format"] == name):
            difference = record["validation_loss"] - reference.get(record["seed"], record["validation_loss"])
            right.scatter(difference, y, s=32, color=shades[y], edgecolor="white", zorder=3)
        right.text(1.01, y, f"{rows[y]['loss']:.4f}", transform=right.get_yaxis_transform(), va="center", fontsize=8.5)
    right.text(1.01, -0.5, "mean loss", transform=right.get_yaxis_transform(), va="center", fontsize=8, color=MUTED)
    right.set_yticks(range(len(formats)), formats)
    right.set_ylim(len(formats) - 0.4, -0.6)
    right.set_title("validation loss minus float32's, each seed")
    right.set_xlabel("nats per byte; grey band: spread of float32 over the seeds")
    right.grid(axis="x")
    first = records[0]
    note = f"small GPT on real text, AdamW, {first['steps']} steps, {len(reference)} seeds; validated in float32"
    return [finish(figure, results, ("converge",), "Low-precision storage against float32", out / "converge.png", note)]


def _last_stretch(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits that leave out the first twelfth of the curves: its fall would hide everything else."""
    later = [value for curve in curves for value in list(curve)[len(curve) // 12 :]]
    margin = 0.05 * (max(later) - min(later)) or 0.1
    return min(later) - margin, max(later) + margin


def goals(results: MachineResults, out: Path) -> list[Path]:
    """Each goal: measured over promised; hollow where it was measured with busy processes beside it."""
    records = [g for s in results.sections.values() for g in s.goals if g.get("value") is not None]
    if not records:
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10.2, 1.3 + 0.235 * len(records)))
    beside = max(g.get("beside", 0) for g in records)
    for y, goal in enumerate(records):
        score, met = _score(goal, goal["value"]), goal["verdict"] == "met"
        color = ACCENT if met else WORSE
        axis.plot([0, score], [y, y], color=color, linewidth=1.5, zorder=2)
        axis.scatter(score, y, s=36, marker="o" if met else "X", color=color, zorder=3)
        sign = "<=" if goal["at_most"] else ">="
        text = f"{goal['value']:.3g} {goal['unit']} ({sign} {goal['bound']:g})"
        if (loaded := goal.get("beside_value")) is not None:
            met = goal["beside_verdict"] == "met"
            look = {"facecolor": "white", "edgecolor": ACCENT if met else WORSE, "linewidth": 1.2}
            axis.scatter(_score(goal, loaded), y, s=30, marker="o" if met else "X", zorder=2.5, **look)
            text += f"   {loaded:.3g} {goal['unit']}"
        axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.axvline(0, color=INK, linewidth=1)
    names = ["\n".join(textwrap.wrap(g["goal"], 86)) for g in records]
    axis.set_yticks(range(len(records)), names, fontsize=8, linespacing=0.9)
    axis.set_ylim(len(records) - 0.4, -0.6)
    low, high = axis.get_xlim()
    ticks = range(int(low // 1), int(high // 1) + 2)
    axis.set_xticks(list(ticks), [f"{2.0**t:g}" for t in ticks])
    axis.grid(axis="x")
    axis.set_xlabel("measured / promised (right of 1: met)")
    note = "dots: met; crosses: missed" + (f"; hollow, and second number: {company(beside)}" if beside else "")
    return [finish(figure, results, ("goals", "goal"), "Goals", out / "goals.png", note)]


def _score(goal: dict[str, Any], value: float) -> float:
    """log2 of measured over promised, the better the larger; within four octaves of the goal."""
    score = (goal["bound"] / value if goal["at_most"] else value / goal["bound"]) if value > 0 else 16.0
    return log2(min(max(score, 1 / 16), 16.0))
