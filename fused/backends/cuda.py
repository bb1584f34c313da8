"""The CUDA C++ kernels: one launch updates every tensor of a rule, whatever the groups, dtypes and sizes.

Launches per step: a prologue (step counts, constants, whether to skip) and the update; before them, with clipping or
``skip_nonfinite``, one read of the gradients. Tables are written to the device only where an address changed.
Nothing is read back and nothing is allocated once the tables stand, so a step can be captured into a CUDA graph; a
graph keeps the hyperparameters of the step that was captured, but for those that are tensors on the device.

``FUSED_CUDA_DEBUG=1`` checks every address before, and every launch after it is made, and names what failed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plan import Control
from . import build_note, extension
from .cpu import step_control
from .table import TableBatch, capturing

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer

_DLPACK_DEVICE_TYPE = 2
"""CUDA, in DLPack's numbering."""


def problem() -> str:
    """Why the kernels cannot be used here; empty if they can."""
    if extension is None or not extension.with_cuda:
        return f"the CUDA kernels are not part of this build: {build_note('cuda_skipped') or 'it says nothing of them'}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _device_problem(-1)


def device_problem(device: torch.device) -> str:
    """Why the kernels cannot be used on one device; empty if they can."""
    return problem() or _device_problem(_index(device))


@cache
def _device_problem(index: int) -> str:
    """Looked up once: it starts CUDA. A negative index asks for the current device."""
    if index >= 0:
        return str(extension.cuda_problem(index))
    if not torch.cuda.is_available():
        return str(extension.cuda_problem(0)) or "torch.cuda.is_available() is False"
    return str(extension.cuda_problem(torch.cuda.current_device()))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


class Batch(TableBatch):
    """Parameters on one CUDA device."""

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: list[int]) -> None:
        super().__init__(optimizer, device, indices)
        index = _index(device)
        self.table.read_on_device(_DLPACK_DEVICE_TYPE, index)
        self.device_table = self._device_table(index)
        self.generation = -1
        self.rows_seen = -1
        self.stream = 0
        self.total = torch.zeros(2, dtype=torch.float64, device=device)

    def refresh(self) -> bool:
        """Brings the tables up to date, the device's too; see :class:`fused.plan.Batch`."""
        if not super().refresh():
            return False
        if extension.cuda_debugging():
            self._check_addresses()
        self.stream = _stream(self.device)
        changed = self.table.generation != self.generation
        if self.rows_seen != self.table.active_generation:
            self.row_values.zero_()  # of a row that lost its gradient nothing may stay
            self.rows_seen = self.table.active_generation
        try:
            self._begin(changed)
        except RuntimeError as error:
            if "cudaErrorMemoryAllocation" not in str(error) or capturing(self.device):
                raise
            torch.cuda.empty_cache()  # torch keeps what has been freed, until others ask for memory through it
            self._begin(True)
        self.generation = self.table.generation
        if self.device_table.captured:
            # A graph reads this table whenever it is replayed: it lives as long as the optimizer, as the state does.
            self.optimizer.__dict__.setdefault("_captured_tables", set()).add(self.device_table)
        return True

    def _device_table(self, index: int) -> Any:
        return extension.DeviceTable(index)

    def _begin(self, changed: bool) -> None:
        self.device_table.begin(self.table, changed, self.stream)

    def _bad_row(self) -> tuple[int, str]:
        row: tuple[int, str] = self.device_table.bad_row(self.table)
        return row

    def _check_addresses(self) -> None:
        index, what = self._bad_row()
        if index >= 0:
            raise RuntimeError(f"{self._name(index)}: {what}")

    def reduce(self, norm_type: float) -> Tensor:
        """One read of the gradients; see :class:`fused.plan.Batch`."""
        maximum = norm_type == float("inf")
        self.device_table.reduce(self.stream, maximum, self.row_values.data_ptr(), self.total.data_ptr())
        return self.total

    def update(self, control: Control) -> None:
        """The optimizer step; see :class:`fused.plan.Batch`."""
        self.device_table.update(self.table, self.stream, step_control(control))
        self._finish()
