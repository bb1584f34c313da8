"""Whole steps, for regressions: every main optimizer and storage format over a few shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, MAIN, Precision
from benchmarks.problem import Problem
from benchmarks.shapes import get_profile

SHAPES = {"cpu": ("100x32K", "1000x256", "1x2M"), "cuda": ("1000x32K", "2000x4K", "1x64M")}
PRECISIONS = (
    Precision("bf16"),
    Precision("bf16", "split"),
    Precision("bf16", "split", "bf16"),
    Precision("bf16", "split8", "int8"),
    Precision("bf16", stochastic=True),
)


def _shape(device: torch.device, index: int) -> str:
    return SHAPES[device.type][index]


@pytest.mark.parametrize("index", range(3), ids=("medium", "small", "large"))
@pytest.mark.parametrize("optimizer", MAIN)
def bench_float32(
    optimizer: str, index: int, system: str, device: torch.device, make_side: Any, time_step: Any
) -> None:
    problem = Problem(get_profile(_shape(device, index)), Precision(), device)
    time_step(make_side(system, CASES[optimizer], problem), problem)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.file_name)
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def bench_storage(
    optimizer: str, precision: Precision, system: str, device: torch.device, make_side: Any, time_step: Any
) -> None:
    problem = Problem(get_profile(_shape(device, 2)), precision, device)
    time_step(make_side(system, CASES[optimizer], problem), problem)


@pytest.mark.parametrize("tensors", [1, 100, 1000])
def bench_host(tensors: int, system: str, device: torch.device, make_side: Any, time_step: Any) -> None:
    """Tensors of one element: what python and the launch cost."""
    problem = Problem(get_profile(f"{tensors}x1"), Precision(), device)
    time_step(make_side(system, CASES["adamw"], problem), problem)
