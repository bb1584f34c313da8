"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arguments import check_number, check_pair
from .factored import (
    DECAY_SCALES,
    EPS1_MODES,
    FACTORED_DIMS,
    MOMENTS_OF,
    RULE_OPTIONS,
    FactoredRule,
    check_state,
    complete_state,
    matrices_of,
    rule_of,
)
from .optimizer import EngineOptions, FusedOptimizer
from .state import local

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adafactor(FusedOptimizer):
    r"""Adafactor: adaptive steps from a second moment of one number per row and one per column.

    .. math::
        R_t &= \beta_{2t} R_{t-1} + (1 - \beta_{2t}) \, \overline{G_t^2}^{\,\mathrm{cols}}, \quad
        C_t = \beta_{2t} C_{t-1} + (1 - \beta_{2t}) \, \overline{G_t^2}^{\,\mathrm{rows}}, \quad
        \beta_{2t} = 1 - t^{\tau} \\
        \hat V_t &= \frac{R_t C_t}{\max(\overline{R_t}, \epsilon_1)}, \quad
        U_t = \frac{G_t}{\max(\sqrt{\hat V_t}, \epsilon_1)}, \quad
        \rho_t = \min\left(\eta, \tfrac{1}{\sqrt t}\right), \quad
        \alpha_t = \rho_t \max(\epsilon_2, \mathrm{RMS}(P_{t-1})) \\
        P_t &= (1 - \eta \lambda) P_{t-1} - \frac{\alpha_t}{\max(1, \mathrm{RMS}(U_t) / d)} U_t

    The defaults are torch.optim.Adafactor's; the arguments after ``maximize`` choose among the published variants:

    ==========================  ===========  =====================  ===================  =====================
    argument                    torch.optim  Hugging Face           T5X                  Big Vision
    ==========================  ===========  =====================  ===================  =====================
    ``relative_step``           True         its ``relative_step``  False                False
    ``warmup_init``             False        its ``warmup_init``    False                False
    ``scale_parameter``         True         ``scale_parameter``    True                 False
    ``beta2_decay``             -0.8         ``decay_rate``         -0.8                 -0.8
    ``beta2_cap``               1.0          1.0                    1.0                  0.999
    ``eps``                     (None,1e-3)  (1e-30, 1e-3)          (1e-30, 1e-3)        (1e-30, 0)
    ``eps1_mode``               "clamp"      "add"                  "add"                "add"
    ``d``                       1.0          ``clip_threshold``     1.0                  None
    ``beta1``                   None         ``beta1``              None                 0.9
    ``moment_of``               n/a          "step"                 "step"               "update"
    ``decay_scale``             "lr"         "step"                 "none"               "lr" (wd / peak lr)
    ``factored_dims``           "last"       "last"                 "largest"            "largest"
    ``min_dim_size_to_factor``  0            0                      128                  32
    ==========================  ===========  =====================  ===================  =====================

    :meth:`from_hf_kwargs` takes Hugging Face's arguments as they are.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either; any shapes and strides; float32, float64,
            bfloat16 or float16.
        lr: :math:`\eta`, a number or a one-element tensor: the largest relative step, or, without ``relative_step``,
            the step itself.
        beta2_decay: :math:`\tau`, at most 0.
        eps: :math:`(\epsilon_1, \epsilon_2)`. None for the first is the machine epsilon of each parameter's own
            arithmetic: float64's for float64 parameters, else float32's, whatever the parameter is stored in.
            (torch.optim takes the epsilon of the first parameter's dtype for all: with bfloat16's, small gradients
            hardly move anything.)
        d: clipping threshold of the update's root mean square, at least 1; None: no clipping.
        weight_decay: :math:`\lambda`, decoupled.
        foreach: accepted for torch.optim's sake; chooses nothing, the step is always fused.
        maximize: ascend instead of descend.
        relative_step: :math:`\rho_t = \min(\eta, 1 / \sqrt t)`; False: :math:`\rho_t = \eta`.
        warmup_init: let :math:`\rho_t` also be at most :math:`10^{-6} t`. Needs ``relative_step``.
        scale_parameter: multiply the step by :math:`\max(\epsilon_2, \mathrm{RMS}(P_{t-1}))`.
        beta2_cap: upper bound of :math:`\beta_{2t}`, in [0, 1].
        eps1_mode: ``"clamp"``: :math:`\epsilon_1` bounds the estimate from below, as above; ``"add"``: it is added to
            :math:`G_t^2`, as in the paper.
        beta1: decay rate of a first moment, in [0, 1); None: there is none.
        moment_of: ``"step"``: the first moment averages steps :math:`\alpha_t \hat U_t`; ``"update"``: it averages
            clipped updates, and is multiplied by :math:`\alpha_t` after.
        decay_scale: ``"lr"``: decay by :math:`\eta \lambda`; ``"step"``: by :math:`\alpha_t \lambda`; ``"none"``: by
            :math:`\lambda`.
        factored_dims: ``"last"``: the last two dimensions are rows and columns; ``"largest"``: the two largest are,
            which suits convolutions, at the price of a copy of parameter and gradient in each step where they are not
            the last. Each matrix over the other dimensions has its own rows and columns; clipping and scaling take the
            tensor as a whole.
        min_dim_size_to_factor: tensors whose rows or columns are fewer keep a full second moment.
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.
            ``state_dtype`` is the first moment's.

    State:
        ``step``; of tensors with two dimensions and more ``row_var`` (the last dimension 1) and ``col_var`` (the last
        but one 1), of others ``variance``, all in float32 (float64 for float64); with ``beta1`` also ``exp_avg``.

    Numerics:
        float32 arithmetic (float64 for float64), sums of squares in float64 in a fixed order: the same bits for any
        number of threads. Results differ from torch.optim's in float32 by the rounding of a few operations. A gradient
        is read three times, twice without clipping, a parameter twice; on the CPU a tensor that fits in cache travels
        from memory once.

    Raises:
        ValueError: a hyperparameter is out of range; the message has its name and value.
        RuntimeError: a parameter is complex or a DTensor, or a gradient sparse; the message names the parameter.

    Example:
        >>> optimizer = fused.Adafactor(model.parameters(), lr=1e-2, master_weights="split8")

    Reference:
        Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235, Algorithms
        4 and 5; Big Vision's variant: Zhai et al., arXiv:2106.04560, section 3.4.
    """

    _kernels = "adafactor"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float | None = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        relative_step: bool = True,
        warmup_init: bool = False,
        scale_parameter: bool = True,
        beta2_cap: float = 1.0,
        eps1_mode: str = "clamp",
        beta1: float | None = None,
        moment_of: str = "step",
        decay_scale: str = "lr",
        factored_dims: str = "last",
        min_dim_size_to_factor: int = 0,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_pair("eps", eps)
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": tuple(eps),
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "scale_parameter": scale_parameter,
            "beta2_cap": beta2_cap,
            "eps1_mode": eps1_mode,
            "beta1": beta1,
            "moment_of": moment_of,
            "decay_scale": decay_scale,
            "factored_dims": factored_dims,
            "min_dim_size_to_factor": min_dim_size_to_factor,
        }
        _check_options(defaults)
        super().__init__(params, defaults, **options)

    @classmethod
    def from_hf_kwargs(
        cls,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **options: Any,
    ) -> Adafactor:
        """An Adafactor that steps as ``transformers.Adafactor`` does, from that class's arguments.

        Args:
            params: parameters, named parameters, or groups of either.
            lr: step size; None with ``relative_step``.
            eps: added to the squared gradient; smallest scale of a parameter.
            clip_threshold: clipping threshold of the update, at least 1.
            decay_rate: exponent of the decay of the second moment.
            beta1: decay rate of a first moment; None: there is none.
            weight_decay: decoupled, multiplied by the step size.
            scale_parameter: multiply the step by the root mean square of the parameter.
            relative_step: take ``min(1e-2, 1 / sqrt(t))`` as step size.
            warmup_init: with ``relative_step``: ``min(1e-6 * t, 1 / sqrt(t))``.
            **options: of this class and of :class:`fused.optimizer.FusedOptimizer`.

        Raises:
            ValueError: the arguments contradict each other, or one is out of range.

        Example:
            >>> optimizer = fused.Adafactor.from_hf_kwargs(
            ...     model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
        """
        if lr is not None and relative_step:
            raise ValueError("Cannot combine manual `lr` and `relative_step=True` options")
        if lr is None and not relative_step:
            raise ValueError("lr=None needs relative_step=True")
        return cls(
            params,
            lr=1e-2 if lr is None else lr,
            beta2_decay=decay_rate,
            eps=eps,
            d=clip_threshold,
            weight_decay=weight_decay,
            relative_step=relative_step,
            warmup_init=warmup_init,
            scale_parameter=scale_parameter,
            eps1_mode="add",
            beta1=beta1,
            decay_scale="step",
            **options,
        )

    _rule_options = RULE_OPTIONS

    def _rule(self, group: dict[str, Any]) -> FactoredRule:
        return rule_of(group)

    def _init_state(self, group: dict[str, Any], name: str, like: Tensor) -> Tensor:
        matrices = matrices_of(like.shape, rule_of(group))
        if matrices is None:
            return super()._init_state(group, name, like)
        return matrices.empty(like.shape, like.dtype, like.device).zero_()

    def _check_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        check_state(rule_of(group), param, state, f"a parameter of shape {tuple(param.shape)}")

    def _complete_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        complete_state(rule_of(group), param, state, f"a parameter of shape {tuple(param.shape)}")


