"""The package's speed and memory goals: what each promises, and how it is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from .cases import CASES, Case, Precision
from .commands.host import kernel_seconds
from .commands.kernel import CPU_GRADIENTS
from .commands.memory import measure_memory
from .commands.pipeline import measure_pipeline
from .commands.run import Run
from .gate import Verdict, check
from .gradients import FUNCTIONS, gradient_cells
from .measure import measure_cell
from .problem import NotAvailable, Problem, Side
from .report import Row
from .shapes import get_profile
from .systems import SYSTEMS, TORCH, System
from .timing import interleave, make_clock, paired_ratio

BF16_SPLIT_BF16 = Precision("bf16", "split", "bf16")
SMALLEST = Precision("bf16", "split8", "int8")


@dataclass(frozen=True)
class Goal:
    """`measure` gives the value and how it came about; it must be at least (or at most) `bound`."""

    text: str
    bound: float
    unit: str
    measure: Callable[[Run], tuple[float, str]]
    at_most: bool = False
    part: str = "step"  # step, host, precision, pipeline, adafactor
    cells: int = 1  # that it measures

    @property
    def in_company(self) -> bool:
        """Whether --beside measures it a second time: ratios of times, but Adafactor's, which take too long."""
        return self.unit == "x" and self.part != "adafactor"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def _problem(run: Run, shape: str, precision: Precision) -> Problem:
    gc.collect()
    return Problem(get_profile(shape), precision, run.device)


def _against(rows: Iterable[Row], against: Iterable[str] = TORCH, device: bool = False) -> tuple[float, str]:
    """The smallest ratio over the systems asked for that were timed: the best of them is the bar."""
    rows = list(rows)
    if not rows:
        raise NotAvailable("time limit")
    ours = next(r for r in rows if r.system == "fused")
    if not ours.ok:
        raise NotAvailable(ours.status.removeprefix("not available: "))
    ratios = {r.label: (r.device_ratio if device else r.ratio) or 0.0 for r in rows if r.system in against and r.ok}
    if not ratios:
        raise NotAvailable("nothing to compare with")
    details = ", ".join(f"{label} {ratio:.2f}x" for label, ratio in ratios.items())
    return min(ratios.values()), f"ours {ours.median_ms:.3g} ms; {details}"


def _step(case: str, shape: str, precision: Precision, device: bool = False, against: tuple[str, ...] = TORCH) -> Goal:
    def measure(run: Run) -> tuple[float, str]:
        systems = [SYSTEMS[k] for k in against]
        rows = measure_cell(run.session, CASES[case], _problem(run, shape, precision), systems, "goal")
        run.rows += rows
        return _against(rows, against, device)

    return Goal(f"{CASES[case].cls} {precision.name}, {shape}: against torch's best form", 0.0, "x", measure)


def _float32_step(case: Case, shape: str, precision: Precision, cast: bool) -> Callable[[Run], tuple[float, str]]:
    """Low-precision storage against torch's fused float32 step; with `cast`, followed by the cast to the parameters."""

    def measure(run: Run) -> tuple[float, str]:
        problem = _problem(run, shape, precision)

        def build(system: System) -> Side:
            if system.key == "fused" or cast:
                return system.make(case, problem, run.session.options)
            masters = problem.parameters(torch.float32, grads=torch.float32)
            optimizer = getattr(torch.optim, case.cls)(masters, fused=True, **case.kwargs)
            return Side(system.key, "torch fused float32", masters, optimizer.step, optimizer, grad_bytes=4)

        rows = measure_cell(run.session, case, problem, [SYSTEMS["torch.fused"]], "goal", build)
        run.rows += rows
        return _against(rows, device=run.device.type == "cuda")

    return measure


def _groups(shape: str, groups: int) -> Callable[[Run], tuple[float, str]]:
    """Cost of many parameter groups over the step with one, interleaved, in percent."""

    def measure(run: Run) -> tuple[float, str]:
        problem = _problem(run, shape, Precision())
        sides = []
        for key, count in (("one", 1), ("many", groups)):
            options = replace(run.session.options, groups=count)
            sides.append(replace(SYSTEMS["fused"].make(CASES["adamw"], problem, options), system=key))
        wrong = [v for v in check(CASES["adamw"], problem, sides).values() if not (isinstance(v, Verdict) and v.ok)]
        if wrong:
            run.session.wrong.append(f"{groups} groups: {wrong[0]}")
            raise NotAvailable("wrong result")
        times = interleave(sides, make_clock(run.device), run.session.budget)
        excess = paired_ratio(times["many"].walls, times["one"].walls).median - 1
        one, many = (1e3 * times[k].wall.median for k in ("one", "many"))
        return 100 * excess, f"1 group {one:.3g} ms, {groups} groups {many:.3g} ms"

    return measure


