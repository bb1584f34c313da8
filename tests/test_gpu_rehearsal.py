"""What needs a GPU, run from the first line to the last on a pretended one (``pretended_gpu.py``)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu.build import compiler

TESTS = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("pybind11") is None or shutil.which(compiler()[0]) is None,
        reason="needs pybind11 and a C++ compiler",
    ),
]
BENCHMARKS = """
import sys
import pretended_gpu
pretended_gpu.install()
from benchmarks import goals, measure
from benchmarks.__main__ import main
from benchmarks.bandwidth import Bandwidth
from benchmarks.commands import host, kernel, run
from benchmarks.shapes import get_profile

run.measure_bandwidth = lambda *_: Bandwidth(1.0, 1.0, None, 1)
kernel.size_exponents, kernel.GPU_GRADIENTS, host.COUNTS = lambda *_: range(7, 8), ("3x64",), (1, 3)
goals.get_profile = lambda name: get_profile("1x8x8" if name == "gpt2" else "2x64")
ran = ["--seconds", "0.01", "--device", "cuda", "--out", sys.argv[1]]
for words in (
    "env", "step --opt adamw --shape 3x64 --vs torch.fused", "step --opt adafactor --shape 2x8x8 --vs torch.foreach",
    "pipeline --shape 3x64", "kernel --what size,gradient", "host --vs none",
    "memory --opt adamw --profile 1x64x64 --vs none",
):
    assert main([*words.split(), *ran]) == 0, words
main(["targets", *ran])
"""


def run(*command: str) -> str:
    # The package under test before the one beside the tests; the benchmarks are beside them only.
    paths = [str(TESTS), *sys.path, str(TESTS.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.run([sys.executable, *command], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    return process.stdout


def test_the_tests_that_need_a_gpu() -> None:
    few = "cuda and AdamW or cuda and same_bits and (float32 or int8) or cuda and stream"
    output = run("-m", "pytest", "-p", "pretended_gpu", "-q", "-p", "no:cacheprovider", "test_gpu.py", "-k", few)
    assert " passed" in output and "skipped" not in output


def test_a_tensor_left_on_the_cpu_is_noticed() -> None:
    program = "import pretended_gpu, torch; pretended_gpu.install(); torch.ones(3, device='cuda') + torch.ones(3)"
    with pytest.raises(AssertionError, match="same device"):
        run("-c", program)


def test_benchmarks(tmp_path: Path) -> None:
    output = run("-c", BENCHMARKS, str(tmp_path))
    assert "not available" not in output.split("Goals")[1].split("met,")[0] and "FAILED" not in output
