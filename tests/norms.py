"""Gradients of sizes that are hard to add the squares of, and their norms against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BETWEEN_FORMATS = (2.0**48, 2.0**49, 2.0**-40, 2.0**-41, 2.0**-42, 2.0**-64)
"""Around where sums of eight or sixteen squares become too large, or too small, for float32 to go on with."""


def gradients(dtype: torch.dtype, device: torch.device, length: int) -> list[Tensor]:
    """The longest have ``length`` elements."""
    generator = torch.Generator().manual_seed(0)

    def randn(count: int, scale: float) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64) * scale

    # A float32 sum of four squares, or of eight, rounds away every eight, or sixteen, ones that are added to it.
    large_first = torch.ones(length, dtype=torch.float64)
    large_first[:1024] = 5824.0
    found = [large_first, torch.zeros(300, dtype=torch.float64), randn(length, 1.0)]
    found += [randn(9, 2.0**power) for power in range(-24, 15, 3)]
    found += [torch.tensor([value]) for value in (65504.0, 2.0**-24, -3.0)]
    if dtype != torch.float16:
        found += [randn(300, 2.0**power) for power in range(-120, 105, 16)]
        found.append(torch.full((length,), 2.0**62))  # the squares of a few fit in float32
        for a in BETWEEN_FORMATS:
            for b in BETWEEN_FORMATS:
                mixed = torch.full((600,), a, dtype=torch.float64)
                mixed.view(-1, 8)[::2] = b
                found.append(mixed)
    return [grad.to(dtype).to(device) for grad in found]


def check(dtype: torch.dtype, norm_type: float, device: torch.device, length: int = 40_000, **options: object) -> None:
    """Norms of the whole and of every gradient, as an optimizer with ``options`` finds them.

    Within 3 * 2^-24: half of what the squares may be off by, 4 * 2^-24, and the rounding to float32.
    """
    grads = gradients(dtype, device, length)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = fused.SGD(params, lr=0.0, max_grad_norm=1.0, norm_type=norm_type, **options)  # type: ignore[arg-type]
    optimizer.step()
    expected = [_norm(grad, norm_type) for grad in grads]
    assert optimizer.grad_norm is not None
    close = {"rel": 3 * 2.0**-24, "abs": 2.0**-149}
    assert optimizer.grad_norm.item() == pytest.approx(_norm(torch.cat(grads), norm_type), **close)
    assert [norm.item() for norm in optimizer.grad_norms().values()] == [pytest.approx(e, **close) for e in expected]


def _norm(grad: Tensor, norm_type: float) -> float:
    wide = [abs(x) for x in grad.double().tolist()]
    return max(wide) if norm_type == math.inf else math.sqrt(math.fsum(x * x for x in wide))
