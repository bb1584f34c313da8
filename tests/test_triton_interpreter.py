"""The Triton kernels without a GPU: the same cases as every backend, played by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fused import backends

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not there"),
]


def run_interpreted(name: str, selection: str) -> None:
    """In a process of its own: TRITON_INTERPRET must be set before the kernels are defined."""
    tests = Path(__file__).with_name(name)
    path = os.pathsep.join(sys.path)  # to the package under test, which need not be the one beside the tests
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(tests)]
    command += ["-k", selection]
    result = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("name", ["triton_interpreted.py", "triton_adafactor_interpreted.py"])
def test_kernels_in_the_interpreter(name: str) -> None:
    run_interpreted(name, "not planted")


@pytest.mark.slow
def test_planted_defects_are_found() -> None:
    run_interpreted("triton_adafactor_interpreted.py", "planted")
