"""Options of the pytest-benchmark suite, and what every benchmark records beside its time."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gate import Verdict, check
from benchmarks.machine import describe
from benchmarks.problem import NotAvailable, Problem, Side
from benchmarks.systems import SYSTEMS, Options

with contextlib.suppress(ImportError):  # now that `benchmarks` has put what is installed first: pytest undoes that
    import fused  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--backend", help="force a backend of this package")
    group.addoption("--systems", default="fused", help="comma list of systems, e.g. fused,torch.fused")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "system" in metafunc.fixturenames:
        metafunc.parametrize("system", metafunc.config.getoption("--systems").split(","))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fused"] = describe(torch.device("cpu"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def make_side(request: pytest.FixtureRequest, device: torch.device) -> Any:
    """Builds a side and passes it through the correctness gate."""

    def make(system: str, case: Case, problem: Problem) -> Side:
        options = Options(backend=request.config.getoption("--backend") if system == "fused" else None)
        try:
            side = SYSTEMS[system].make(case, problem, options)
        except NotAvailable as reason:
            pytest.skip(f"{system}: {reason}")
        verdict = check(case, problem, [side])[side.system]
        if isinstance(verdict, NotAvailable | NotImplementedError):
            pytest.skip(f"{system}: {verdict}")
        assert isinstance(verdict, Verdict) and verdict.ok, f"wrong result, not timed: {verdict}"
        return side

    return make


@pytest.fixture
def time_step(benchmark: Any, device: torch.device) -> Any:
    """Times the side's step, the device waited for, and records bytes and bandwidth."""

    def run(side: Side, problem: Problem, held: int | None = None) -> None:
        """`held`: bytes that are read and written, where not parameters and states."""
        def step() -> None:
            side.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        held = side.held_bytes() if held is None else held
        gradients = problem.profile.elements * side.gradient_passes * problem.grad_dtype.itemsize
        benchmark.extra_info |= {
            "tensors": problem.profile.tensors,
            "elements": problem.profile.elements,
            "bytes_held": held,
            "bytes_moved": 2 * held + gradients,
        }
        benchmark.pedantic(step, rounds=15, warmup_rounds=2, iterations=1, setup=side.prepare)
        stats = benchmark.stats
        if stats is not None:
            benchmark.extra_info["gbs"] = round(benchmark.extra_info["bytes_moved"] / stats.stats.median / 1e9, 3)

    return run
