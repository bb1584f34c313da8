"""Loss scaling whose unscaling and inf check are part of the optimizer's own read of the gradients."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from .arguments import check_flag, check_number
from .clip import Gradients
from .optimizer import FusedOptimizer

_NEVER = 2**31 - 1
"""Growth interval that torch's scaler, which knows no fixed scale, is given in a checkpoint."""


class GradScaler(torch.amp.GradScaler):
    r"""A ``torch.amp.GradScaler`` that lets this package's optimizers unscale and check in the one read of their step.

    .. math::
        s \leftarrow \begin{cases}
            \max(s \cdot \text{backoff}, s_{\min}) & \text{a gradient was infinite or NaN: no step was made} \\
            \min(s \cdot \text{growth}, s_{\max}) & \text{after growth\_interval steps in a row} \\
            s & \text{otherwise} \end{cases}

    For an optimizer of this package :meth:`step` divides by the scale, looks for infinities and NaN, takes the norm
    where ``max_grad_norm`` is set, and skips: in one read of the gradients, which stay as they are, and without waiting
    for the device. No flag is needed on the optimizer. :meth:`unscale_` before it changes the gradients in place, as
    torch's does, for clipping or looking at them; they are then not unscaled again. Any other optimizer is treated as
    by torch.

    Args:
        device: ``"cuda"``, ``"cpu"`` or another device type; None: an accelerator where there is one, else the CPU.
        init_scale: first scale.
        growth_factor: see above, more than 1.
        backoff_factor: see above, less than 1.
        growth_interval: see above; None: the scale is fixed. Steps with infinities or NaN are still skipped.
        enabled: False makes every method do nothing and :meth:`step` call the optimizer.
        min_scale: smallest scale; None: any.
        max_scale: largest scale; None: any finite.
        hysteresis: number of skipped steps, since the scale last grew, from which on a skipped step lowers it.

    State:
        ``scale`` (float32) and counters of steps, on the device of the first scaled loss. ``state_dict`` has torch's
        keys and this class's own: either class loads the other's.

    Numerics:
        Gradients are divided by the scale in the update, in float32. float16 parameters are allowed; unscaling float16
        gradients in place by :meth:`unscale_` rounds small ones to multiples of 2\ :sup:`-24`, which ``max_grad_norm``
        avoids.

    Raises:
        ValueError: an argument is out of range; the message has its name and value.
        TypeError: an argument is no number.

    Example:
        >>> optimizer = fused.AdamW(model.parameters(), max_grad_norm=1.0)
        >>> scaler = fused.GradScaler()
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()

    Reference:
        Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, section 3.2; hysteresis as in Megatron-LM.
    """

    _growth_interval: int | None  # type: ignore[assignment]

    def __init__(
        self,
        device: str | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int | None = 2000,
        enabled: bool = True,
        *,
        min_scale: float | None = None,
        max_scale: float | None = None,
        hysteresis: int = 1,
    ) -> None:
        check_flag("enabled", enabled)
        for name, value in (("init_scale", init_scale), ("min_scale", min_scale), ("max_scale", max_scale)):
            if value is not None:
                check_number(name, value)
                if not 0.0 < value < float("inf"):
                    raise ValueError(f"Invalid {name} value: {value}. Use a finite number above 0")
        _check_factor("growth_factor", growth_factor, 1.0, float("inf"))
        _check_factor("backoff_factor", backoff_factor, 0.0, 1.0)
        if min_scale is not None and max_scale is not None and min_scale > max_scale:
            raise ValueError(f"Invalid min_scale value: {min_scale}. It exceeds max_scale={max_scale}")
        if not (min_scale or 0.0) <= init_scale <= (max_scale or float("inf")):
            raise ValueError(f"Invalid init_scale value: {init_scale}. Use one in [{min_scale}, {max_scale}]")
        _check_interval("growth_interval", growth_interval)
        check_number("hysteresis", hysteresis)
        if hysteresis < 1:
            raise ValueError(f"Invalid hysteresis value: {hysteresis}. Use at least 1")
        if device is None:
            device = _accelerator()
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval or 1, enabled)
        self._growth_interval = growth_interval
        self._min_scale, self._max_scale = min_scale, max_scale
        self._hysteresis = int(hysteresis)
        self._init_patience = self._hysteresis
        self._patience: Tensor | None = None

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._patience = torch.full((), self._init_patience, dtype=torch.int32, device=dev)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Steps ``optimizer`` with unscaled gradients, unless one of them is infinite or NaN.

        Args:
            optimizer: of this package, or any other.
            *args: for ``optimizer.step``. This package's optimizers may be given a closure, which scales its loss,
                unless :meth:`unscale_` was called.
            **kwargs: for ``optimizer.step``.

        Returns:
            What ``optimizer.step`` returned. One of this package's is always called and skips by itself.

        Raises:
            RuntimeError: called twice without :meth:`update` between.
        """
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        scale, _ = self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if state["stage"] is OptState.UNSCALED:
            if args or kwargs.get("closure") is not None:
                raise RuntimeError("a closure would replace the gradients that unscale_() has unscaled")
            found = _combined(list(state["found_inf_per_device"].values()), scale)
            optimizer.found_inf = found
            try:
                result = optimizer.step(**kwargs)
            finally:
                del optimizer.found_inf
        else:
            optimizer.grad_scale = scale  # type: ignore[attr-defined]  # torch's protocol
            optimizer._check_nonfinite = True
            try:
                result = optimizer.step(*args, **kwargs)
            finally:
                del optimizer.grad_scale  # type: ignore[attr-defined]
                optimizer._check_nonfinite = False
            skipped = optimizer._skipped
            found = torch.zeros_like(scale) if skipped is None else skipped.clone()
        state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.STEPPED
        return result

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not isinstance(optimizer, FusedOptimizer):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        with torch.no_grad():
            if optimizer._accumulator is not None:
                inv_scale = inv_scale * optimizer._accumulator._show()
            params = [param for _, _, param in optimizer._parameters()]
            found = Gradients(params, of_params=True).unscale(inv_scale)
        return found or {found_inf.device: found_inf}

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adjusts the scale after all optimizers have been stepped; on the device, without waiting for it.

        Args:
            new_scale: scale to use from now on, kept within ``min_scale`` and ``max_scale``.
        """
        if not self._enabled:
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        if new_scale is not None:
            super().update(float(new_scale) if isinstance(new_scale, int) else new_scale)
        else:
            states = self._per_optimizer_states.values()
            found = [flag for state in states for flag in state["found_inf_per_device"].values()]
            if not found:
                raise AssertionError("No inf checks were recorded prior to update.")
            if self._growth_interval is not None:
                self._adjust(scale, tracker, _combined(found, scale))
            self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if self._min_scale is not None or self._max_scale is not None:
            scale.clamp_(self._min_scale, self._max_scale)

    def _adjust(self, scale: Tensor, tracker: Tensor, found: Tensor) -> None:
        patience, interval = self._patience, self._growth_interval
        assert patience is not None and interval is not None
        if self._hysteresis == 1:
            torch._amp_update_scale_(scale, tracker, found, self._growth_factor, self._backoff_factor, interval)
            return
        before = scale.clone()
        bad = found != 0
        patience.sub_(bad.to(patience.dtype)).clamp_(min=0)
        torch._amp_update_scale_(scale, tracker, found, self._growth_factor, self._backoff_factor, interval)
        scale.copy_(torch.where(bad & (patience > 0), before, scale))
        grown = ~bad & (tracker == 0)
        patience.copy_(torch.where(grown, self._hysteresis, patience))

    def get_growth_interval(self) -> int | None:  # type: ignore[override]
        """Steps in a row after which the scale grows; None where it is fixed."""
        return self._growth_interval

    def set_growth_interval(self, new_interval: int | None) -> None:
        """Sets the number of steps in a row after which the scale grows.

        Args:
            new_interval: at least 1; None fixes the scale.

        Raises:
            ValueError: ``new_interval`` is below 1.
        """
        _check_interval("new_interval", new_interval)
        self._growth_interval = new_interval

    def state_dict(self) -> dict[str, Any]:
        """Scale, counters and settings as plain Python numbers; see the class. Waits for the device."""
        state: dict[str, Any] = super().state_dict()
        if state:
            state["growth_interval"] = _NEVER if self._growth_interval is None else self._growth_interval
            state["fixed_scale"] = self._growth_interval is None
            state["min_scale"], state["max_scale"] = self._min_scale, self._max_scale
            state["hysteresis"] = self._hysteresis
            state["_patience"] = self._get_patience()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class or torch's has saved; settings that torch's lacks stay as they are.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        if not self._enabled:
            return
        fixed = self._growth_interval is None
        super().load_state_dict(state_dict)
        if state_dict.get("fixed_scale", fixed):
            self._growth_interval = None
        self._min_scale = state_dict.get("min_scale", self._min_scale)
        self._max_scale = state_dict.get("max_scale", self._max_scale)
        self._hysteresis = state_dict.get("hysteresis", self._hysteresis)
        self._init_patience = state_dict.get("_patience", self._hysteresis)
        if self._patience is not None:
            self._patience.fill_(self._init_patience)

    def _get_patience(self) -> int:
        return self._init_patience if self._patience is None else int(self._patience.item())

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._enabled:
            state["_init_patience"], state["_patience"] = self._get_patience(), None
        return state


def _check_factor(name: str, value: float, above: float, below: float) -> None:
    check_number(name, value)
    if not above < value < below:
        raise ValueError(f"Invalid {name} value: {value}. Use one between {above:g} and {below:g}")


def _check_interval(name: str, value: int | None) -> None:
    if value is not None:
        check_number(name, value)
        if value < 1:
            raise ValueError(f"Invalid {name} value: {value}. Use at least 1, or None")


def _combined(flags: list[Tensor], scale: Tensor) -> Tensor:
    """Nonzero where one of the flags is, beside the scale."""
    there = [flag.to(scale.device, non_blocking=True) for flag in flags]
    return there[0] if len(there) == 1 else torch.stack(there).amax()


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type
