"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arguments import check_number
from .optimizer import EngineOptions, FusedOptimizer
from .rules import RULES, Rule
from .validation import check_implementation, check_lr, check_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent, with momentum if asked for.

    .. math::
        b_1 = g_1, \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t, \qquad
        p_t = p_{t-1} - \eta \, (g_t + \mu b_t \text{ if nesterov else } b_t)

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16, float16 or complex.
        lr: learning rate :math:`\eta`, a number or a one-element tensor.
        momentum: :math:`\mu`; 0 keeps no state.
        dampening: :math:`\tau`, of the gradient entering the buffer after the first step.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead by one step of momentum.
        maximize: ascend instead of descend.
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        differentiable: run in torch operations under autograd.
        fused: accepted for torch.optim's sake; chooses nothing.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        ``momentum_buffer`` if ``momentum`` is not 0; also ``step`` where the first step has to be known, that is with
        dampening, and with stochastic rounding.

    Numerics:
        float32 arithmetic (float64 for float64), in torch.optim's order of operations: results within a few ulp each.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    Reference:
        Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_lr(lr)
        check_number("dampening", dampening)
        check_nonnegative(momentum=momentum, weight_decay=weight_decay)  # type: ignore[arg-type]
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening, got momentum={momentum} and {dampening=}"
            )
        check_implementation(foreach, fused, differentiable)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    _rule_options = ("momentum",)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["sgd_momentum" if group["momentum"] != 0 else "sgd"]

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        dampened = group["momentum"] != 0 and group["dampening"] != 0
        return bool(dampened or group["stochastic_rounding"])
