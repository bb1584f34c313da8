"""The table-driven tests find mistakes planted in the kernels' sources and in the reference."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_adafactor
import test_defects
import test_numerics
import torch
from cases import CASE
from conftest import Backend

if not (Path(__file__).parent.parent / "csrc").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

from planted import DEFECTS, IN_CPP, IN_PYTHON, Defect, PlantedKernels, build, plant_in_reference

CPU = Backend("cpu", torch.device("cpu"))
REFERENCE = Backend("reference", torch.device("cpu"))
OPTIMIZERS = [*CASE, "Adafactor"]


@pytest.fixture(scope="module")
def kernels() -> PlantedKernels:
    if not sys.platform.startswith("linux") or find_spec("pybind11") is None or shutil.which("g++") is None:
        pytest.skip("needs pybind11 and a C++ compiler, on Linux")
    return PlantedKernels(build())


def check(case: str, backend: Backend) -> None:
    """The tests of one optimizer; raises AssertionError where one fails."""
    if case == "Adafactor":
        for variant in test_adafactor.VARIANTS:
            for shape in ((5,), (33, 70), (2, 3, 40, 9), (70, 11, 3, 5)):
                test_adafactor.test_follows_the_paper(backend, variant, shape)
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for variant in CASE[case].variants:
            test_numerics.test_one_list_of_all_sizes(CASE[case], variant, dtype, backend)
    test_defects.test_steps_are_counted_per_parameter(backend)


def test_every_optimizer_has_every_kind() -> None:
    for case in OPTIMIZERS:
        names = {defect.name for defect in DEFECTS if defect.case == case}
        assert {"no step", "sign"} <= names, case
        assert any("decay" in name for name in names), case
    assert len({(defect.case, defect.name) for defect in DEFECTS}) == len(DEFECTS)


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_nothing_is_found_without_a_defect(case: str, kernels: PlantedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.serve(None, monkeypatch)
    check(case, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("defect", IN_CPP, ids=lambda defect: f"{defect.case}: {defect.name}")
def test_kernels(defect: Defect, kernels: PlantedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.serve(defect, monkeypatch)
    with pytest.raises(AssertionError):
        check(defect.case, CPU)


@pytest.mark.parametrize("defect", IN_PYTHON, ids=lambda defect: f"{defect.case}: {defect.name}")
def test_reference(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_reference(defect, monkeypatch)
    with pytest.raises(AssertionError):
        check(defect.case, REFERENCE)
