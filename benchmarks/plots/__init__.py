"""Pictures of results: readable in grey, labelled with machine and versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..store import MachineResults
from .bandwidth import kernels, roofline, size
from .costs import host, memory
from .quality import convergence, goals
from .speed import gradients, pipeline, rivals, speedup

FIGURES: tuple[Callable[[MachineResults, Path], list[Path]], ...] = (
    speedup,
    rivals,
    roofline,
    size,
    host,
    memory,
    pipeline,
    gradients,
    kernels,
    convergence,
    goals,
)


def draw(results: MachineResults, out: Path) -> list[Path]:
    """Every figure that there are results for."""
    return [path for figure in FIGURES for path in figure(results, out)]
