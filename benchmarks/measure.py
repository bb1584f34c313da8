"""One cell: build every side, pass the gate, time them interleaved, give rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .bandwidth import Bandwidth
from .cases import Case, held_bytes
from .gate import Verdict, check
from .machine import available_memory
from .problem import LEFT_OUT, NotAvailable, Problem, Side
from .report import Row, cell_name, number
from .systems import SYSTEMS, Options, System
from .timing import Budget, Timed, interleave, make_clock, paired_ratio

OWN = ("fused", "torch.fused", "torch.foreach", "torch.loop", "torch.compile")
PASSES = (*LEFT_OUT, NotImplementedError)
"""What keeps a system out of a cell without being a mistake of its own."""
COUNTABLE = 0.05
"""Seconds on the host up to which a step's launches are counted: a hundred thousand take the profiler a minute."""


@dataclass
class Session:
    """What all cells of one command share."""

    device: torch.device
    budget: Budget
    bandwidth: Bandwidth
    options: Options = field(default_factory=Options)
    cold_bytes: int = 0
    quick: bool = False
    beside: int = 0  # busy processes that run now
    deadline: float = float("inf")  # of time.perf_counter(): no cell starts after it
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    noisy: list[str] = field(default_factory=list)
    cells: int = 0
    goals: list[dict[str, Any]] = field(default_factory=list)
    planned: int = 1  # cells still to come, which share the time that is left

    def is_over(self) -> bool:
        return time.perf_counter() > self.deadline

    def leave_out(self, *cells: str) -> None:
        self.left_out += cells
        self.planned = max(1, self.planned - len(cells))

    def part(self) -> float:
        """Until when the next cell may go on with its rounds: it has its share, and half as much again, for others may
        need less."""
        now = time.perf_counter()
        share = 1.5 * (self.deadline - now) / max(1, self.planned)
        self.planned -= 1
        return now + share

    def note_spread(self, row: Row) -> None:
        self.cells += 1
        if row.median_ms and (row.p80_ms or 0.0) - (row.p20_ms or 0.0) > 0.3 * row.median_ms:
            times = f"{number(row.p20_ms)}-{number(row.p80_ms)} ms around {number(row.median_ms)}"
            self.noisy.append(f"{row.cell}, {row.label} ({times})")


def measure_cell(
    session: Session,
    case: Case,
    problem: Problem,
    systems: Sequence[System],
    bench: str = "step",
    build: Callable[[System], Side] | None = None,
    clip: float | None = None,
    scale: float = 1.0,
) -> list[Row]:
    """Rows of this package and of every system, measured together (in several groups when memory does not hold all)."""
    if session.is_over():
        session.leave_out(cell_name(bench, case.key, problem.precision.name, problem.profile.name))
        return []
    stop_at = session.part()
    build = build or (lambda system: system.make(case, problem, session.options))
    rows: list[Row] = []
    for chunk in _chunks(session, case, problem, systems):
        measured = _measure_together(session, case, problem, chunk, bench, build, clip, scale, stop_at)
        rows += measured[1:] if rows else measured  # ours takes part in every group, and counts once
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _chunks(session: Session, case: Case, problem: Problem, systems: Sequence[System]) -> list[list[System]]:
    """As many systems at a time as memory holds beside ours; each counted as float32 parameters, masters and states."""
    per_side = problem.side_bytes(max(held_bytes(case, problem.precision), 4.0 * (2 + len(case.moments))) + 4)
    fit = int(available_memory(session.device) * 0.7 / max(per_side, 1)) - 1
    if fit < 0:
        raise NotAvailable(f"needs about {per_side / 2**30:.1f} GiB for each system")
    step = max(1, min(fit, 6))
    return [list(systems[i : i + step]) for i in range(0, max(1, len(systems)), step)]


