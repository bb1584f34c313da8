"""How near the memory's limit: roofline, bandwidth against size, kernels by storage."""

from __future__ import annotations

from pathlib import Path

from ..store import MachineResults
from .style import INK, LOOK, MUTED, NAMES, finish, ok_rows, plain_log, pyplot

ROOFLINE = ("step", "compare", "kernel", "size")


def roofline(results: MachineResults, out: Path) -> list[Path]:
    """Bytes that must move against time, with the line of the measured copy."""
    rows = [
        r
        for r in ok_rows(results.rows(*ROOFLINE))
        if r.get("model_bytes") and r["system"] in LOOK
    ]
    copy = max((float(s.bandwidth.get("copy") or 0) for s in results.sections.values()), default=0)
    if not rows or not copy:
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.4, 5.2))
    for system in reversed(LOOK):
        dots = [(r["model_bytes"] * r["elements"] / 1e6, r["device_ms"]) for r in rows if r["system"] == system]
        look = {k: v for k, v in LOOK[system].items() if k in ("color", "marker", "zorder")}
        if dots:
            xs, ys = zip(*dots, strict=True)
            axis.scatter(xs, ys, s=26, alpha=0.85, edgecolor="white", linewidth=0.4, label=NAMES[system], **look)
    low, high = (
        min(r["model_bytes"] * r["elements"] for r in rows) / 1e6,
        max(r["model_bytes"] * r["elements"] for r in rows) / 1e6,
    )
    axis.plot(
        [low, high], [low / copy, high / copy], color=INK, linewidth=1.4, label=f"measured copy, {copy:,.1f} GB/s"
    )
    peak = next(
        (s.bandwidth.get("theoretical") for s in results.sections.values() if s.bandwidth.get("theoretical")), None
    )
    if peak:
        axis.plot(
            [low, high],
            [low / peak, high / peak],
            color=MUTED,
            linewidth=1,
            linestyle=":",
            label=f"data sheet, {peak:,.0f} GB/s",
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain_log(axis.xaxis)
    plain_log(axis.yaxis)
    axis.grid(which="major")
    axis.set_xlabel("least bytes a step must move, MB (held: read and written, gradient: read)")
    axis.set_ylabel("time, ms")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="upper left")
    note = "on the line: as fast as a copy of the same bytes; below it: served from the cache"
    return [finish(figure, results, ROOFLINE, "Time against bytes", out / "roofline.png", note)]


def size(results: MachineResults, out: Path) -> list[Path]:
    """Bandwidth of AdamW from small to large tensors."""
    rows = ok_rows(results.rows("size"))
    if not rows:
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.4, 4.4))
    for system, look in LOOK.items():
        mine = sorted((r["elements"], r["gbs"]) for r in rows if r["system"] == system)
        if mine:
            xs, ys = zip(*mine, strict=True)
            axis.plot(xs, ys, label=NAMES[system], markersize=5, **look)
    copy = max(float(s.bandwidth.get("copy") or 0) for s in results.sections.values())
    axis.axhline(copy, color=INK, linewidth=1, label=f"measured copy, {copy:,.1f} GB/s")
    axis.set_xscale("log", base=2)
    ticks = sorted({r["elements"] for r in rows})
    shown = ticks[::-2]  # the largest among them
    axis.set_xticks(shown, [_power(t) for t in shown])
    axis.set_ylim(0, 1.3 * max(copy, *(r["gbs"] for r in rows)))
    axis.grid()
    axis.set_xlabel("elements of the one tensor")
    axis.set_ylabel("GB/s, 28 bytes per element")
    axis.legend(loc="upper left", ncols=2)  # two lines of it stay above that of the copy
    return [
        finish(
            figure,
            results,
            ("size",),
            "AdamW, float32: bandwidth against size",
            out / "size.png",
            "one tensor, python and launch included on a CPU",
        )
    ]


def _power(n: int) -> str:
    for unit, value in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n >= value:
            return f"{n // value}{unit}"
    return str(n)


def kernels(results: MachineResults, out: Path) -> list[Path]:
    """Update kernels: share of the measured copy bandwidth, optimizer by storage."""
    everything = results.rows("kernel")
    rows = ok_rows(everything)
    if not rows:
        return []
    plt = pyplot()
    optimizers = [o for o in dict.fromkeys(r["optimizer"] for r in everything) if o in {r["optimizer"] for r in rows}]
    storages = list(dict.fromkeys(r["precision"] for r in everything))
    figure, axis = plt.subplots(figsize=(max(6.5, 2.6 + 0.95 * len(optimizers)), 1.5 + 0.4 * len(storages)))
    by_cell = {(r["precision"], r["optimizer"]): r for r in rows}
    shares = [[(by_cell.get((s, o)) or {}).get("copy_fraction") for o in optimizers] for s in storages]
    filled = [[float("nan") if v is None else min(v, 1.2) for v in line] for line in shares]
    axis.imshow(filled, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for y, line in enumerate(shares):
        for x, value in enumerate(line):
            row = by_cell.get((storages[y], optimizers[x]))
            text = "-" if value is None or row is None else f"{value:.0%}\n{row['device_ms']:.3g} ms"
            axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if (value or 0) > 0.85 else INK)
    axis.set_xticks(range(len(optimizers)), optimizers)
    axis.set_yticks(range(len(storages)), storages)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    note = f"one tensor, {rows[0]['profile']} · share of the measured copy bandwidth, and the time"
    return [finish(figure, results, ("kernel",), "Update kernels by storage", out / "kernels.png", note)]
