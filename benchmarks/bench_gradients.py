"""The gradient pipeline, for regressions: unscale + clip + step, and clipping alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Precision
from benchmarks.commands.pipeline import CLIP, PIPELINE, SCALE
from benchmarks.gate import Verdict, check
from benchmarks.gradients import FUNCTIONS, GradientSides, tolerance
from benchmarks.problem import NotAvailable, Problem
from benchmarks.shapes import get_profile
from benchmarks.systems import Options

SHAPES = ("100x32K", "1000x256", "1x2M")


@pytest.mark.parametrize("shape", SHAPES)
def bench_pipeline(shape: str, system: str, device: torch.device, time_step: Any) -> None:
    problem = Problem(get_profile(shape), Precision(), device)
    problem.set_factor(SCALE)
    if system not in PIPELINE:
        pytest.skip(f"{system} has no pipeline here")
    try:
        side = PIPELINE[system](CASES["adamw"], problem, Options())
    except NotAvailable as reason:
        pytest.skip(f"{system}: {reason}")
    verdict = check(CASES["adamw"], problem, [side], clip=CLIP, scale=SCALE)[side.system]
    assert isinstance(verdict, Verdict) and verdict.ok, f"wrong result, not timed: {verdict}"
    time_step(side, problem)


@pytest.mark.parametrize("shape", [*SHAPES, "1x1"])
@pytest.mark.parametrize("name", FUNCTIONS)
def bench_gradients(name: str, shape: str, system: str, device: torch.device, time_step: Any) -> None:
    if system not in ("fused", "torch.foreach", "torch.fused"):
        pytest.skip("this package's functions or torch's")
    problem = Problem(get_profile(shape), Precision(), device)
    made = GradientSides(problem)
    side = made.make(system, FUNCTIONS[name])
    error = made.error(side, FUNCTIONS[name])
    assert error < tolerance(system, problem.grad_dtype), f"wrong result, not timed: relative error {error:.2g}"
    time_step(side, problem, held=0)
