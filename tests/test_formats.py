"""Masters as parameter and remainder, over every parameter; stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused
from fused import formats


def every(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x00FF, 0x1234, 0xABCD])
def test_split_of_bfloat16_is_exact(low: int) -> None:
    bits = (torch.arange(2**16, dtype=torch.int64) << 16) | low
    master = formats.float_of(bits)
    param, remainder = formats.split_master(master, torch.bfloat16, 16)
    joined = formats.join_master(param, remainder)
    assert torch.equal(joined.isnan(), master.isnan())
    assert torch.equal(formats.bits_of(joined)[~master.isnan()], bits[~master.isnan()])  # -0.0 and inf as well
    finite = master.isfinite() & param.isfinite()
    ties_away = formats.float_of(((bits + 0x8000) >> 16 << 16) & 0xFFFFFFFF)
    assert torch.equal(param.float()[finite], ties_away[finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 8])
def test_every_parameter_with_a_fresh_remainder_is_itself(dtype: torch.dtype, bits: int) -> None:
    param = every(dtype)
    zero = torch.zeros(param.shape, dtype=torch.int16 if bits == 16 else torch.int8)
    joined = formats.join_master(param, zero)
    assert torch.equal(joined.isnan(), param.isnan())
    known = ~param.isnan()
    assert torch.equal(formats.bits_of(joined)[known], formats.bits_of(param.float())[known])


@pytest.mark.parametrize("remainder", [-32768, -1, 1, 32767])
def test_zeros_with_a_stale_remainder_stay_zero(remainder: int) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    joined = formats.join_master(zeros, torch.full((2,), remainder, dtype=torch.int16))
    assert bool(joined.isfinite().all()) and float(joined.abs().max()) < 1e-38


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 16), (torch.float16, 8)])
def test_error_bounds_around_every_parameter(dtype: torch.dtype, bits: int) -> None:
    """Masters spread over the interval that rounds to each parameter, for all 2^16 parameters."""
    param = every(dtype)
    param = param[param.isfinite()]
    spacing = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for fraction in torch.linspace(-0.999, 0.999, 33).tolist():
        master = (param.double() * (1 + fraction * spacing / 2)).float()
        error = (formats.join_master(*formats.split_master(master, dtype, bits)) - master).abs().double()
        if dtype == torch.bfloat16:
            normal = master.abs() >= 2.0**-126
            assert float((error / master.abs())[normal].max()) <= 2.0**-16
            assert float(error[~normal].max()) <= 2.0**-141
        else:
            inside = master.abs() < 65504
            normal = inside & (master.abs() >= 2.0**-14)
            assert float((error / master.abs())[normal].max()) <= (0.0 if bits == 16 else 2.0**-18)
            assert float(error[inside & ~normal].max()) <= (2.0**-40 if bits == 16 else 2.0**-32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    values = torch.tensor([1.001, -0.3337, 1234.56, 3.1e-5, 1e-7, -2.0])
    seeds = 4000
    total = torch.zeros(len(values), dtype=torch.float64)
    for seed in range(seeds):
        random = formats.random_bits(seed, 0, 0, 1, len(values), values.device)
        total += formats.round_stochastic(values, dtype, random).double()
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    step = torch.maximum(values.abs() * torch.finfo(dtype).eps, torch.tensor(smallest))
    assert bool(((total / seeds - values.double()).abs() <= 4 * 0.5 * step / math.sqrt(seeds)).all())


def test_stochastic_rounding_keeps_what_has_no_neighbours() -> None:
    random = torch.full((4,), 0xFFFFFFFF, dtype=torch.int64)
    rounded = formats.round_stochastic(torch.tensor([math.inf, -math.inf, math.nan, 0.0]), torch.bfloat16, random)
    assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan() and rounded[3] == 0


def test_stochastic_rounding_does_not_depend_on_threads_or_backend(threads: None, isas: list[str]) -> None:
    g = torch.randn(70001).bfloat16()
    results = []
    for backend, isa, count in [("cpu", isa, n) for isa in isas for n in (1, 3)] + [("reference", isas[0], 1)]:
        fused.backends.extension.select_isa(isa)
        torch.set_num_threads(count)
        p = torch.nn.Parameter(torch.zeros(70001, dtype=torch.bfloat16))
        optimizer = fused.SGD([p], lr=0.37, stochastic_rounding=True, seed=2**63 + 5, backend=backend)
        p.grad = g.clone()
        optimizer.step()
        results.append(p.detach().clone())
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.equal(results[0], (-0.37 * g.float()).bfloat16())
