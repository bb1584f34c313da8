"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import state as state_storage
from .optimizer import EngineOptions, FusedOptimizer
from .rules import RULES, Rule
from .validation import check_implementation, check_lr, check_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adagrad(FusedOptimizer):
    r"""Adagrad: steps of the gradient over the root of the sum of all its squares.

    .. math::
        s_t = s_{t-1} + g_t^2, \qquad
        p_t = p_{t-1} - \frac{\eta}{1 + (t - 1) \, \gamma} \, \frac{g_t}{\sqrt{s_t} + \epsilon}

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16, float16 or complex.
        lr: learning rate :math:`\eta`, a number or a one-element tensor.
        lr_decay: :math:`\gamma`.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: :math:`s_0`.
        eps: added to the root.
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        maximize: ascend instead of descend.
        differentiable: run in torch operations under autograd.
        fused: accepted for torch.optim's sake; chooses nothing.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        ``step``, ``sum``; made at construction, as torch.optim does.

    Numerics:
        float32 arithmetic (float64 for float64), in torch.optim's order of operations: results within a few ulp each.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.Adagrad(model.parameters(), lr=1e-2)

    Reference:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods", JMLR 12 (2011), Figure 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_lr(lr)
        check_nonnegative(
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )
        check_implementation(foreach, fused, differentiable)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    state_storage.initialize(self, group, param)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["adagrad"]

    def _init_state(self, group: dict[str, Any], name: str, like: Tensor) -> Tensor:
        first = group["initial_accumulator_value"]
        return torch.full_like(like, complex(first, first) if like.is_complex() else first)

    def share_memory(self) -> None:
        """Moves the state to shared memory, for training from several processes."""
        for state in self.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
