"""Interleaved timing: every round steps each side once, in an order that changes from round to round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .problem import Side


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Stats:
    """Seconds."""

    median: float
    p20: float
    p80: float
    best: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stats:
        return cls(statistics.median(values), quantile(values, 0.2), quantile(values, 0.8), min(values), len(values))


@dataclass(frozen=True)
class Budget:
    """How long one cell may take: `seconds` for each side, and up to four times that to get `min_rounds`.

    A side that needs more sits out after `fewest` rounds: one slow system must not cost the others their rounds.
    """

    seconds: float = 3.0
    min_rounds: int = 9
    fewest: int = 3
    max_rounds: int = 200
    warmup: int = 2

    @classmethod
    def quick(cls) -> Budget:
        return cls(seconds=0.4, min_rounds=5, max_rounds=60, warmup=1)


@dataclass
class Sample:
    wall: float  # start of the call until the work is done
    host: float  # until the call returns (python + launch)
    device: float  # on the device alone; on a CPU the same as wall


@dataclass
class Timed:
    """All samples of one side."""

    walls: list[float] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)
    devices: list[float] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.walls.append(sample.wall)
        self.hosts.append(sample.host)
        self.devices.append(sample.device)

    @property
    def wall(self) -> Stats:
        return Stats.of(self.walls)

    @property
    def host(self) -> Stats:
        return Stats.of(self.hosts)

    @property
    def device(self) -> Stats:
        return Stats.of(self.devices)


class Clock(Protocol):
    """Times one call on one kind of device."""

    def sample(self, step: Callable[[], object], prepare: Callable[[], object] | None) -> Sample: ...


class CpuClock:
    """Wall clock. `cold` streams through a buffer larger than the last-level cache before each call."""

    def __init__(self, cold_bytes: int = 0) -> None:
        self._flush = torch.zeros(cold_bytes // 4) if cold_bytes else None

    def sample(self, step: Callable[[], object], prepare: Callable[[], object] | None) -> Sample:
        if prepare:
            prepare()
        if self._flush is not None:
            self._flush.add_(1)
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        return Sample(elapsed, elapsed, elapsed)


class CudaClock:
    """Two calls per sample: one from an idle queue (wall and host time), one queued behind a sleeping kernel, so that
    the events around it see the device alone. The L2 cache is overwritten before each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
        self._flush = torch.empty(max(256 << 20, 4 * l2) // 4, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def sample(self, step: Callable[[], object], prepare: Callable[[], object] | None) -> Sample:
        if prepare:
            prepare()
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter() - start

        if prepare:
            prepare()
        self._flush.zero_()
        torch.cuda._sleep(int(min(host, 0.05) * 3e9) + 100_000)
        self._start.record()
        step()
        self._stop.record()
        torch.cuda.synchronize(self.device)
        return Sample(wall, host, self._start.elapsed_time(self._stop) * 1e-3)


def make_clock(device: torch.device, cold_bytes: int = 0) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock(cold_bytes)


def interleave(
    sides: Sequence[Side], clock: Clock, budget: Budget, stop_at: float = float("inf")
) -> dict[str, Timed]:
    """Warm up, then rounds until the budget is spent; each starts at another side, every other one runs backwards.

    After `stop_at` (of time.perf_counter()) there are no more than the fewest rounds.
    """
    results = {side.system: Timed() for side in sides}
    spent = dict.fromkeys(results, 0.0)

    def sample(side: Side) -> Sample:
        start = time.perf_counter()
        taken = clock.sample(side.step, side.prepare)
        spent[side.system] += time.perf_counter() - start
        return taken

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(budget.warmup):
            for side in sides:
                if spent[side.system] < budget.seconds and time.perf_counter() < stop_at:
                    sample(side)
        spent = dict.fromkeys(results, 0.0)
        active = list(sides)
        for round_ in range(budget.max_rounds):
            if round_ >= budget.fewest:
                if time.perf_counter() > stop_at:
                    break
                active = [side for side in active if spent[side.system] <= 4 * budget.seconds]
            total = sum(spent[side.system] for side in active)
            if len(active) < min(2, len(sides)) or (
                round_ >= budget.min_rounds and total > budget.seconds * len(active)
            ):
                break
            shift = (round_ // 2) % len(active)
            order = [*active[shift:], *active[:shift]]
            for side in reversed(order) if round_ % 2 else order:
                results[side.system].add(sample(side))
    finally:
        if collecting:
            gc.enable()
    return results


def paired_ratio(other: Sequence[float], ours: Sequence[float]) -> Stats:
    """other / ours, round by round, as far as both took part: drift that hits a whole round cancels."""
    return Stats.of([a / b for a, b in zip(other, ours, strict=False)])
