"""Gradients of several micro-batches, collected in float32 buffers that the step reads as the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .arguments import check_flag
from .backends import extension
from .clip import Gradients
from .optimizer import FusedOptimizer, parameter_name
from .state import local


class GradientAccumulator:
    r"""Sums the gradients of micro-batches in a higher precision, one launch for the whole model per micro-batch.

    .. math::
        b \leftarrow b + g_i, \qquad \text{the step reads } \frac{1}{n} \sum_{i=1}^{n} g_i

    Adding bfloat16 gradients in bfloat16 loses every summand below 1/256 of the sum. Here the sum is float32, the
    gradients themselves are freed as soon as they are added, the first micro-batch is stored instead of added (so that
    nothing is ever set to zero), and the average is part of the factor the step multiplies gradients with anyway.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or one of this package's optimizers: its parameters are meant
            then and :meth:`attach` is called.
        dtype: of the buffers: ``torch.float32`` or ``torch.float64``; float64 and complex128 parameters always have
            buffers of their own dtype.
        average: divide the sum by the number of micro-batches, that is, of the gradients that the parameter which
            received most has received.
        hooks: add every gradient as soon as backward has produced it (less memory, a launch per parameter) instead of
            all of them in :meth:`accumulate`.

    State:
        A buffer per parameter, at a fixed address as long as the accumulator lives.

    Numerics:
        Plain sums in the order of the micro-batches, the same to the bit for any number of threads.

    Raises:
        ValueError: ``dtype`` is none of the two.
        RuntimeError: a gradient is sparse; nothing has been added then.

    Example:
        >>> accumulator = fused.GradientAccumulator(optimizer)
        >>> for batch in micro_batches:
        ...     scaler.scale(model(batch)).backward()
        ...     accumulator.accumulate()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def __init__(
        self,
        params: FusedOptimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        dtype: torch.dtype = torch.float32,
        *,
        average: bool = True,
        hooks: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Invalid dtype value: {dtype}. Use torch.float32 or torch.float64")
        check_flag("average", average)
        check_flag("hooks", hooks)
        self.dtype = dtype
        self.average = average
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self._collect(params)
        self.buffers = [self._make_buffer(param) for param in self.params]
        self._counts: Any = _counts(self.params, self.buffers)
        self._shown = False
        self._handles: list[Any] = []
        for param in self.params:
            param.grad_dtype = None  # a buffer may stand in for the gradient
        if hooks:
            for index, param in enumerate(self.params):
                self._handles.append(param.register_post_accumulate_grad_hook(self._hook(index)))
        if isinstance(params, FusedOptimizer):
            self.attach(params)

    def attach(self, optimizer: FusedOptimizer) -> None:
        """Makes ``optimizer.step()`` read the sums, and start a new one after it.

        Args:
            optimizer: one of this package's; its parameters are among the accumulator's.

        Raises:
            TypeError: the optimizer is none of this package's.
            ValueError: it has a parameter that the accumulator does not know.
        """
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"{type(optimizer).__name__} does not read sums: finish() shows it the averages")
        known = {id(param) for param in self.params}
        for g, i, param in optimizer._parameters():
            if id(param) not in known:
                raise ValueError(f"{parameter_name(optimizer.param_groups[g], i)} is not among the accumulator's")
        optimizer._accumulator = self

    @property
    def count(self) -> int:
        """Micro-batches in the sum."""
        return int(self._counts.largest_count())

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds all gradients to the buffers and takes them off their parameters. What is left to add, a step adds.

        Raises:
            RuntimeError: a gradient is sparse, or :meth:`finish` has been called. Nothing has been added then.
        """
        self._add(-1)

    @torch.no_grad()
    def finish(self) -> None:
        """Shows the averages as the parameters' gradients, for clipping or looking at them before the step.

        One pass over the buffers, where there is an average to take. The next step of an attached optimizer, or
        :meth:`reset`, starts a new sum. ``GradScaler.unscale_`` does the same with an attached optimizer.

        Raises:
            RuntimeError: a gradient is sparse. Nothing has been added then.
        """
        multiplier = self._show()
        if multiplier != 1.0:
            Gradients(self.params, of_params=True).scale(multiplier)

    def reset(self) -> None:
        """Starts a new sum."""
        self._hide()
        self._counts.reset()

    def remove_hooks(self) -> None:
        """Takes the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- for the optimizer and the scaler ----

    def _show(self) -> float:
        """Makes the sums the parameters' gradients; what to multiply them with, 1 if that has been done before."""
        if self._shown:
            return 1.0
        self._add(-1)
        for index, param in enumerate(self.params):
            if self._counts.count_of(index):
                param.grad = self.buffers[index]
        self._shown = True
        return 1.0 / self.count if self.average and self.count else 1.0

    @contextmanager
    def _lent(self) -> Iterator[float]:
        """For a step: sums in place of the gradients, and a new sum after it; yields what to multiply them with."""
        before = self._shown
        with torch.no_grad():
            multiplier = self._show()
        try:
            yield multiplier
        except BaseException:
            if not before:  # as if the step had not been tried
                self._hide()
            raise
        self.reset()

    def _hide(self) -> None:
        self._shown = False
        for index, param in enumerate(self.params):
            if param.grad is self.buffers[index]:
                param.grad = None

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def add(_param: Tensor) -> None:
            if not self._shown:  # backward itself adds to a buffer that is shown
                with torch.no_grad():
                    self._add(index)

        return add

    def _add(self, index: int) -> None:
        """Adds one gradient, or all for -1, to the buffers, and takes them off their parameters."""
        if self._shown:
            raise RuntimeError("finish() or unscale_() has shown the sums as gradients: step or reset() before adding")
        attention = self._counts.look_up(index)
        for i in attention:
            grad = self.params[i].grad
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(f"{self.names[i]} has a sparse gradient ({grad.layout}), which no buffer can take")
        self._counts.add()
        self._counts.release()
        for i in attention:
            param, buffer = self.params[i], local(self.buffers[i])
            assert param.grad is not None
            grad = local(param.grad)
            if self._counts.count(i):
                buffer.copy_(grad)
            else:
                buffer.add_(grad)
            param.grad = None

    # ---- construction ----

    def _collect(self, params: Any) -> None:
        if isinstance(params, FusedOptimizer):
            for g, i, param in params._parameters():
                self.params.append(param)
                self.names.append(parameter_name(params.param_groups[g], i))
        else:
            for index, item in enumerate(params):
                name, param = item if isinstance(item, tuple) else (None, item)
                self.params.append(param)
                self.names.append(f"parameter {index}" if name is None else f"parameter '{name}'")

    def _make_buffer(self, param: Tensor) -> Tensor:
        wide = param.dtype in (torch.float64, torch.complex128)
        dtype = torch.float64 if wide else self.dtype
        return torch.zeros_like(param, dtype=dtype.to_complex() if param.is_complex() else dtype, requires_grad=False)


class _Counts:
    """The sums' bookkeeping where there is no extension: every gradient is left to torch operations."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.reset()

    def look_up(self, index: int) -> list[int]:
        chosen = range(len(self.params)) if index < 0 else [index]
        return [i for i in chosen if self.params[i].grad is not None]

    def add(self) -> None:
        """Nothing was found that kernels could add."""

    def release(self) -> None:
        """As :meth:`add`."""

    def count(self, index: int) -> bool:
        self.counts[index] += 1
        return self.counts[index] == 1

    def count_of(self, index: int) -> int:
        return self.counts[index]

    def largest_count(self) -> int:
        return max(self.counts, default=0)

    def reset(self) -> None:
        self.counts = [0] * len(self.params)


def _counts(params: list[Tensor], buffers: list[Tensor]) -> Any:
    return _Counts(params) if extension is None else extension.Accumulation(params, buffers)
