"""The C++ kernels on the CPU: one parallel region for the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import Control
from . import extension
from .table import TableBatch


class Batch(TableBatch):
    """Parameters on the CPU."""

    def reduce(self, norm_type: float) -> Tensor:
        """One read of the gradients; see :class:`fused.plan.Batch`."""
        total = torch.empty(2, dtype=torch.float64, device=self.device)
        extension.reduce_cpu(self.table, norm_type == float("inf"), self.row_values.data_ptr(), total.data_ptr())
        return total

    def update(self, control: Control) -> None:
        """The optimizer step; see :class:`fused.plan.Batch`."""
        extension.update_cpu(self.table, step_control(control))
        self._finish()


def step_control(control: Control) -> Any:
    """The kernels' form of a step's control: addresses and numbers."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return extension.StepControl(
        address(control.norm_total),
        address(control.grad_scale),
        address(control.found_inf),
        address(control.grad_norm),
        address(control.skipped),
        -1.0 if control.max_norm is None else control.max_norm,
        control.grad_multiplier,
        control.seed,
        control.norm_type == float("inf"),
        control.skip_nonfinite,
        address(control.unscale),
    )
