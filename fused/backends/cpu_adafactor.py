"""Adafactor's C++ kernels on the CPU: one parallel region for the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..plan import Control
from . import cpu, extension
from .factored_table import FactoredBatch

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer


class Batch(FactoredBatch, cpu.Batch):
    """Parameters on the CPU."""

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: list[int]) -> None:
        super().__init__(optimizer, device, indices)
        self.workspace = extension.AdafactorWorkspace()

    def update(self, control: Control) -> None:
        """The optimizer step; see :class:`fused.plan.Batch`."""
        extension.update_adafactor_cpu(self.table, self.factored, cpu.step_control(control), self.workspace)
        self._finish()
