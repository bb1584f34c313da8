"""What the demo leaves behind: a table, a plot and a JSON file. rich and matplotlib are imported where needed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused.demo.training import WARM_UP_STEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


@dataclass(frozen=True)
class RunResult:
    """One optimizer's run; step ``n`` is item ``n - 1`` of each list."""

    label: str
    losses: list[float]
    optimizer_seconds: list[float]
    step_seconds: list[float]
    validation_loss: float
    bytes_per_parameter: float
    skipped_steps: list[int]

    @property
    def train_loss(self) -> float:
        """Mean of the last steps (at most 20, at most a tenth of the run): single batches vary."""
        return statistics.fmean(self.losses[-max(1, min(20, len(self.losses) // 10)) :])

    @property
    def median_ms(self) -> float:
        """Median time of one optimizer step."""
        return 1e3 * statistics.median(_warm(self.optimizer_seconds))

    @property
    def total_seconds(self) -> float:
        """Time of all optimizer steps but those of the warm-up."""
        return sum(_warm(self.optimizer_seconds))

    @property
    def share(self) -> float:
        """Part of the training step that the optimizer takes."""
        return self.total_seconds / sum(_warm(self.step_seconds))


@dataclass(frozen=True)
class Result:
    """A whole demo; the last run is fused's, the first is the one it is compared with."""

    config: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    corpus: dict[str, Any]
    parameters: int
    parameter_tensors: int
    runs: list[RunResult]

    @property
    def ours(self) -> RunResult:
        return self.runs[-1]

    @property
    def others(self) -> list[RunResult]:
        return self.runs[:-1]

    def speedup(self, other: RunResult) -> float:
        """How many times ``other``'s optimizer step takes as long as ours."""
        return other.median_ms / self.ours.median_ms

    def differences(self, other: RunResult) -> list[float]:
        """Absolute difference of the two training losses, step by step."""
        return [abs(a - b) for a, b in zip(other.losses, self.ours.losses, strict=True)]

    def summary(self) -> list[dict[str, Any]]:
        return [
            {
                "label": run.label,
                "train_loss": run.train_loss,
                "validation_loss": run.validation_loss,
                "median_optimizer_ms": run.median_ms,
                "total_optimizer_seconds": run.total_seconds,
                "optimizer_share_of_step": run.share,
                "time_ratio_to_fused": self.speedup(run),
                "max_loss_difference_to_fused": max(self.differences(run)),
                "bytes_per_parameter": run.bytes_per_parameter,
                "skipped_steps": len(run.skipped_steps),
            }
            for run in self.runs
        ]


def write_json(result: Result, path: Path) -> None:
    path.write_text(json.dumps({"summary": result.summary(), **asdict(result)}, indent=1) + "\n")


def table(result: Result) -> Table:
    """A column per optimizer: narrow enough for 80 characters."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column()
    for run in result.runs:
        ours = run is result.ours
        grid.add_column(run.label.replace("(", "\n("), justify="right", style="bold" if ours else None)

    def row(title: str, text: Callable[[RunResult], str], *, end_section: bool = False) -> None:
        grid.add_row(title, *(text(run) for run in result.runs), end_section=end_section)

    row("train loss", lambda run: f"{run.train_loss:.4f}")
    row("validation loss", lambda run: f"{run.validation_loss:.4f}")
    row(
        "largest loss difference",
        lambda run: "" if run is result.ours else f"{max(result.differences(run)):.1e}",
        end_section=True,
    )
    row("optimizer step, median", lambda run: f"{run.median_ms:.2f} ms")
    row("all optimizer steps", lambda run: f"{run.total_seconds:.2f} s")
    row("share of training", lambda run: f"{run.share:.1%}")
    row("time compared with fused", lambda run: f"{result.speedup(run):.2f}x", end_section=True)
    row("bytes per parameter", lambda run: f"{run.bytes_per_parameter:.2f}")
    return grid


def verdict(result: Result) -> list[str]:
    """The table in words."""
    speeds = [f"{result.speedup(run):.2f}x the speed of {run.label}" for run in result.others]
    lines = [f"{result.ours.label}: {' and '.join(speeds)} in the optimizer step."]
    if skipped := result.ours.skipped_steps:
        lines.append(f"Steps skipped for gradients that were not finite: {len(skipped)}.")
        if every := result.config["inject_overflow"]:
            lines.append(f"torch's runs sat out the injected ones (every {every} steps): as many updates on all sides.")
    if len(result.ours.losses) > WARM_UP_STEPS:
        lines.append(f"Times leave out the first {WARM_UP_STEPS} steps.")
    if busy := _busy(result):
        lines.append(f"Take the times with care: the machine was already busy with something else ({busy}).")
    return lines


def plot(result: Result, path: Path) -> None:
    """Loss curves, their difference, and the time of every optimizer step; told apart without colour as well."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1])
    loss_axes = figure.add_subplot(grid[0, 0])
    difference_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    _plot_losses(result, loss_axes)
    _plot_differences(result, difference_axes)
    _plot_times(result, figure.add_subplot(grid[:, 1]))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"Byte-level GPT, {result.parameters / 1e6:.2f} M parameters in {result.parameter_tensors} tensors, "
        f"trained on the {result.corpus['source']}",
        fontsize=13,
        fontweight="bold",
    )
    figure.supxlabel(_caption(result), fontsize=8, color="0.3")
    figure.savefig(path)


def _plot_losses(result: Result, axes: Axes) -> None:
    span = max(1, len(result.ours.losses) // 40)
    for run, look in zip(result.runs, _looks(result), strict=True):
        label = f"{run.label}: validation {run.validation_loss:.4f}"
        axes.plot(_steps(run), _smooth(run.losses, span), label=label, **look)
    if skipped := result.ours.skipped_steps:
        heights = [_smooth(result.ours.losses, span)[step - 1] for step in skipped]
        label = f"step skipped, gradients not finite ({len(skipped)})"
        axes.plot(skipped, heights, linestyle="none", marker="x", color="black", label=label)
    smoothed = f", mean of the last {span} steps" if span > 1 else ""
    axes.set_title(f"Training loss{smoothed}", loc="left")
    axes.set_ylabel("nats per byte")
    axes.legend(frameon=False)
    axes.tick_params(labelbottom=False)


def _plot_differences(result: Result, axes: Axes) -> None:
    worst, equal = 0.0, []
    for run, look in zip(result.others, _looks(result), strict=False):
        largest = list(accumulate(filter(math.isfinite, result.differences(run)), max))
        steps = [step for step, value in enumerate(largest, 1) if value > 0]
        axes.plot(steps, [value for value in largest if value > 0], **{**look, "linewidth": 2})
        worst = max([worst, *largest])
        if not steps:
            equal.append(run.label)
    axes.set_yscale("log")
    axes.set_ylim(1e-8, max(1e-4, 10 * worst))
    if equal:
        axes.text(0.98, 0.08, f"none from {' and '.join(equal)}", ha="right", transform=axes.transAxes)
    axes.set_title("Largest difference from fused's loss so far, not smoothed", loc="left", fontsize=10)
    axes.set_ylabel("nats per byte")
    axes.set_xlabel("step")


def _plot_times(result: Result, axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    every: list[float] = []
    for run, look, marker in zip(result.runs, _looks(result), _markers(result), strict=True):
        times = [1e3 * seconds for seconds in _warm(run.optimizer_seconds)]
        every += times
        steps = _steps(run)[-len(times) :]
        axes.plot(steps, times, linestyle="none", marker=marker, markersize=3.5, color=look["color"], alpha=0.55)
        label = f"{run.label}: median {run.median_ms:.2f} ms"
        axes.axhline(run.median_ms, color=look["color"], linestyle=look["linestyle"], linewidth=1.8)
        axes.plot([], [], label=label, marker=marker, **{**look, "linewidth": 1.8})  # for the legend alone
    # Room for the legend above the points, but not for every moment when the machine did something else.
    ceiling = min(max(every), 6 * max(run.median_ms for run in result.runs))
    beyond = sum(time > ceiling for time in every)
    axes.set_yscale("log")
    axes.set_ylim(0.85 * min(every), 2.2 * ceiling)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(
        f"Time in the optimizer, every step and median{f' ({beyond} off the scale)' * (beyond > 0)}", loc="left"
    )
    axes.set_ylabel("ms")
    axes.set_xlabel("step")
    axes.legend(frameon=False, loc="upper right")


def _smooth(values: list[float], span: int) -> list[float]:
    """Mean of each value and the ``span - 1`` before it, of fewer at the start."""
    return [statistics.fmean(values[max(0, end - span) : end]) for end in range(1, len(values) + 1)]


def _looks(result: Result) -> list[dict[str, Any]]:
    """Lines that differ in lightness, width and dashes; ours last, thin and dark on top."""
    others: list[dict[str, Any]] = [
        {"color": "#b8b8b8", "linewidth": 4.5, "linestyle": "-"},
        {"color": "#5b8fd1", "linewidth": 2.4, "linestyle": "-"},
        {"color": "#7a6a9c", "linewidth": 1.8, "linestyle": ":"},
    ]
    ours: dict[str, Any] = {"color": "#9c1f00", "linewidth": 1.1, "linestyle": "--"}
    return [*others[: len(result.others)], ours]


def _markers(result: Result) -> list[str]:
    return [*("s", "^", "D")[: len(result.others)], "o"]


def _caption(result: Result) -> str:
    machine, versions, config = result.machine, result.versions, result.config
    gpu = machine["gpus"][0]["name"] if config["device"] == "cuda" else None
    cpu = f"{machine['cpu']}, threads: {machine['threads']}, {machine['instruction_set'] or 'kernels not compiled'}"
    where = ", already busy: ".join(filter(None, [gpu or cpu, _busy(result)]))
    formats = f"{config['precision']} parameters (torch: fp32), " if config["precision"] != "fp32" else ""
    clip = f"clipped at {config['clip']:g}, " if config["clip"] is not None else ""
    return (
        f"{where}  |  fused {versions['fused']}, torch {versions['torch']}, Python {versions['python']}\n"
        f"size {config['size']}, {formats}{clip}learning rate {config['lr']:g} ({config['schedule']}), "
        f"batch {config['batch']} x {config['context']} bytes, seed {config['seed']}"
    )


def _busy(result: Result) -> str | None:
    """The load before the demo began, where that left less than half of the machine to it."""
    load, cores = result.machine["load"], result.machine["cores"]
    return f"load {load:.1f} on {cores} cores" if load is not None and load > cores / 2 else None


def _steps(run: RunResult) -> range:
    return range(1, len(run.losses) + 1)


def _warm(seconds: list[float]) -> list[float]:
    """Without the warm-up, unless that is all there is."""
    return seconds[WARM_UP_STEPS:] or seconds
