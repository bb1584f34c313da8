"""Adafactor's tables: beside each tensor's row, where its second moment lies and in which matrices it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adafactor import check_supported
from ..factored import COL_VAR, HYPERS, ROW_VAR, VARIANCE, FactoredRule, Matrices, matrices_of
from ..rules import Hyper
from . import extension
from .table import TableBatch, same_strides

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer


class FactoredBatch(TableBatch):
    """Parameters laid out as matrices by rows; one in another layout is copied before and after the step."""

    hypers_by_rule: Sequence[Sequence[Hyper]] = (HYPERS,)

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: list[int]) -> None:
        super().__init__(optimizer, device, indices)
        self.factored = extension.FactoredTable(len(self.members))

    def _check(self, index: int) -> None:
        param = self.members[index][2]
        if param.grad is not None:
            check_supported(param, self._name(index))
        super()._check(index)

    def _matrices(self, index: int) -> Matrices | None:
        g, _, param = self.members[index]
        rule = self.rules[g]
        assert isinstance(rule, FactoredRule)
        return matrices_of(param.shape, rule)

    def _dense(self, index: int, value: Tensor) -> Tensor:
        matrices = self._matrices(index)
        if matrices is None:
            return super()._dense(index, value)
        if is_in_order(value, matrices.order):
            return value
        return matrices.empty(value.shape, value.dtype, value.device).copy_(value)

    def _bind_more(self, index: int, state: dict[str, Any], dense: Tensor) -> None:
        matrices = self._matrices(index)
        rule = self.rules[self.members[index][0]]
        assert isinstance(rule, FactoredRule)
        if matrices is None:
            variance = state[VARIANCE] = _strided_as(state[VARIANCE], dense)
            self.factored.bind(index, 0, 0, variance.data_ptr(), 1, 1, dense.numel(), rule.flags)
            return
        for key in (ROW_VAR, COL_VAR):
            if not is_in_order(state[key], matrices.order):
                state[key] = matrices.empty(state[key].shape, state[key].dtype, state[key].device).copy_(state[key])
        row_var, col_var = (state[key].data_ptr() for key in (ROW_VAR, COL_VAR))
        self.factored.bind(index, row_var, col_var, 0, matrices.lead, matrices.rows, matrices.cols, rule.flags)


def is_in_order(tensor: Tensor, order: Sequence[int]) -> bool:
    """Whether memory holds the elements with the dimensions in ``order``, without gaps."""
    return tensor.permute(*order).is_contiguous()


def _strided_as(value: Tensor, like: Tensor) -> Tensor:
    return value if same_strides(value, like) else torch.empty_like(like, dtype=value.dtype).copy_(value)