def check_supported(param: Tensor, name: str) -> None:
    """Raises where a parameter has no Adafactor step; ``name`` is how the message calls it."""
    if param.is_complex():
        raise RuntimeError(f"Adafactor does not support complex parameters ({name} is {param.dtype})")
    if local(param) is not param:
        raise RuntimeError(
            f"Adafactor does not support DTensor parameters ({name}): "
            "their row and column means would need sums over the shards"
        )


_NUMBERS = ("lr", "beta2_decay", "eps[1]", "weight_decay", "beta2_cap", "min_dim_size_to_factor")
_NUMBERS_OR_NONE = ("eps[0]", "d", "beta1")


def _check_options(options: dict[str, Any]) -> None:
    """Raises where a value is out of range, with torch.optim's messages where it has one."""
    lr, eps = options["lr"], options["eps"]
    for name, value in (*options.items(), ("eps[0]", eps[0]), ("eps[1]", eps[1])):
        if name in _NUMBERS or (name in _NUMBERS_OR_NONE and value is not None):
            check_number(name, value)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not (isinstance(lr, Tensor) and lr.is_cuda) and not lr >= 0.0:  # reading it would wait for the device
        raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
    ranges: tuple[tuple[Any, str, Callable[[Any], bool]], ...] = (
        (options["beta2_decay"], "beta2_decay should be <= 0", lambda x: x <= 0.0),
        (eps[0], "epsilon1 should be >= 0", lambda x: x is None or x >= 0.0),
        (eps[1], "epsilon2 should be >= 0", lambda x: x >= 0.0),
        (options["d"], "Clipping threshold d should be >= 1", lambda x: x is None or x >= 1.0),
        (options["weight_decay"], "weight_decay should be >= 0", lambda x: 0.0 <= x < math.inf),
        (options["beta1"], "beta1 should be in [0, 1) or None", lambda x: x is None or 0.0 <= x < 1.0),
        (options["beta2_cap"], "beta2_cap should be in [0, 1]", lambda x: 0.0 <= x <= 1.0),
        (options["min_dim_size_to_factor"], "min_dim_size_to_factor should be >= 0", lambda x: x >= 0),
        (options["eps1_mode"], f"eps1_mode should be one of {EPS1_MODES}", EPS1_MODES.__contains__),
        (options["moment_of"], f"moment_of should be one of {MOMENTS_OF}", MOMENTS_OF.__contains__),
        (options["decay_scale"], f"decay_scale should be one of {DECAY_SCALES}", DECAY_SCALES.__contains__),
        (options["factored_dims"], f"factored_dims should be one of {FACTORED_DIMS}", FACTORED_DIMS.__contains__),
    )
    for value, requirement, holds in ranges:
        if not holds(value):
            raise ValueError(f"{requirement} but is: {value}")
    if options["warmup_init"] and not options["relative_step"]:
        raise ValueError("`warmup_init=True` requires `relative_step=True`")
