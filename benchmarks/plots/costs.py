"""What a step costs beside its kernel: host time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..store import MachineResults
from .style import ACCENT, LOOK, NAMES, finish, ok_rows, plain_log, pyplot


def host(results: MachineResults, out: Path) -> list[Path]:
    """Host time against the number of tensors."""
    rows = ok_rows(results.rows("host", "host fresh"))
    if not rows:
        return []
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.3), sharey=True)
    for axis, bench, title in zip(
        axes, ("host", "host fresh"), ("same gradient tensors", "new gradient tensors every step"), strict=True
    ):
        for system, look in LOOK.items():
            mine = sorted(
                (r["tensors"], 1e3 * r["host_ms"]) for r in rows if r["system"] == system and r["bench"] == bench
            )
            if mine:
                xs, ys = zip(*mine, strict=True)
                axis.plot(xs, ys, label=NAMES[system], markersize=5, **look)
                if system == "fused":
                    last, text = (xs[-1], ys[-1]), f"{ys[-1] / 1e3:.2g} ms"
                    axis.annotate(text, last, textcoords="offset points", xytext=(7, -3), fontsize=8.5, color=ACCENT)
        axis.set_title(title)
        axis.set_xscale("log")
        axis.set_xlim(0.8, 5 * max(r["tensors"] for r in rows))
        axis.set_yscale("log")
        plain_log(axis.xaxis)
        plain_log(axis.yaxis)
        axis.grid()
        axis.set_xlabel("tensors, one element each")
    axes[0].set_ylabel("python + launch, microseconds per step")
    axes[0].legend(loc="upper left")
    return [
        finish(
            figure,
            results,
            ("host", "host fresh"),
            "Host time of a step, AdamW",
            out / "host.png",
            "what is left when there is nothing to compute",
        )
    ]


def memory(results: MachineResults, out: Path) -> list[Path]:
    """Bytes per parameter of AdamW by storage and system."""
    plt = pyplot()
    rows = [r for r in ok_rows(results.rows("memory")) if r["optimizer"] == "adamw"]
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        seen.setdefault((row["precision"], row["system"].partition(".")[0]), row)
    rows = list(seen.values())
    if not rows:
        return []
    labels: list[tuple[str, str]] = []
    values, peaks, own, gaps = [], [], [], []
    for precision in dict.fromkeys(r["precision"] for r in rows):
        gaps.append(len(labels))
        for row in (r for r in rows if r["precision"] == precision):
            note = " (no masters)" if row.get("note") == "no masters" else ""
            labels.append((precision if row["system"] == "fused" else "", f"{row['label']}{note}"))
            values.append(row["held_bytes"])
            peaks.append((row.get("temporary_bytes") or 0) / row["elements"])
            own.append(row["system"] == "fused")
    positions = [i + 1.15 * sum(g <= i for g in gaps) for i in range(len(labels))]
    figure, axis = plt.subplots(figsize=(8.8, 1.4 + 0.21 * positions[-1]))
    axis.barh(positions, values, height=0.78, color=[ACCENT if o else "#9aa5b1" for o in own])
    axis.barh(
        positions, peaks, left=values, height=0.78, color="white", edgecolor="#9aa5b1", hatch="////", linewidth=0.6
    )
    for y, value, peak in zip(positions, values, peaks, strict=True):
        more = f" + {peak:.1f}" if peak >= 0.1 else ""
        axis.text(value + peak + 0.12, y, f"{value:.2f}{more}", va="center", fontsize=8)
    axis.set_yticks(positions, [system for _, system in labels], fontsize=8)
    for y, (precision, _) in zip(positions, labels, strict=True):
        axis.text(0, y - 0.98, precision, fontsize=9, fontweight="bold", va="center", ha="left")
    axis.set_ylim(positions[-1] + 0.7, positions[0] - 1.5)
    axis.set_xlim(0, max(v + p for v, p in zip(values, peaks, strict=True)) * 1.12)
    axis.grid(axis="x")
    axis.set_xlabel("bytes per parameter")
    note = "parameter, masters and states, counted from the tensors; gradient not counted; hatched: more during a step"
    return [finish(figure, results, ("memory",), "Memory per parameter, AdamW", out / "memory.png", note)]
