"""Which tensors, where: decides once which backend updates which parameters, and drives one step over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import backends, sharding
from .precision import GROUP_OPTIONS, Storage, widest_float
from .rules import Rule

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


@dataclass
class Control:
    """What one step needs to know beside parameters, gradients and state. Tensors are never read on the host.

    Attributes:
        max_norm: clip the global norm to this; None: do not; inf: measure it only.
        norm_type: 2.0 or inf.
        skip_nonfinite: skip the step if any gradient is infinite or NaN.
        seed: of the stochastic rounding.
        norm_total: float64, ``(sum of squares or largest magnitude, number of nonfinite tensors)``, of raw gradients.
        grad_scale: loss scale to divide out.
        found_inf: skip the step where nonzero.
        grad_norm: receives the norm of the unscaled gradients before clipping.
        skipped: receives 1 where the step was skipped.
        grad_multiplier: constant factor of the gradients.
        unscale: float64, receives what made unscaled gradients of the raw ones, before clipping.
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
    unscale: Tensor | None = None


class Batch(Protocol):
    """The parameters of one backend on one device.

    Attributes:
        device: of the parameters.
        again: an earlier batch updates the same parameters.
        row_values: float64 ``(parameters of the optimizer, 2)``, written by ``reduce``: sum of squares or largest
            magnitude of each gradient, and whether it holds an infinity or NaN; zero where this batch has no gradient.
    """

    device: torch.device
    again: bool
    row_values: Tensor

    def refresh(self) -> bool:
        """Looks at parameters and gradients. False: the parameter groups hold other parameters than the batch."""

    def reduce(self, norm_type: float) -> Tensor:
        """One read of the gradients: float64 ``(sum of squares or largest magnitude, nonfinite tensors)``."""

    def update(self, control: Control) -> None:
        """The optimizer step."""

    def compile_ahead(self) -> None:
        """Compiles what steps would compile, of the parameters as they are now; see :func:`fused.warmup`."""


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
        options = (*optimizer._rule_options, *GROUP_OPTIONS, "differentiable")
        self.read_options = itemgetter(*(name for name in options if name in optimizer.defaults))
        self.options: list[Any] | None = None
        self.batches: list[Batch] = []
        self.shards: list[sharding.Shards] = []
        self.row_values: Tensor | None = None
        self.results: tuple[Tensor, Tensor, Tensor] | None = None

    def step(self, grad_multiplier: float = 1.0) -> None:
        """One step over all parameters, with every gradient multiplied by ``grad_multiplier``."""
        self._refresh()
        if not self.batches:
            self.optimizer._grad_norm = self.optimizer._skipped = self.optimizer._unscale = None
            return
        control = self._control(grad_multiplier)
        for batch in self.batches:
            if batch.again:
                batch.refresh()  # what it copies to another layout has changed
            batch.update(control if len(self.batches) == 1 else _on_device(control, batch.device))

    def _refresh(self) -> None:
        options, asked = self._asked()
        if asked != self.signature or not all(batch.refresh() for batch in self.batches):
            self.batches = backends.make_batches(self.optimizer)
            self.signature, self.options = asked, None
            self.shards = sharding.shards_of([param for _, _, param in self.optimizer._parameters()])
            self.row_values = None
            for batch in self.batches:
                batch.refresh()
        self.options = options

    def _asked(self) -> tuple[list[Any] | None, Signature]:
        """The groups' options as they are now, and what they ask for."""
        # To find out what hundreds of groups ask for takes long: only where their values have changed.
        try:
            options = list(map(self.read_options, self.optimizer.param_groups))
        except KeyError:  # an option that has a default may lack
            return None, signature(self.optimizer)
        return options, self.signature if options == self.options else signature(self.optimizer)

    def _control(self, grad_multiplier: float) -> Control:
        optimizer, options, device = self.optimizer, self.optimizer._options, self.batches[0].device
        control = Control(
            options["max_grad_norm"],
            options["norm_type"],
            options["skip_nonfinite"] or optimizer._check_nonfinite,
            options["seed"],
            grad_scale=_scalar(getattr(optimizer, "grad_scale", None), device),
            found_inf=_scalar(optimizer._incoming_found_inf, device),
            grad_multiplier=grad_multiplier,
        )
        measured = control.max_norm is not None or control.skip_nonfinite
        if measured or control.found_inf is not None:
            grad_norm, control.skipped, unscale = self._results(device)
            if measured:
                control.grad_norm, control.unscale = grad_norm, unscale
                control.norm_total = self._norm_total(control.norm_type)
        optimizer._grad_norm, optimizer._skipped = control.grad_norm, control.skipped
        optimizer._unscale = control.unscale
        return control

    def _results(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, skipped and unscale factor: the same memory every step, as a captured graph needs it."""
        if self.results is None or self.results[0].device != device:
            norm, skipped = torch.zeros(2, dtype=torch.float32, device=device).unbind()
            self.results = norm, skipped, torch.ones((), dtype=widest_float(device), device=device)
        return self.results

    def _norm_total(self, norm_type: float) -> Tensor:
        """Reads the gradients of all batches; over all shards of sharded ones."""
        totals = [batch.reduce(norm_type) for batch in self.batches]
        if len(self.batches) == 1 and not self.shards:
            self.row_values = self.batches[0].row_values
            return totals[0]
        # Every batch has zeros in the rows of the others.
        rows = [batch.row_values.to(totals[0].device, non_blocking=True) for batch in self.batches]
        self.row_values = torch.stack(rows).sum(0)
        if not self.shards:
            return combine(totals, norm_type)
        maximum = norm_type == float("inf")
        for shards in self.shards:
            shards.all_reduce(self.row_values, maximum)
        value = self.row_values[:, 0].amax() if maximum else self.row_values[:, 0].sum()
        return torch.stack((value, self.row_values[:, 1].sum()))


def _scalar(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A scale or flag from outside as kernels read it."""
    return None if tensor is None else tensor.detach().to(device, torch.float32, non_blocking=True)


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
    for name in ("grad_norm", "skipped", "unscale"):
        if fields[name] is not None and fields[name].device != device:
            fields[name] = None
    return Control(**fields)
