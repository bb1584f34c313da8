"""Adafactor's CUDA C++ kernels: three launches for the whole model, four where gradients are clipped by their norm.

The first reads gradients and parameters and leaves the second moments, the second measures the updates where they are
clipped, the third applies them; step counts, hyperparameters and whether to skip are looked up by the first. As for the
other kernels, nothing is read back and nothing allocated once the tables stand.
"""

from __future__ import annotations

from typing import Any

from . import cuda, extension
from .factored_table import FactoredBatch


class Batch(FactoredBatch, cuda.Batch):
    """Parameters on one CUDA device."""

    def _device_table(self, index: int) -> Any:
        return extension.AdafactorTable(index)

    def _begin(self, changed: bool) -> None:
        self.device_table.begin(self.table, self.factored, changed, self.stream)

    def _bad_row(self) -> tuple[int, str]:
        row: tuple[int, str] = self.device_table.bad_row(self.table, self.factored)
        return row
