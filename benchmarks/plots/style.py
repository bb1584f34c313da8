"""How every figure looks, and what it is labelled with."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..store import MachineResults

Rows = list[dict[str, Any]]

INK, MUTED, LIGHT, ACCENT, WORSE = "#1b1f24", "#6b7480", "#d5dae0", "#0b5cad", "#c2571a"
# dark to light, so that they stay apart in grey; each with its own marker and line
LOOK: dict[str, dict[str, Any]] = {
    "fused": {"color": ACCENT, "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 5},
    "torch.fused": {"color": "#c2571a", "marker": "s", "linestyle": "--"},
    "torch.foreach": {"color": "#7d8b99", "marker": "^", "linestyle": "-."},
    "torch.loop": {"color": "#b4bdc7", "marker": "v", "linestyle": ":"},
}
NAMES = {"fused": "fused (this package)", "torch.fused": "torch fused=True", "torch.foreach": "torch foreach=True"}
NAMES["torch.loop"] = "torch for-loop"


def pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 144,
            "font.size": 9.5,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.axisbelow": True,
            "grid.color": LIGHT,
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
        }
    )
    return plt


def finish(
    figure: Any,
    results: MachineResults,
    benches: Sequence[str],
    title: str,
    path: Path,
    note: str = "",
    top: float = 0.0,
) -> Path:
    """Title, note, the machine's line for what the benches' rows are from; saves. `top`: inches free above the axes."""
    width, height = figure.get_size_inches()
    label = textwrap.wrap(_label(results, benches), int(width * 17))
    figure.text(0.01, 1 - 0.08 / height, title, ha="left", va="top", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.36 / height, note, ha="left", va="top", fontsize=9, color=MUTED)
    figure.text(0.01, 0.06 / height, "\n".join(label), ha="left", va="bottom", fontsize=7.5, color=MUTED)
    figure.tight_layout(rect=(0, (0.1 + 0.14 * len(label)) / height, 1, 1 - (0.6 + top) / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot().close(figure)
    return path


def _label(results: MachineResults, benches: Sequence[str]) -> str:
    """Machine, condition, versions of the systems that take part, commit and date."""
    rows = ok_rows(results.rows(*benches))
    systems = dict.fromkeys((r["system"], r.get("version")) for r in rows if "system" in r)
    others = [f"{name} {version}" for name, version in systems if version and not name.startswith(("torch.", "fused"))]
    ours = results.machine["versions"].get("fused-optim")
    parts = [results.title, f"fused-optim {ours}" if ours else "", *others, results.condition(*benches)]
    return " · ".join(p for p in [*parts, results.origin(*benches)] if p)


def ok_rows(rows: Iterable[dict[str, Any]]) -> Rows:
    return [r for r in rows if r.get("status", "ok") == "ok"]


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def ratio_bars(axis: Any, ratios: Sequence[float | None], labels: Sequence[str], height: float = 0.68) -> None:
    """Bars from 1 to each ratio, downwards: to the right where ours is faster, to the left and hatched where not."""
    for y, (ratio, label) in enumerate(zip(ratios, labels, strict=True)):
        if ratio is None:
            axis.text(1.06, y, "-", va="center", fontsize=8, color=MUTED)
            continue
        look = {"color": ACCENT} if ratio >= 1 else {"facecolor": "white", "edgecolor": WORSE, "hatch": "//////"}
        axis.barh(y, ratio - 1, left=1, height=height, **look)
        axis.text(max(ratio, 1) * 1.06, y, label, va="center", fontsize=8.5, color=INK)
    axis.set_xscale("log")
    axis.axvline(1, color=INK, linewidth=1)
    axis.grid(axis="x")
    axis.set_ylim(len(ratios) - 0.4, -0.6)


def plain_log(axis: Any) -> None:
    """Log scale with 0.5, 1, 2, 5, 10 in place of powers; where it spans many decades with 0.1, 1, 10. Limits first."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def file_name(text: str) -> str:
    return text.replace("+", "-").replace(" ", "-")
