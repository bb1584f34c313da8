"""The base class of every optimizer: torch.optim's contract around the engine's step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks

from . import memory
from . import state as state_storage
from .arguments import check_flag, check_number
from .memory import Memory
from .plan import Plan
from .precision import Storage, parse_master_weights, parse_state_dtype
from .rules import Rule

if TYPE_CHECKING:
    from .accumulate import GradientAccumulator

KEPT_OPTIONS = ("master_weights", "state_dtype")
"""Options of a live group that a loaded ``state_dict`` does not replace: what was saved is converted instead."""

FLAGS = (
    "amsgrad", "capturable", "centered", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize",
    "nesterov", "relative_step", "scale_parameter", "warmup_init",
)  # fmt: skip
"""Options of the rules that are true or false; None is false."""

OPTIMIZER_OPTIONS = ("seed", "max_grad_norm", "norm_type", "skip_nonfinite", "amp_scaling", "backend")
"""Options of the engine that hold for the whole optimizer."""

BACKENDS = ("cuda", "triton", "cpu", "reference")


class EngineOptions(TypedDict, total=False):
    """Keyword options that every optimizer takes; :class:`FusedOptimizer` documents them."""

    master_weights: str | None
    state_dtype: torch.dtype | str | None
    stochastic_rounding: bool
    seed: int
    max_grad_norm: float | None
    norm_type: float
    skip_nonfinite: bool
    amp_scaling: bool
    backend: str | None


class FusedOptimizer(Optimizer):
    r"""A ``torch.optim.Optimizer`` whose step updates the whole model at once.

    Subclasses name a rule; everything else (dtypes, master weights, clipping, skipping, layouts, backends) lives here
    and below, once.

    Args:
        params: parameters, named parameters, or groups of either.
        defaults: hyperparameters of the rule, torch.optim's keys.
        master_weights: how bfloat16 and float16 parameters keep a float32 master. None: they are all there is;
            ``"fp32"``: a float32 copy (+4 bytes); ``"split"``: a 16-bit remainder (+2 bytes; exactly float32 for
            bfloat16); ``"split8"``: an 8-bit remainder (+1 byte). May differ per group.
        state_dtype: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or ``"int8"`` (blocks of 32 with a scale);
            None: the parameter's dtype, float32 beside master weights. May differ per group.
        stochastic_rounding: round to a lower precision with the probability of the distance, reproducibly from
            ``seed``. May differ per group.
        seed: of the stochastic rounding.
        max_grad_norm: clip the global norm of all gradients (all groups, dtypes, devices and shards) to this; None: do
            not; ``inf``: measure it only. The norm costs one read of the gradients; the factor is applied during the
            update, ``p.grad`` is left as it is. Squares are added up in float64 on the CPU, within 4 * 2^-24 of their
            sum on a GPU, whatever their size, in an order that is the same in every run.
        norm_type: 2.0 or ``inf``.
        skip_nonfinite: skip the whole step, the step count included, where any gradient is infinite or NaN. The device
            decides; the host does not wait. Without it such gradients do what they do in torch.optim.
        amp_scaling: let ``torch.amp.GradScaler`` hand its scale to the step instead of unscaling the gradients itself.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None: the best for each parameter's device.

    Raises:
        ValueError: an option has no such value, or does not fit a parameter's dtype; the message names both.
    """

    _plan: Plan | None
    _grad_norm: Tensor | None
    _skipped: Tensor | None
    _unscale: Tensor | None
    _incoming_found_inf: Tensor | None
    _check_nonfinite: bool  # set for a step by a loss scaler
    _accumulator: GradientAccumulator | None

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        master_weights: str | None = None,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        backend: str | None = None,
    ) -> None:
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm)
            if not max_grad_norm >= 0.0:
                raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        check_number("norm_type", norm_type)
        check_number("seed", seed)
        for name, value in (
            *((name, defaults[name]) for name in FLAGS if name in defaults),
            ("stochastic_rounding", stochastic_rounding),
            ("skip_nonfinite", skip_nonfinite),
            ("amp_scaling", amp_scaling),
        ):
            check_flag(name, value)
        if float(norm_type) not in (2.0, float("inf")):
            raise ValueError(f"Invalid norm_type value: {norm_type}. Use 2.0 or inf")
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"Invalid backend value: {backend!r}. Use None or one of {BACKENDS}")
        if int(seed) != seed or not 0 <= int(seed) < 2**64:
            raise ValueError(f"Invalid seed value: {seed}. Use an integer in [0, 2**64)")
        group_options = {
            "master_weights": parse_master_weights(master_weights),
            "state_dtype": parse_state_dtype(state_dtype),
            "stochastic_rounding": bool(stochastic_rounding),
        }
        self._options: dict[str, Any] = {
            "seed": int(seed),
            "max_grad_norm": None if max_grad_norm is None else float(max_grad_norm),
            "norm_type": float(norm_type),
            "skip_nonfinite": bool(skip_nonfinite),
            "amp_scaling": bool(amp_scaling),
            "backend": backend,
        }
        self._reset_engine()
        super().__init__(params, {**defaults, **group_options})
        self.defaults.update(self._options)
        self._step_supports_amp_scaling = self._options["amp_scaling"]

    # ---- what a subclass says ----

    _kernels = ""
    """Name of the kernels that update this class where they are not the elementwise ones."""

    _rule_options: tuple[str, ...] = ()
    """Options of a parameter group on which its rule depends."""

    def _rule(self, group: dict[str, Any]) -> Rule:
        """The rule for a parameter group, by its ``_rule_options``."""
        raise NotImplementedError

    def _init_state(self, group: dict[str, Any], name: str, like: Tensor) -> Tensor:
        """First value of the state ``name``: zeros of ``like``'s dtype and layout."""
        return torch.zeros_like(like)

    def _complete_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Creates and converts state of other shapes than the parameter's; the rule's own is taken care of."""

    def _check_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Raises ValueError where saved state of other shapes than the parameter's does not fit."""

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        """Whether parameters of this group keep a step count."""
        return self._rule(group).counts_steps or bool(group["stochastic_rounding"])

    # ---- torch.optim's contract ----

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch.optim's wrapper of ``step``, which runs hooks and names the step for a profiler, where it has work.

        The name alone costs more than the update of a small model.
        """
        with_hooks = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def wrapper(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or optimizer_hooks._global_optimizer_pre_hooks
                or optimizer_hooks._global_optimizer_post_hooks
                or torch.compiler.is_compiling()
                or torch._C._autograd._profiler_enabled()
            ):
                return with_hooks(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return wrapper

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            compiling = torch.compiler.is_compiling()
            plan = Plan(self) if compiling or self._plan is None else self._plan
            if not compiling:  # a plan of torch operations is of no use to an eager step
                self._plan = plan
            if self._accumulator is None:
                plan.step()
            else:
                with self._accumulator._lent() as grad_multiplier:
                    plan.step(grad_multiplier)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: the group carries an option of the whole optimizer, or options that do not fit its parameters.
        """
        if isinstance(param_group, dict):
            for name in OPTIMIZER_OPTIONS:
                if name in param_group:
                    self._check_option_of_group(name, param_group[name])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in OPTIMIZER_OPTIONS:
            group.pop(name, None)
        try:
            group["state_dtype"] = parse_state_dtype(group["state_dtype"])
            storage = Storage.of(group)
            for index, param in enumerate(group["params"]):
                storage.check(param, parameter_name(group, index))
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_option_of_group(self, name: str, value: Any) -> None:
        """Raises unless the optimizer has the same value, as where ``ZeroRedundancyOptimizer`` repeats its arguments.

        That class gives each process an optimizer for a part of the parameters, which sees no other part's gradients.
        """
        if value != self._options[name]:
            raise ValueError(f"{name}={value!r} is an option of the whole optimizer, not of a group")
        if name in ("max_grad_norm", "skip_nonfinite") and value not in (None, False):
            raise ValueError(
                f"{name}={value!r} is an option of the whole optimizer, not of a group. Where ZeroRedundancyOptimizer "
                "divides the parameters between processes, none of them sees all gradients: clip before the step, "
                "with fused.clip_grad_norm_"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, as :meth:`torch.optim.Optimizer.state_dict`: groups, and state without copies.

        Remainders and the scales of 8-bit states, 16-bit integers in :attr:`state`, are pairs of bytes here, in a last
        dimension of their own, because no collective library carries such integers.
        """
        saved: dict[str, Any] = super().state_dict()
        if "state" not in saved:  # a hook has made something else of it
            return saved
        return {**saved, "state": {key: state_storage.saved_form(value) for key, value in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict`` of this class or of its counterpart in torch.optim.

        State keeps the dtype it was saved in, unless ``state_dtype`` asks for another. Where this optimizer has
        ``master_weights`` or ``state_dtype``, they stay and the state is converted to them (masters before the first
        step, so that model and optimizer may be loaded in any order); where it has None, the dictionary's are taken.

        Raises:
            ValueError: the groups do not match, or the state does not fit a parameter. Nothing has changed then.
        """
        handle = self.register_load_state_dict_pre_hook(_wrap_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        accumulator = self.__dict__.get("_accumulator")
        if "state" in state and "param_groups" in state:
            self._plan = None  # it holds on to the state until now
            replaced = self.__dict__.get("state", {})
            state = {**state, "state": state_storage.restore(self, state["state"], state["param_groups"], replaced)}
        super().__setstate__(state)
        self._options = {name: self.defaults[name] for name in OPTIMIZER_OPTIONS}
        self._step_supports_amp_scaling = self._options["amp_scaling"]
        self._reset_engine()
        self._accumulator = accumulator  # of this very object: a copy has none

    def _reset_engine(self) -> None:
        """Forgets what lives from step to step and is in no checkpoint."""
        self._plan = None
        self._grad_norm = self._skipped = self._unscale = None
        self._incoming_found_inf = None
        self._check_nonfinite = False
        self._accumulator = None

    # ---- what a step found out about its gradients ----

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients, unscaled and before clipping; None where they were not read for it.

        A copy without dimensions (float32) on the device of the first parameters; taking it waits for nothing.
        """
        return None if self._grad_norm is None else self._grad_norm.clone()

    def grad_norms(self) -> dict[str, Tensor]:
        """Norm of each parameter's gradient in the last step, from the same read as :attr:`grad_norm`.

        Returns:
            By the parameter's name, or ``"group.index"`` where its group has no names: float32 tensors without
            dimensions on the device, unscaled, before clipping; 0 where there was no gradient. Nothing waits.

        Raises:
            RuntimeError: the last step did not read its gradients for a norm.
        """
        return dict(zip(self._parameter_names(), self._norms_of(self._row_values()[:, 0]), strict=False))

    def group_norms(self) -> list[Tensor]:
        """Norm of each parameter group's gradients in the last step; as :meth:`grad_norms`.

        Raises:
            RuntimeError: the last step did not read its gradients for a norm.
        """
        rows = self._row_values()[:, 0]
        parts = rows.split([len(group["params"]) for group in self.param_groups])
        maximum = self._options["norm_type"] == float("inf")
        empty = rows.new_zeros(1)
        values = [torch.cat((part, empty)) for part in parts]
        return self._norms_of(torch.stack([value.amax() if maximum else value.sum() for value in values]))

    def find_nonfinite(self) -> list[str]:
        """Names of the parameters whose gradients held an infinity or NaN in the last step. Waits for the device.

        Raises:
            RuntimeError: the last step did not read its gradients for a norm.
        """
        bad = (self._row_values()[:, 1] != 0).tolist()
        return [name for name, is_bad in zip(self._parameter_names(), bad, strict=False) if is_bad]

    def _row_values(self) -> Tensor:
        rows = None if self._plan is None or self._unscale is None else self._plan.row_values
        if rows is None:
            raise RuntimeError(
                "the last step did not measure its gradients: set max_grad_norm (inf measures without clipping), "
                "skip_nonfinite=True, or step through fused.GradScaler"
            )
        return rows

    def _norms_of(self, values: Tensor) -> list[Tensor]:
        assert self._unscale is not None
        roots = values if self._options["norm_type"] == float("inf") else values.sqrt()
        return list((roots * self._unscale.abs()).to(torch.float32).unbind())

    def _parameter_names(self) -> list[str]:
        names: list[str] = []
        for g, group in enumerate(self.param_groups):
            names += group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
        return names

    @property
    def found_inf(self) -> Tensor | None:
        """1 where the last step was skipped for an infinite or NaN gradient, else 0; None where none was looked for.

        ``torch.amp.GradScaler`` sets it before a step, to what it found itself, and deletes it after.
        """
        if self._incoming_found_inf is not None:
            return self._incoming_found_inf
        return None if self._skipped is None else self._skipped.clone()

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        self._incoming_found_inf = value

    @found_inf.deleter
    def found_inf(self) -> None:
        self._incoming_found_inf = None

    def memory(self) -> Memory:
        """Bytes of parameters and state, by kind and per parameter; ``print`` it for a table.

        State is made by the first step: before it there is none to count.

        Example:
            >>> print(optimizer.memory())
        """
        return memory.measure(self)

    # ---- for the engine ----

    def _parameters(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (group index, index within the group, parameter)."""
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                yield g, i, param


def parameter_name(group: dict[str, Any], index: int) -> str:
    """How messages call a parameter: by its name where the group has names, else by place and shape."""
    names = group.get("param_names")
    if names is not None:
        return f"parameter '{names[index]}'"
    param = group["params"][index]
    shape = "not initialized" if isinstance(param, UninitializedParameter) else f"shape {tuple(param.shape)}"
    return f"parameter {index} of its group ({shape})"


def _wrap_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Shields the state from torch's cast to the parameter's dtype; ``state.restore`` unwraps it."""
    current = optimizer.param_groups
    groups = [dict(group) for group in state_dict["param_groups"]]
    for saved, live in zip(groups, current, strict=False):
        for name, value in live.items():
            if name in KEPT_OPTIONS and value is not None:
                saved[name] = value
            elif name != "params":
                saved.setdefault(name, value)
    state = {key: state_storage.Saved(state_storage.live_form(value)) for key, value in state_dict["state"].items()}
    return {**state_dict, "param_groups": groups, "state": state}