def _measure_together(
    session: Session,
    case: Case,
    problem: Problem,
    systems: Sequence[System],
    bench: str,
    build: Callable[[System], Side],
    clip: float | None,
    scale: float,
    stop_at: float,
) -> list[Row]:
    rows: dict[str, Row] = {}
    sides: list[Side] = []
    for system in [SYSTEMS["fused"], *systems]:
        row = _blank(bench, case, problem, system, session)
        rows[system.key] = row
        try:
            side = build(system)
        except NotAvailable as reason:
            row.status = f"not available: {reason}" if str(reason) != "not installed" else "not installed"
            continue
        except torch.OutOfMemoryError as error:
            row.status = f"not available: {_brief(error)}"
            continue
        row.label, row.note = side.label, side.note
        sides.append(side)

    kept = []
    verdicts = check(case, problem, sides, clip, scale)
    for i, side in enumerate(sides):
        verdict = verdicts[side.system]
        if isinstance(verdict, Verdict) and not verdict.gradients_kept and side.system not in OWN:
            sides[i] = side = build(SYSTEMS[side.system])  # once more, from the start, with gradients of its own
            side.take_private_gradients()
            rows[side.system].note = side.note = "writes to the gradients: works on a copy"
            problem.set_factor(1.0)
            verdicts |= check(case, problem, [side], clip, scale)
    for side in sides:
        row, verdict = rows[side.system], verdicts[side.system]
        if isinstance(verdict, Exception):
            row.status = f"not available: {_brief(verdict)}"
            if side.system == "fused" and not isinstance(verdict, PASSES):
                row.status = f"failed: {_brief(verdict)}"
                session.wrong.append(f"{row.cell} {side.label}: {row.status}")
            continue
        row.error = verdict.error
        if verdict.ok:
            kept.append(side)
            continue
        row.status = f"wrong result: {verdict}"
        if side.system == "fused":
            session.wrong.append(
                f"{bench} {case} {problem.precision.name} {problem.profile.name} {side.label}: {verdict}"
            )

    results = interleave(kept, make_clock(session.device, session.cold_bytes), session.budget, stop_at) if kept else {}
    ours = results.get("fused")
    for side in kept:
        _fill(rows[side.system], session, problem, side, results[side.system], ours)
    return list(rows.values())


def _brief(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:100]
    return text if isinstance(error, NotAvailable) else f"{type(error).__name__}: {text}"


def _blank(bench: str, case: Case, problem: Problem, system: System, session: Session) -> Row:
    profile, options = problem.profile, session.options
    return Row(
        bench, case.key, problem.precision.name, profile.name, profile.tensors, profile.elements, system.key,
        system.key, version=system.version(), groups=options.groups,
        beside=session.beside or None,
    )  # fmt: skip


def _fill(row: Row, session: Session, problem: Problem, side: Side, timed: Timed, ours: Timed | None) -> None:
    row.take_times(timed)
    if ours:
        ratio = paired_ratio(timed.walls, ours.walls)
        row.ratio, row.ratio_p20, row.ratio_p80 = ratio.median, ratio.p20, ratio.p80
        row.device_ratio = paired_ratio(timed.devices, ours.devices).median
    elements = max(1, problem.profile.elements)
    row.held_bytes = side.held_bytes() / elements
    row.model_bytes = 2 * row.held_bytes + side.gradient_passes * (side.grad_bytes or problem.grad_dtype.itemsize)
    row.gbs = row.model_bytes * elements / timed.device.median / 1e9
    row.copy_fraction = row.gbs / session.bandwidth.copy
    if session.bandwidth.theoretical:
        row.peak_fraction = row.gbs / session.bandwidth.theoretical
    session.note_spread(row)
    if session.device.type == "cuda":
        countable = timed.host.median < COUNTABLE
        row.temporary_bytes, row.launches = gpu_footprint(side, session.device, countable)


def gpu_footprint(side: Side, device: torch.device, countable: bool = True) -> tuple[int, int | None]:
    """Peak bytes allocated beyond what is held during one step, and the number of kernels and copies it launches."""
    if side.prepare:
        side.prepare()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    side.step()
    torch.cuda.synchronize(device)
    peak = int(torch.cuda.max_memory_allocated(device)) - int(before)
    if not countable:
        return peak, None
    if side.prepare:
        side.prepare()
    torch.cuda.synchronize(device)
    launches: int | None = None
    gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            side.step()
            torch.cuda.synchronize(device)
        launches = len([e for e in profile.events() or () if e.device_type == gpu])
    except (RuntimeError, AssertionError):  # no CUPTI on this machine
        pass
    return peak, launches


def settings(session: Session) -> dict[str, Any]:
    budget = session.budget
    return {
        "quick": session.quick,
        "seconds_per_side": budget.seconds,
        "rounds": [budget.min_rounds, budget.max_rounds],
        "cold_cache": bool(session.cold_bytes) or session.device.type == "cuda",
        "backend": session.options.backend or "auto",
    }
