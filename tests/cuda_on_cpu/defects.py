"""Builds with a defect planted, to show that the tests find it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from .backend import CudaOnCpu
from .build import build

Defect = tuple[str, str, str]
"""Name of a source file, a place in it, and what is put there instead."""


def check_found(
    test: str,
    name: str | None,
    defects: dict[str, Defect],
    select: Callable[[CudaOnCpu], None],
    patch: pytest.MonkeyPatch,
) -> None:
    """Runs ``select`` on a build with one defect, which has to raise; without a name, on a sound one.

    Args:
        test: node id of the calling test: it is run in a process of its own, as builds that are loaded into one would
            share what carries the same name.
    """
    if "CUDA_ON_CPU_ALONE" not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        environment = {**os.environ, "CUDA_ON_CPU_ALONE": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        crashed = name is not None and result.returncode < 0  # as stray writes may have it
        assert crashed or result.returncode == 0, result.stdout[-3000:]
        return
    if name is None:
        kernels = CudaOnCpu(build())
        kernels.serve(patch)
        select(kernels)
        return
    file, good, bad = defects[name]

    def plant(source: str, text: str) -> str:
        if source != file:
            return text
        assert text.count(good) == 1, f"{file} has no such place any more"
        return text.replace(good, bad)

    kernels = CudaOnCpu(build(planted=(name, plant)))
    kernels.serve(patch)
    with pytest.raises((AssertionError, RuntimeError)):
        select(kernels)
