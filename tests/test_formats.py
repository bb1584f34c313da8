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


# ---- the instruction sets, and kernels that keep everything in registers beside those that go through buffers ----


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit (-0.0 is not 0.0), where NaN is NaN whatever its payload."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    return bool(((a.view(integer) == b.view(integer)) | nan).all())


def storages() -> list[tuple[torch.dtype, str | None, torch.dtype, bool]]:
    """Parameter, master, state, stochastic."""
    halves = (torch.bfloat16, torch.float16)
    masters = (None, "split", "split8", "fp32")
    states = (torch.float32, *halves)
    every_kind = [(p, m, s, r) for p in halves for m in masters for s in states for r in (False, True)]
    return every_kind + [(torch.float32, None, s, r) for s in halves for r in (False, True)]


def every_pattern(
    rate: float, storage: tuple[torch.dtype, str | None, torch.dtype, bool], n: int, grad: torch.dtype | None = None
) -> list[Tensor]:
    """Parameters, remainders and momentum of all patterns after a step; `n` says how they are cut into tensors, `grad`
    the gradients' dtype where it is not the parameters'."""
    dtype, master, state_dtype, stochastic = storage
    generator = torch.Generator().manual_seed(1)
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    values = every(narrow).to(dtype)
    gradients = every(narrow)[torch.randperm(2**16, generator=generator)].to(grad or dtype)
    noise = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64, generator=generator).to(torch.int32)
    params = [torch.nn.Parameter(piece.clone()) for piece in values.split(n)]
    optimizer = fused.SGD(
        params, rate, momentum=0.5, master_weights=master, state_dtype=state_dtype, stochastic_rounding=stochastic,
        seed=5, backend="cpu",
    )  # fmt: skip
    for p, g in zip(params, gradients.split(n), strict=True):
        if grad is not None:
            p.grad_dtype = grad
        p.grad = torch.zeros_like(g)
    optimizer.step()
    start = 0
    for p, g in zip(params, gradients.split(n), strict=True):
        p.data.copy_(values[start : start + len(p)])
        p.grad = g.clone()
        for name, item in optimizer.state[p].items():
            if name != "step" and item.numel() == len(p):
                bits = noise[start : start + len(p)]
                wide = item.element_size()
                item.copy_(bits.view(torch.float32) if wide == 4 else bits.to(torch.int16).view(item.dtype)) if (
                    wide > 1
                ) else item.copy_(bits.to(torch.int8).view(item.dtype))
        start += len(p)
    optimizer.step()
    kept: dict[str, list[Tensor]] = {}
    for p in params:
        for name, item in [("param", p.detach()), *optimizer.state[p].items()]:
            if name != "step":
                kept.setdefault(name, []).append(item)
    return [torch.cat(items) for items in kept.values()]


@pytest.mark.parametrize("storage", storages(), ids=lambda s: "-".join(str(x).removeprefix("torch.") for x in s))
@pytest.mark.parametrize("rate", [0.0, 0.37])
def test_every_pattern_is_converted_alike_by_all_instruction_sets(
    rate: float, storage: tuple[torch.dtype, str | None, torch.dtype, bool], isas: list[str]
) -> None:
    results = {}
    for isa in isas:
        fused.backends.extension.select_isa(isa)
        results[isa] = every_pattern(rate, storage, 2**16)
    for isa, result in results.items():
        for a, b in zip(result, results[isas[0]], strict=True):
            assert same_bits(a, b), isa


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_gradients_of_any_dtype_are_converted_alike_by_all_instruction_sets(
    state: torch.dtype, dtype: torch.dtype, grad: torch.dtype, isas: list[str]
) -> None:
    for master in (None,) if dtype == torch.float32 else (None, "split", "split8", "fp32"):
        results = []
        for isa in isas:
            fused.backends.extension.select_isa(isa)
            results.append(every_pattern(0.37, (dtype, master, state, False), 2**16, grad))
        for result in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True)), master


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [None, "split", "split8"])
def test_what_is_left_over_is_converted_as_whole_vectors_are(dtype: torch.dtype, master: str | None) -> None:
    if fused.backends.extension is None:
        pytest.skip("the compiled extension is not there")
    whole, pieces = (every_pattern(0.37, (dtype, master, dtype, False), n) for n in (2**16, 269))
    assert all(same_bits(a, b) for a, b in zip(whole, pieces, strict=True))
