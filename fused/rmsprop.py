"""RMSprop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .optimizer import EngineOptions, FusedOptimizer
from .rules import RULES, Rule
from .validation import check_lr, check_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RMSprop(FusedOptimizer):
    r"""RMSprop: steps of the gradient over the root of its averaged square.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t \, [- \bar g_t^2]} + \epsilon}, \qquad p_t = p_{t-1} - \eta \, b_t

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16, float16 or complex.
        lr: learning rate :math:`\eta`, a number or a one-element tensor.
        alpha: decay rate of the averages.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient.
        momentum: :math:`\mu`.
        centered: subtract the square of the averaged gradient :math:`\bar g`, leaving an estimate of the variance.
        capturable: accepted for torch.optim's sake; chooses nothing.
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        maximize: ascend instead of descend.
        differentiable: run in torch operations under autograd.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        ``step``, ``square_avg``, if ``centered`` ``grad_avg``, if ``momentum`` is above 0 ``momentum_buffer``.

    Numerics:
        float32 arithmetic (float64 for float64), in torch.optim's order of operations: results within a few ulp each,
        but where ``centered`` cancels digits: there the difference of the two averages is as exact as float32 has it.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)

    Reference:
        Tieleman and Hinton, "Lecture 6.5", COURSERA 2012; centered: Graves, arXiv:1308.0850, equations 38 to 45.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_lr(lr)
        check_nonnegative(eps=eps, momentum=momentum, weight_decay=weight_decay, alpha=alpha)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    _rule_options = ("centered", "momentum")

    def _rule(self, group: dict[str, Any]) -> Rule:
        name = "rmsprop" + ("_centered" if group["centered"] else "") + ("_momentum" if group["momentum"] > 0 else "")
        return RULES[name]
