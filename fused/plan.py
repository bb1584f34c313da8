"""Which tensors, where: decides once which backend updates which parameters, and drives one step over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import backends
from .precision import Storage
from .rules import Rule

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


@dataclass
class Control:
    """What one step needs to know beside parameters, gradients and state. Tensors are never read on the host.

    Attributes:
        max_norm: clip the global norm to this; None: do not.
        norm_type: 2.0 or inf.
        skip_nonfinite: skip the step if any gradient is infinite or NaN.
        seed: of the stochastic rounding.
        norm_total: float64, ``(sum of squares or largest magnitude, number of nonfinite tensors)`` of the raw gradients.
        grad_scale: loss scale to divide out.
        found_inf: skip the step where nonzero.
        grad_norm: receives the norm of the unscaled gradients before clipping.
        skipped: receives 1 where the step was skipped.
        grad_multiplier: constant factor of the gradients.
    """

    max_norm: float | None
    norm_type: float
    skip_nonfinite: bool
    seed: int
    norm_total: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    grad_norm: Tensor | None = None
    skipped: Tensor | None = None
    grad_multiplier: float = 1.0


class Batch(Protocol):
    """The parameters of one backend on one device."""

    device: torch.device

    def refresh(self) -> bool:
        """Looks at parameters and gradients. False: the parameter groups hold other parameters than the batch."""

    def reduce(self, norm_type: float) -> Tensor:
        """One read of the gradients: float64 ``(sum of squares or largest magnitude, nonfinite tensors)``."""

    def update(self, control: Control) -> None:
        """The optimizer step."""


Signature = list[tuple[Rule, Storage, bool]]


def signature(optimizer: FusedOptimizer) -> Signature:
    """What a plan is built for, beside the parameters: it is rebuilt where this changes."""
    return [
        (optimizer._rule(group), Storage.of(group), bool(group.get("differentiable")))
        for group in optimizer.param_groups
    ]


class Plan:
    """The batches of one optimizer, built at the first step and after every change of its groups."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self.signature: Signature = []
        self.batches: list[Batch] = []

    def step(self) -> None:
        """One step over all parameters."""
        self._refresh()
        if not self.batches:
            return
        control = self._control()
        for batch in self.batches:
            batch.update(control if len(self.batches) == 1 else _on_device(control, batch.device))

    def _refresh(self) -> None:
        current = signature(self.optimizer)
        if current != self.signature or not all(batch.refresh() for batch in self.batches):
            self.signature = current
            self.batches = backends.make_batches(self.optimizer)
            for batch in self.batches:
                batch.refresh()

    def _control(self) -> Control:
        optimizer, options = self.optimizer, self.optimizer._options
        control = Control(options["max_grad_norm"], options["norm_type"], options["skip_nonfinite"], options["seed"])
        control.grad_scale = getattr(optimizer, "grad_scale", None)
        control.found_inf = optimizer._incoming_found_inf
        if control.max_norm is not None or control.skip_nonfinite:
            device = self.batches[0].device
            if optimizer.grad_norm is None or optimizer.grad_norm.device != device:
                optimizer.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
                optimizer._skipped = torch.zeros((), dtype=torch.float32, device=device)
            control.grad_norm, control.skipped = optimizer.grad_norm, optimizer._skipped
            control.norm_total = combine([batch.reduce(control.norm_type) for batch in self.batches], control.norm_type)
        return control


def combine(totals: list[Tensor], norm_type: float) -> Tensor:
    """Totals of several batches as one, on the first one's device."""
    if len(totals) == 1:
        return totals[0]
    stacked = torch.stack([total.to(totals[0].device, non_blocking=True) for total in totals])
    value = stacked[:, 0].amax() if norm_type == float("inf") else stacked[:, 0].sum()
    return torch.stack((value, stacked[:, 1].sum()))


def _on_device(control: Control, device: torch.device) -> Control:
    """The same control for a batch on another device; results are written by the first one only."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    fields: dict[str, Any] = {**vars(control)}
    for name in ("norm_total", "grad_scale", "found_inf"):
        fields[name] = moved(fields[name])
    for name in ("grad_norm", "skipped"):
        if fields[name] is not None and fields[name].device != device:
            fields[name] = None
    return Control(**fields)
