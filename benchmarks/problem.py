"""One problem: parameters and gradients that every system gets alike, and a `Side`, one system working on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Precision
from .shapes import Profile


class NotAvailable(Exception):
    """This system cannot do this case here; the message says why."""


LEFT_OUT = (NotAvailable, MemoryError, torch.OutOfMemoryError)
"""What leaves a cell without a number, and the others with theirs."""


class Problem:
    """Initial parameters (about 0.1 in size) and gradients (about 1) of a profile, on a device.

    The gradients are shared: every side steps on the very same tensors, so all get the same values and the same
    chance of finding them in a cache. `set_factor` scales them in place (by powers of two, so exactly).
    """

    def __init__(
        self,
        profile: Profile,
        precision: Precision,
        device: torch.device | str = "cpu",
        grad_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.profile = profile
        self.precision = precision
        self.device = torch.device(device)
        self.grad_dtype = grad_dtype or precision.dtype
        self.factor = 1.0
        self.seed = seed
        self.initial = list(self._normal(0, 0.1, precision.dtype))
        self._grads = {self.grad_dtype: list(self._normal(1, 1.0, self.grad_dtype))}

    def _normal(self, stream: int, scale: float, dtype: torch.dtype) -> Iterable[Tensor]:
        generator = torch.Generator(self.device).manual_seed(2 * self.seed + stream)
        for shape in self.profile.shapes:
            yield torch.randn(shape, generator=generator, device=self.device).mul_(scale).to(dtype)

    def parameters(self, dtype: torch.dtype | None = None, grads: torch.dtype | bool = True) -> list[Tensor]:
        """Fresh parameters with the shared gradients attached, in the problem's dtype or `grads`; False: none."""
        params = [torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in self.initial]
        if grads is not False:
            dtype_of_grads = grads if isinstance(grads, torch.dtype) else self.grad_dtype
            for p, g in zip(params, self.gradients(dtype_of_grads), strict=True):
                if g.dtype == p.dtype:
                    p.grad = g
                else:
                    p.grad_dtype = g.dtype
                    p.grad = g
        return list(params)

    def gradients(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        dtype = dtype or self.grad_dtype
        if dtype not in self._grads:
            self._grads[dtype] = [g.to(dtype) for g in self._grads[self.grad_dtype]]
        return self._grads[dtype]

    def set_factor(self, factor: float) -> None:
        if factor != self.factor:
            for grads in self._grads.values():
                torch._foreach_mul_(grads, factor / self.factor)
            self.factor = factor

    def restore_gradients(self) -> None:
        """Undo what a system did to the shared gradients."""
        for dtype, grads in self._grads.items():
            for held, fresh in zip(grads, self._normal(1, 1.0, self.grad_dtype), strict=True):
                held.copy_(fresh.to(dtype).mul_(self.factor))

    def side_bytes(self, per_param: float) -> float:
        return self.profile.elements * per_param


@dataclass
class Side:
    """One system with its own parameters, ready to step. `prepare` runs before each step and is never timed."""

    system: str
    label: str
    params: list[Tensor]
    step: Callable[[], Any]
    optimizer: Any = None
    prepare: Callable[[], Any] | None = None
    extra: list[Tensor] = field(default_factory=list)  # held beside parameters and state, e.g. float32 masters
    note: str = ""
    grad_bytes: int | None = None  # per element, where not the parameter's
    gradient_passes: int = 1  # times that a gradient's element is read or written

    def take_private_gradients(self) -> None:
        """For a system that writes to the gradients: its own copy, restored before each step."""
        params = [p for p in (*self.params, *self.extra) if p.grad is not None]
        shared = [p.grad for p in params if p.grad is not None]
        private = [g.clone() for g in shared]
        for p, g in zip(params, private, strict=True):
            p.grad = g

        def restore() -> None:
            torch._foreach_copy_(private, shared)

        self.prepare = restore

    def held_bytes(self) -> int:
        """Bytes of parameters and everything kept between steps, as the tensors really hold them."""
        return storage_bytes([*self.params, *self.extra, *state_tensors(self.optimizer)])


def state_tensors(optimizer: Any) -> Iterable[Tensor]:
    """Every tensor in the optimizer's state, whatever its nesting."""

    def walk(value: Any) -> Iterable[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for v in value.values():
                yield from walk(v)
        elif isinstance(value, list | tuple):
            for v in value:
                yield from walk(v)

    for per_param in getattr(optimizer, "state", {}).values():
        yield from walk(per_param)


def _plain(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that hold the data: wrapper subclasses (torchao's 8-bit states) are taken apart."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, torch.nn.Parameter):
        yield tensor
    else:
        for name in flatten()[0]:
            yield from _plain(getattr(tensor, name))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages: shared ones (a code book, say) count once."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        for t in _plain(tensor):
            storage = t.untyped_storage()
            seen[(str(t.device), storage.data_ptr())] = storage.nbytes() if t.numel() else 0
    return sum(seen.values())


def total_norm(grads: Iterable[Tensor]) -> float:
    """The 2-norm over all gradients, in float64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in grads))
