"""Which parameters lie in each other's memory: kernels update all rows of a table at once, so those take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..state import local


class Span(NamedTuple):
    """The bytes of a tensor: ``width`` of them from ``start``, again after each ``period``, before ``end``."""

    start: int
    end: int
    width: int
    period: int


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in memory of its own: fake tensors, and those made of others, have none."""
    return not (is_lazy(tensor) or isinstance(tensor, FakeTensor) or bool(is_traceable_wrapper_subclass(tensor)))


def span_of(param: Tensor) -> Span | None:
    """Where this process's part of a parameter lies; None: nowhere."""
    part = local(param)
    if not has_memory(part) or part.layout != torch.strided or part.device.type == "meta" or part.numel() == 0:
        return None
    start, size = part.data_ptr(), part.element_size()
    width, end, steps = size, start + size, []
    for stride, length in sorted(zip(part.stride(), part.shape, strict=True)):
        if length == 1:
            continue
        end += (length - 1) * stride * size
        if stride * size == width:
            width *= length
        elif stride != 0:
            steps.append(stride * size)
    return Span(start, end, width, math.gcd(*steps))


def turns_of(spans: Sequence[Span | None]) -> list[int]:
    """The turn of each parameter: after all before it in whose memory it lies.

    So weights that are tied through ``.data``, and views of one another, are updated as one after the other.
    """
    turns = [0] * len(spans)
    together: list[int] = []
    reach = 0
    for span, index in sorted((span, index) for index, span in enumerate(spans) if span is not None):
        if span.start >= reach:
            _take_turns(together, spans, turns)
            together = []
        together.append(index)
        reach = max(reach, span.end)
    _take_turns(together, spans, turns)
    return turns


def _take_turns(together: list[int], spans: Sequence[Span | None], turns: list[int]) -> None:
    together.sort()
    for place, index in enumerate(together):
        before = [turns[other] for other in together[:place] if _overlap(spans[index], spans[other])]
        turns[index] = 1 + max(before, default=-1)


def _overlap(a: Span | None, b: Span | None) -> bool:
    if a is None or b is None or a.start >= b.end or b.start >= a.end:
        return False
    period = math.gcd(a.period, b.period)
    if period == 0:
        return True
    ahead = (b.start - a.start) % period  # columns of a matrix, for example, lie between each other
    return not (a.width <= ahead <= period - b.width)
