"""Adadelta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arguments import check_number
from .optimizer import EngineOptions, FusedOptimizer
from .rules import RULES, Rule
from .validation import check_lr, check_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adadelta(FusedOptimizer):
    r"""Adadelta: steps in the units of the parameter, from averages of squared gradients and squared steps.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \qquad
        \Delta_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} \, g_t, \qquad
        u_t = \rho u_{t-1} + (1 - \rho) \Delta_t^2, \qquad p_t = p_{t-1} - \eta \, \Delta_t

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16, float16 or complex.
        lr: factor :math:`\eta` of the step, a number or a one-element tensor.
        rho: decay rate of the averages, in [0, 1].
        eps: added under both roots.
        weight_decay: L2 penalty, added to the gradient.
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        capturable: accepted for torch.optim's sake; chooses nothing.
        maximize: ascend instead of descend.
        differentiable: run in torch operations under autograd.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        ``step``, ``square_avg``, ``acc_delta``.

    Numerics:
        float32 arithmetic (float64 for float64), in torch.optim's order of operations: results within a few ulp each.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.Adadelta(model.parameters())

    Reference:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701, Algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_lr(lr)
        check_number("rho", rho)
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"Invalid rho value: {rho}")
        check_nonnegative(eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["adadelta"]
