"""Where the CUDA kernels are built but cannot be used: another backend serves, one line says why, and so does `info`.

The driver and the device are pretended by the runtime of ``cuda_on_cpu``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu.backend import CudaOnCpu
from cuda_on_cpu.build import CSRC, compiler

from fused import backends, info
from fused.backends import cuda

if not CSRC.is_dir() or not sys.platform.startswith("linux"):
    pytest.skip("needs the source tree and Linux", allow_module_level=True)
if importlib.util.find_spec("pybind11") is None or shutil.which(compiler()[0]) is None:
    pytest.skip("needs pybind11 and a C++ compiler", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
PRETENCES = {
    "driver": ("CUDA_ON_CPU_DRIVER", "12040", "supports CUDA 12.4, but the kernels were built with CUDA 13.0"),
    "no-driver": ("CUDA_ON_CPU_DRIVER", "0", "no NVIDIA driver is loaded"),
    "architecture": ("CUDA_ON_CPU_NO_KERNEL_IMAGE", "1", "7.0 of CUDA device 0: rebuild with FUSED_CUDA_ARCHS=70"),
}


@pytest.fixture
def machine(kernels: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One with a CUDA build of torch and of this package, Triton, and one device."""
    for module in (backends, cuda):
        monkeypatch.setattr(module, "extension", kernels.extension)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(info, "_gpus", list)
    monkeypatch.setattr(backends, "find_spec", lambda name, package=None: object())
    forget()
    yield
    forget()


def forget() -> None:
    """What is looked up, and said, once in a process."""
    cuda._device_problem.cache_clear()
    backends._warn_once.cache_clear()
    backends._has_kernels.cache_clear()


@pytest.fixture(params=PRETENCES)
def reason(request: pytest.FixtureRequest, machine: None) -> Iterator[str]:
    """Why the kernels cannot be used."""
    variable, value, text = PRETENCES[request.param]
    libc = ctypes.CDLL(None)  # os.environ reaches C's getenv only where it is changed through Python
    libc.setenv(variable.encode(), value.encode(), 1)
    yield text
    libc.unsetenv(variable.encode())


def test_nothing_is_said_where_they_can(machine: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(DEVICE, None) == "cuda"
        assert backends.choose(DEVICE, None, "adafactor") == "cuda"


def test_triton_serves_and_one_line_says_why(reason: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kernels in ("", "", "adafactor"):
            assert backends.choose(DEVICE, None, kernels) == "triton"
    (warning,) = caught
    line = str(warning.message)
    assert "\n" not in line and line.startswith("fused: parameters on cuda:0 are updated by the triton backend (cuda: ")
    assert reason in line


def test_one_that_is_asked_for_raises(reason: str) -> None:
    with pytest.raises(RuntimeError, match="backend='cuda' is not available") as caught:
        backends.choose(DEVICE, "cuda")
    assert reason in str(caught.value)


def test_info_explains(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = info.collect()
    assert not facts["backends"]["cuda"]["available"] and reason in facts["backends"]["cuda"]["reason"]
    info._print_plain(facts)
    lines = capsys.readouterr().out.partition("\nBackends\n")[2].splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["cuda"]]
    assert line.split()[1] == "no" and reason in line


def test_the_reference_is_never_taken_in_silence(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._PROBLEMS, "triton", lambda device: "the package triton is not installed")
    with pytest.warns(RuntimeWarning, match="triton: the package triton is not installed"):
        assert backends.choose(DEVICE, None) == "reference"


def test_a_build_without_cuda_is_a_choice(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_cuda_is_built", lambda: False)
    monkeypatch.setitem(backends._PROBLEMS, "cuda", lambda device: "the CUDA kernels are not part of this build")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(DEVICE, None) == "triton"
