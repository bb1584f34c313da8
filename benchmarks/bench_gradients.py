"""The gradient pipeline, for regressions: unscale + clip + step, and clipping alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Precision
from benchmarks.commands.kernel import gradient_side, gradient_work
from benchmarks.commands.pipeline import PIPELINE, SCALE
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
    time_step(side, problem)


@pytest.mark.parametrize("shape", SHAPES)
def bench_clip(shape: str, system: str, device: torch.device, time_step: Any) -> None:
    problem = Problem(get_profile(shape), Precision(), device)
    ours, torchs, _ = gradient_work("clip_grad_norm_")
    work = ours if system == "fused" else torchs
    if work is None:
        pytest.skip("not there yet")
    time_step(gradient_side(system, system, problem, work, copies=True), problem)
