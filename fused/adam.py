"""Adam and AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .optimizer import EngineOptions, FusedOptimizer
from .rules import RULES, Rule
from .validation import check_betas, check_implementation, check_lr, check_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adam(FusedOptimizer):
    r"""Adam: steps of the averaged gradient over the root of the averaged squared gradient.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\eta}{1 - \beta_1^t} \, \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16, float16 or complex.
        lr: learning rate :math:`\eta`, a number or a one-element tensor.
        betas: decay rates of the two averages.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient; with ``decoupled_weight_decay`` the parameter shrinks by
            ``lr * weight_decay`` instead.
        amsgrad: divide by the largest second moment so far (arXiv:1904.09237).
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        maximize: ascend instead of descend.
        capturable: accepted for torch.optim's sake; chooses nothing.
        differentiable: run in torch operations under autograd.
        fused: accepted for torch.optim's sake; chooses nothing.
        decoupled_weight_decay: see ``weight_decay``.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        ``step`` (float32, no dimensions), ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` ``max_exp_avg_sq``.

    Numerics:
        float32 arithmetic (float64 for float64), in torch.optim's order of operations: results within a few ulp each.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.Adam(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(batch).backward()
        >>> optimizer.step()

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, Algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_lr(lr, foreach=foreach, capturable=capturable)
        check_nonnegative(eps=eps)
        check_betas(betas, foreach=foreach, capturable=capturable)
        check_nonnegative(weight_decay=weight_decay)
        check_implementation(foreach, fused, differentiable)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    _rule_options = ("amsgrad",)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return RULES["adam_amsgrad" if group["amsgrad"] else "adam"]


class AdamW(Adam):
    r"""AdamW: Adam whose weight decay shrinks the parameter itself.

    .. math::
        p_t = (1 - \eta \lambda) \, p_{t-1}
              - \frac{\eta}{1 - \beta_1^t} \, \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Args:
        params: as :class:`Adam`.
        lr: as :class:`Adam`.
        betas: as :class:`Adam`.
        eps: as :class:`Adam`.
        weight_decay: :math:`\lambda`, applied to the old parameter, times the learning rate.
        amsgrad: as :class:`Adam`.
        maximize: as :class:`Adam`.
        foreach: as :class:`Adam`.
        capturable: as :class:`Adam`.
        differentiable: as :class:`Adam`.
        fused: as :class:`Adam`.
        **options: see :class:`fused.optimizer.FusedOptimizer`.

    State:
        As :class:`Adam`.

    Numerics:
        As :class:`Adam`.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a gradient is sparse; the message names its parameter.

    Example:
        >>> optimizer = fused.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, master_weights="split")

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state_dict of Adam, or from before the key was there
            group["decoupled_weight_decay"] = True
