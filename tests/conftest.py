"""Fixtures of all tests: where the step runs, and a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from fused import backends

if TYPE_CHECKING:
    from cuda_on_cpu.backend import CudaOnCpu


@dataclass(frozen=True)
class Backend:
    """A backend of the optimizers and the device its tensors live on: ``Optimizer(..., backend=backend.name)``."""

    name: str
    device: torch.device

    def __str__(self) -> str:
        return self.name


def _runnable() -> list[object]:
    """Backends to test here. Those for a GPU are left out where there is none; a missing extension shows as skips."""
    known = backends.status()
    available, reason = known["cpu"]
    cpu = pytest.param(
        Backend("cpu", torch.device("cpu")), id="cpu", marks=[] if available else [pytest.mark.skip(reason=reason)]
    )
    params: list[object] = [cpu, pytest.param(Backend("reference", torch.device("cpu")), id="reference")]
    if torch.cuda.is_available():
        params += [
            pytest.param(Backend(name, torch.device("cuda")), id=name, marks=[pytest.mark.gpu])
            for name in ("cuda", "triton")
            if known[name][0]
        ]
    return params


@pytest.fixture(params=_runnable())
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that this machine can run."""
    chosen: Backend = request.param
    return chosen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """Instruction sets of the extension that this processor has; the best is selected again afterwards."""
    if backends.extension is None:
        pytest.skip("the compiled extension is not there")
    before = backends.extension.isa()
    usable = []
    for name in backends.extension.built_isas():
        try:
            backends.extension.select_isa(name)
        except ValueError:
            continue
        usable.append(name)
    backends.extension.select_isa(before)
    yield usable
    backends.extension.select_isa(before)


@pytest.fixture(scope="session")
def kernels() -> CudaOnCpu:
    """The CUDA kernels, compiled for the CPU."""
    from cuda_on_cpu.backend import CudaOnCpu
    from cuda_on_cpu.build import SANITIZED, build

    return CudaOnCpu(build(SANITIZED))


@pytest.fixture
def served(kernels: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaOnCpu]:
    """Optimizers step through the CUDA kernels, played by the CPU."""
    kernels.serve(monkeypatch)
    yield kernels
    kernels.order(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what kernels take on a GPU, as compiled ahead of time by the tests that were run."""
    rows = [
        (report.nodeid.split("::")[-1], value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "registers"
    ]
    if rows:
        terminalreporter.section("registers per thread, compiled ahead of time, no spills")
        for name, registers in rows:
            terminalreporter.write_line(f"{registers:>5}  {name}")
