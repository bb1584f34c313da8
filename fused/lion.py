"""Lion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .optimizer import EngineOptions, FusedOptimizer
from .rules import RULES, Rule
from .validation import check_betas, check_implementation, check_lr, check_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(FusedOptimizer):
    r"""Lion: steps of one size, in the sign of an averaged gradient.

    .. math::
        u_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
        p_t &= (1 - \eta \lambda) \, p_{t-1} - \eta \, u_t, \qquad m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16, float16 or complex.
        lr: learning rate :math:`\eta`; the paper advises 3 to 10 times less than AdamW's.
        betas: decay rates of the average inside the sign, and of the average kept.
        weight_decay: :math:`\lambda`, decoupled, applied to the old parameter; the paper advises 3 to 10 times AdamW's.
        maximize: ascend instead of descend.
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        capturable: accepted for torch.optim's sake; chooses nothing.
        differentiable: run in torch operations under autograd.
        fused: accepted for torch.optim's sake; chooses nothing.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        ``exp_avg``.

    Numerics:
        float32 arithmetic (float64 for float64). sign(0) is 0: where nothing has come in, nothing moves but the decay;
        NaN stays NaN.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.Lion(model.parameters(), lr=1e-4, weight_decay=1.0)

    Reference:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_lr(lr, foreach=foreach, capturable=capturable)
        check_betas(betas, foreach=foreach, capturable=capturable)
        check_nonnegative(weight_decay=weight_decay)
        check_implementation(foreach, fused, differentiable)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["lion"]