def _host(tensors: int) -> Callable[[Run], tuple[float, str]]:
    def measure(run: Run) -> tuple[float, str]:
        problem = _problem(run, f"{tensors}x4", Precision())
        rows = measure_cell(run.session, CASES["adamw"], problem, [], "goal")
        run.rows += rows
        if not rows:
            raise NotAvailable("time limit")
        (row,) = rows
        if row.host_ms is None:
            raise NotAvailable(row.status.removeprefix("not available: "))
        kernels = 0.0  # on a CPU the call returns after them
        if run.device.type == "cpu":
            step = SYSTEMS["fused"].make(CASES["adamw"], problem, run.session.options).step
            kernels = 1e3 * (kernel_seconds(step) or 0.0)
        host = row.host_ms - kernels
        apart = f", {kernels:.3g} ms in kernels apart" if kernels else ""
        return host, f"{1e3 * host / tensors:.3g} us per tensor{apart}"

    return measure


def _pipeline(shape: str, bound: float) -> Goal:
    def measure(run: Run) -> tuple[float, str]:
        rows = measure_pipeline(run, CASES["adamw"], _problem(run, shape, Precision()), ("fused",))
        run.rows += rows
        return _against(rows)

    return Goal(f"unscale + clip + AdamW fp32, {shape}: against torch's, fused", bound, "x", measure, part="pipeline")


def _clip(shape: str, bound: float) -> Goal:
    def measure(run: Run) -> tuple[float, str]:
        return _against(_gradient_rows(run, shape, ("clip_grad_norm_",)))

    return Goal(f"clip_grad_norm_ alone, {shape}: against torch's", bound, "x", measure, part="pipeline")


def _gradient_rows(run: Run, shape: str, names: tuple[str, ...]) -> list[Row]:
    rows = gradient_cells(run.session, get_profile(shape), names=names)
    run.rows += [replace(row, bench="goal", optimizer=row.bench) for row in rows]
    return rows


def _never_slower(names: tuple[str, ...], bound: float, shapes: tuple[str, ...] = CPU_GRADIENTS) -> Goal:
    """The lowest ratio over the shapes, whatever function it is."""

    def measure(run: Run) -> tuple[float, str]:
        lowest: tuple[float, str] | None = None
        measured = 0
        for shape in shapes:
            rows = _gradient_rows(run, shape, names)
            for name in names:
                mine = [row for row in rows if row.bench == name]
                if not mine:  # no time
                    continue
                ratio, how = _against(mine)
                measured += 1
                lowest = min(lowest or (ratio, ""), (ratio, f"{name} {shape}: {how}"))
        if lowest is None:
            raise NotAvailable("time limit")
        return lowest[0], f"lowest of {measured} of {len(shapes) * len(names)}: {lowest[1]}"

    return Goal(f"{', '.join(names)} alone: no measured shape is slower", bound, "x", measure, part="pipeline",
                cells=len(names) * len(shapes))  # fmt: skip


def _bytes(case: str, precision: Precision, bound: float, shape: str = "1x1000000") -> Goal:
    def measure(run: Run) -> tuple[float, str]:
        row = measure_memory(CASES[case], precision, SYSTEMS["fused"], get_profile(shape), run.device)
        run.rows.append(row)
        if row.held_bytes is None:
            raise NotAvailable(row.status.removeprefix("not available: "))
        return round(row.held_bytes, 3), "parameter and state"

    part = "adafactor" if case == "adafactor" else "precision"
    text = f"{CASES[case].cls} {precision.name}: bytes per parameter"
    return Goal(text, bound, "B", measure, at_most=True, part=part)


def _as(goal: Goal, bound: float, part: str = "step") -> Goal:
    return replace(goal, bound=bound, part=part)


def _best_torch(case: str, shape: str, bound: float) -> Goal:
    return _as(_step(case, shape, Precision()), bound, "adafactor" if case == "adafactor" else "step")


