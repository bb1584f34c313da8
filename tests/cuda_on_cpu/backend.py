"""The CUDA backend with CPU tensors: its Python as it is, its kernels played by the runtime beside this file."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from .build import load

FORWARD, REVERSE, RANDOM = 0, 1, 12345
"""Orders in which threads and blocks run; any other number is a seed too."""


class CudaOnCpu:
    """One build of the kernels."""

    def __init__(self, path: Path) -> None:
        self.extension = load(path, "cuda_on_cpu")
        self.runtime = ctypes.CDLL(str(path))

    def order(self, which: int) -> None:
        """Sets the order in which blocks and threads run."""
        self.runtime.cuda_on_cpu_order(which)

    def begin_capture(self) -> None:
        """Launches on the current stream are kept instead of run."""
        self.runtime.cuda_on_cpu_begin_capture()

    def end_capture(self) -> int:
        """The number of launches captured."""
        return int(self.runtime.cuda_on_cpu_end_capture())

    def replay(self) -> None:
        """Runs what was captured."""
        assert self.runtime.cuda_on_cpu_replay() == 0

    def refuse_memory(self, calls: int) -> None:
        """The next calls for memory find none."""
        self.runtime.cuda_on_cpu_refuse_memory(calls)

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has every optimizer step through these kernels, unless it asks for another backend by name."""
        import fused.backends as backends
        from fused.backends import cpu, cpu_adafactor, cuda, cuda_adafactor, factored_table, table

        def choose(device: torch.device, requested: str | None, kernels: str = "") -> str:
            return requested or "cuda"

        for module in (backends, cpu, cpu_adafactor, cuda, cuda_adafactor, factored_table, table):
            monkeypatch.setattr(module, "extension", self.extension)
        monkeypatch.setattr(backends, "choose", choose)
        monkeypatch.setattr(cuda, "_DLPACK_DEVICE_TYPE", 1)
        monkeypatch.setattr(cuda, "_index", lambda device: 0)
        monkeypatch.setattr(cuda, "_stream", lambda device: 0)
        self.order(FORWARD)


def device_table(optimizer: Any) -> Any:
    """The device's tables of an optimizer that has stepped on one device."""
    (batch,) = optimizer._plan.batches
    return batch.device_table
