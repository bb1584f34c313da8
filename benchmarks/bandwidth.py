"""What this machine's memory really does: a copy and a read, measured in the same run as everything else.

A copy is the faster of copying and scaling in place. On a CPU a plain copy moves more than it counts, because the lines
it overwrites are read first; a step, which works in place, would look better than possible beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .machine import available_memory, theoretical_bandwidth
from .problem import Side
from .timing import Budget, interleave, make_clock


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (1e9 bytes). A copy of n bytes counts 2n: n read and n written."""

    copy: float
    read: float
    theoretical: float | None
    bytes: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def measure_bandwidth(device: torch.device, quick: bool = False) -> Bandwidth:
    """Best of several rounds, of whatever form of the operation is fastest: the ceiling, not the average."""
    size = (4 << 30) if device.type == "cuda" else (256 << 20)
    if quick:
        size //= 2
    size = min(size, available_memory(device) // 4)
    n = size // 4
    source = torch.ones(n, device=device)
    target = torch.zeros_like(source)
    halves = source.view(2, -1)
    sides = [
        Side("copy", "copy", [], lambda: target.copy_(source)),
        Side("scale", "scale", [], lambda: target.mul_(1.0)),
        Side("sum", "sum", [], source.sum),
        Side("dot", "dot", [], lambda: torch.dot(halves[0], halves[1])),
        Side("norm", "norm", [], lambda: torch.linalg.vector_norm(source)),
    ]
    budget = Budget(seconds=0.3 if quick else 1.0, min_rounds=5, max_rounds=40, warmup=2)
    times = {k: t.device.best for k, t in interleave(sides, make_clock(device), budget).items()}
    read = min(times["sum"], times["dot"], times["norm"])
    copy = min(times["copy"], times["scale"])
    return Bandwidth(2 * size / copy / 1e9, size / read / 1e9, theoretical_bandwidth(device), size)