def cpu_goals() -> list[Goal]:
    adamw = CASES["adamw"]
    return [
        _best_torch("adamw", "1000x32K", 4.0),
        _best_torch("adamw", "4000x256", 12.0),
        _best_torch("adamw", "1x32M", 1.0),
        _as(_step("adamw", "1000x32K", Precision("bf16")), 8.0),
        *(_best_torch(key, "1000x32K", 2.0) for key in ("sgd", "lion", "rmsprop", "adagrad", "adadelta")),
        *(
            replace(_best_torch("adamw", shape, 0.95), text=f"AdamW fp32, {shape}: no measured shape is slower")
            for shape in ("gpt2", "resnet50", "lora", "tiny", "1x1", "1x1K", "1x32K", "1x1M", "10x1M", "100x32K")
        ),
        Goal("AdamW fp32, 1000x32K: cost of 300 groups", 5.0, "%", _groups("1000x32K", 300), at_most=True),
        Goal("AdamW fp32, 1000 tensors of 4: host time per step", 0.25, "ms", _host(1000), at_most=True, part="host"),
        _bytes("adamw", Precision("bf16", "split"), 12.0),
        _bytes("adamw", BF16_SPLIT_BF16, 8.0),
        _bytes("adamw", SMALLEST, 5.15),
        _bytes("lion", SMALLEST, 4.1),
        _bytes("sgd", SMALLEST, 4.1),
        Goal(
            "AdamW bf16+split+bf16 states, 1x32M: against torch's float32 fused step + cast",
            1.5, "x", _float32_step(adamw, "1x32M", BF16_SPLIT_BF16, cast=True), part="precision",
        ),
        Goal(
            "AdamW fp32+int8 states, 1x32M: against torch's float32 fused step",
            1.0, "x", _float32_step(adamw, "1x32M", Precision("fp32", None, "int8"), cast=False), part="precision",
        ),
        Goal(
            "AdamW bf16+split8+int8 states, 1x32M: against torch's float32 fused step",
            1.0, "x", _float32_step(adamw, "1x32M", SMALLEST, cast=False), part="precision",
        ),
        _pipeline("1x32M", 1.4),
        _pipeline("1000x32K", 4.0),
        _pipeline("4000x256", 15.0),
        _clip("1000x32K", 1.5),
        _never_slower(("clip_grad_norm_",), 1.0),
        _never_slower(tuple(name for name in FUNCTIONS if name != "clip_grad_norm_"), 0.95),
        _best_torch("adafactor", "gpt2", 4.0),
        _best_torch("adafactor", "vit-l/4", 4.0),
        _best_torch("adafactor", "1000x64x64", 10.0),
        _bytes("adafactor", Precision("bf16", "split8"), 3.02, "1x1024x1024"),
    ]  # fmt: skip


def _copy_fraction(bound: float) -> Goal:
    def measure(run: Run) -> tuple[float, str]:
        rows = measure_cell(run.session, CASES["adamw"], _problem(run, "1x1G", Precision()), [], "goal")
        run.rows += rows
        if not rows:
            raise NotAvailable("time limit")
        (row,) = rows
        if row.copy_fraction is None or row.gbs is None:
            raise NotAvailable(row.status.removeprefix("not available: "))
        return 100 * row.copy_fraction, f"{row.gbs:,.0f} GB/s, copy {run.session.bandwidth.copy:,.0f} GB/s"

    return Goal("AdamW fp32, 1x1G: share of the measured copy bandwidth", bound, "%", measure)


def gpu_goals(backend: str | None) -> list[Goal]:
    """CUDA's goals, or Triton's where that is forced."""
    triton = backend == "triton"
    fp32, adamw = Precision(), CASES["adamw"]
    huge = "1x1G"
    return [
        _copy_fraction(95.0 if triton else 97.0),
        _as(_step("adamw", huge, fp32, device=True, against=("torch.fused",)), 1.0 if triton else 1.05),
        _as(_step("adamw", "2000x4K", fp32, against=("torch.fused",)), 3.0 if triton else 5.0, "host"),
        replace(_pipeline(huge, 1.5), part="pipeline"),
        Goal(
            "AdamW bf16+split+bf16 states, 1x1G: against torch's float32 fused step + cast",
            1.4, "x", _float32_step(adamw, huge, BF16_SPLIT_BF16, cast=True), part="precision",
        ),
        Goal(
            "AdamW bf16+split8+int8 states, 1x1G: against torch's float32 fused step",
            1.8, "x", _float32_step(adamw, huge, SMALLEST, cast=False), part="precision",
        ),
        _as(_step("adafactor", "gpt2", fp32), 5.0 if triton else 8.0, "adafactor"),
        Goal(
            "AdamW fp32, 1000 tensors of 4: host time per step",
            0.3 if triton else 0.15, "ms", _host(1000), at_most=True, part="host",
        ),
        Goal(
            "AdamW fp32, 1 tensor of 4: host time per step",
            0.3 if triton else 0.015, "ms", _host(1), at_most=True, part="host",
        ),
    ]  # fmt: skip
