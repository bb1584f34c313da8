"""What ``test_triton_interpreter.py`` runs in a process of its own: the Triton kernels, played by Triton's interpreter.

Not collected by itself: the variable TRITON_INTERPRET has to be set before any kernel is defined.
"""

from __future__ import annotations

import interpreted
import norms
import oracle
import pytest
import torch
import triton
import triton.language as tl
from cases import CASES

import fused
from fused import formats
from fused.backends import table
from fused.backends import triton as triton_backend
from fused.backends.triton import formats as block_formats

# a base of zero has the logarithm it should have
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
CPU = torch.device("cpu")
interpreted.hasten()
SIZES = [(0,), (1,), (7,), (63,), (3, 341), (5000,)]
ROWS = [pytest.param(case, variant, id=f"{case.name}-{variant.name}") for case in CASES for variant in case.variants]


@pytest.mark.parametrize(("case", "variant"), ROWS)
def test_float32(case, variant):
    params = oracle.make_params(SIZES, torch.float32, CPU)
    oracle.run(case, variant, case.make(params, variant, backend="triton"), params, steps=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dtypes(case, dtype):
    variant = case.variants[0]
    params = oracle.make_params([(33,), (1030,)], dtype, CPU)
    oracle.run(case, variant, case.make(params, variant, backend="triton"), params, steps=2)


def _both(dtype, gradient_dtype=None, steps=2, sizes=(1, 7, 1500), **options):
    """Lion with Triton and with the C++ kernels, to be compared bit for bit."""
    results = []
    for backend in ("cpu", "triton"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
        optimizer = fused.Lion(params, lr=1e-2, weight_decay=0.1, backend=backend, **options)
        for _ in range(steps):
            for p in params:
                p.grad_dtype = None
                p.grad = torch.randn(p.shape).to(gradient_dtype or dtype)
            optimizer.step()
        state = [value for p in params for value in optimizer.state[p].values()]
        results.append([p.detach() for p in params] + state)
    return zip(*results, strict=True)


@pytest.mark.parametrize("master_weights", [None, "fp32", "split", "split8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_storage_is_the_cpu_kernels_to_the_bit(dtype, master_weights, stochastic):
    options = {"master_weights": master_weights, "stochastic_rounding": stochastic, "seed": (1 << 63) + 5}
    for expected, actual in _both(dtype, state_dtype="bfloat16", **options):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(dtype):
    for expected, actual in _both(torch.float32, gradient_dtype=dtype):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping(norm_type):
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 2500)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        p.grad = torch.randn_like(p)
        twin.grad = p.grad.clone()
    empty = torch.nn.Parameter(torch.empty(0))
    empty.grad = torch.empty(0)
    optimizer = fused.SGD([empty, *params], lr=1.0, max_grad_norm=0.5, norm_type=norm_type, backend="triton")
    optimizer.step()
    norms = [torch.linalg.vector_norm(twin.grad, norm_type) for twin in twins]
    norm = torch.nn.utils.clip_grad_norm_(twins, 0.5, norm_type)
    torch.optim.SGD(twins, lr=1.0).step()
    torch.testing.assert_close(optimizer.grad_norm, norm.detach())
    torch.testing.assert_close(torch.stack(list(optimizer.grad_norms().values())), torch.tensor([0.0, *norms]))
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", norms.DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_norm_of_hard_gradients(dtype, norm_type):
    norms.check(dtype, norm_type, CPU, length=3000, backend="triton")


def test_skipped_step_changes_nothing():
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 2500)]
    optimizer = fused.AdamW(params, skip_nonfinite=True, backend="triton")
    for bad in (False, True):
        for p in params:
            p.grad = torch.randn_like(p)
        if bad:
            params[1].grad[2400] = float("nan")
            before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        optimizer.step()
        assert optimizer.found_inf == float(bad)
    after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    params[1].grad[2400] = 0.0
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2.0


def test_groups_and_missing_gradients():
    results = []
    for backend in ("cpu", "triton"):
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(40)) for _ in range(4)]
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.3, "maximize": True}]
        optimizer = fused.Lion(groups, lr=0.01, backend=backend)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(40) if (i + step) % 3 else None
            optimizer.param_groups[1]["lr"] = 0.02 * (step + 1)
            optimizer.step()
        results.append(params)
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def test_odd_layouts():
    results = []
    for backend in ("cpu", "triton"):
        torch.manual_seed(3)
        base = torch.randn(40, 60)
        params = [torch.nn.Parameter(t) for t in (base[:, 1::2], torch.randn(1100)[1:], base.t())]
        optimizer = fused.Lion(params, lr=0.1, backend=backend)
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
        results.append([p.detach().clone() for p in params])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def test_learning_rate_on_the_device():
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        torch.manual_seed(4)
        p = torch.nn.Parameter(torch.randn(40))
        p.grad = torch.randn(40)
        fused.SGD([p], lr=lr, momentum=0.5, backend="triton").step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=["plain", "clipping"])
def test_warmup_compiles_what_the_step_launches(monkeypatch, options):
    launched = interpreted.record_launches(monkeypatch)
    params = [torch.nn.Parameter(torch.randn(5).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    groups = [{"params": params[:1]}, {"params": params[1:], "master_weights": "split", "stochastic_rounding": True}]
    optimizer = fused.AdamW(groups, backend="triton", **options)
    before = [p.detach().clone() for p in params]
    fused.warmup(optimizer)
    assert launched and all(launch.ahead for launch in launched)
    assert not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    interpreted.check_compiled_ahead(launched)


def test_8bit_first_moments_are_the_cpu_kernels_to_the_bit():
    gradients = [[_wide(n) for n in (1, 31, 33, 2500)] for _ in range(3)]
    results = []
    for backend in ("cpu", "triton"):
        params = [torch.nn.Parameter(torch.ones(g.shape)) for g in gradients[0]]
        optimizer = fused.Lion(params, lr=1e-2, state_dtype="int8", backend=backend)
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        results.append([p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def _wide(n):
    x = torch.randn(n) * torch.exp(4 * torch.randn(n))
    x[::7] = 0.0
    x[100:101] = 1e30
    return x


@triton.jit
def _encode_and_decode(values, codes, scales, decoded, step, SIGNED: tl.constexpr):
    element = tl.arange(0, 1024).to(tl.int64)
    x = tl.reshape(tl.load(values + element), (32, 32))
    code, scale = block_formats.float_to_blocks8(x, tl.arange(0, 32), tl.load(step), SIGNED)
    tl.store(codes + element, tl.reshape(code, (1024,)))
    tl.store(scales + tl.arange(0, 32), scale.to(tl.int16))
    tl.store(decoded + element, tl.reshape(block_formats.blocks8_to_float(code, scale, SIGNED), (1024,)))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8bit_blocks_are_those_of_the_specification(signed):
    for step in (1, 2, 12345):
        x = _wide(1024) if signed else _wide(1024).abs()
        x[500], x[600], x[900:960] = float("nan"), float("inf"), 0.0
        x[:64] *= 1e-38
        codes, scales = torch.empty(1024, dtype=torch.uint8), torch.empty(32, dtype=torch.int16)
        decoded = torch.empty(1024)
        _encode_and_decode[(1,)](x, codes, scales, decoded, torch.tensor([step]), SIGNED=signed)
        expected_codes, expected_scales = formats.encode_blocks8(x, signed, None if signed else step)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scales, expected_scales)
        expected = formats.decode_blocks8(codes, scales, signed)
        assert torch.equal(decoded.view(torch.int32), expected.view(torch.int32))


@triton.jit
def _through_16_bits(values, halves, widened, BFLOAT16: tl.constexpr, SIZE: tl.constexpr):
    element = tl.arange(0, SIZE)
    x = tl.load(values + element)
    half = block_formats.float_to_bf16(x) if BFLOAT16 else block_formats.float_to_fp16(x)
    tl.store(halves + element, half.to(tl.int16))
    wide = block_formats.bf16_to_float(half) if BFLOAT16 else block_formats.fp16_to_float(half)
    tl.store(widened + element, wide)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_conversions_are_torchs_to_the_bit(dtype):
    """Every value of 16 bits, what lies halfway to the next and beside that, and the ends of the range."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    halfway = (every.double() + every.roll(-1).double()).div(2).float()
    beside = [torch.nextafter(halfway, torch.full_like(halfway, end)) for end in (-torch.inf, torch.inf)]
    ends = torch.tensor([65519.996, 65520.0, 3.4028235e38, 2.0**-149, 2.0**-25, 2.0**-24 * 1.5])
    x = torch.cat([every, halfway, *beside, ends, -ends])
    x = torch.nn.functional.pad(x, (0, 2**19 - x.numel()))
    halves, widened = torch.empty(x.shape, dtype=torch.int16), torch.empty_like(x)
    _through_16_bits[(1,)](x, halves, widened, BFLOAT16=dtype == torch.bfloat16, SIZE=x.numel())
    number = ~x.isnan()
    assert torch.equal(halves[number], x.to(dtype).view(torch.int16)[number])
    assert torch.equal(widened[number].view(torch.int32), x.to(dtype).float().view(torch.int32)[number])
    assert widened[~number].isnan().all()


@pytest.mark.parametrize("make", [fused.AdamW, fused.Adafactor])
def test_what_a_graph_has_seen_is_never_written_to_again(make, monkeypatch):
    """A capture is pretended: its launches run at once, and what it uploads is taken away, as if it had not."""
    capturing = [False]
    for module in (triton_backend, table):
        monkeypatch.setattr(module, "capturing", lambda device: capturing[0])
    results = []
    for backend in ("triton", "cpu"):
        params = oracle.make_params([(40, 70), (3, 8), (1500,)], torch.float32, CPU)
        with torch.no_grad():
            for i, p in enumerate(params):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        optimizer = make(params, lr=0.01, max_grad_norm=1.0, backend=backend)
        kept = []
        for step, in_graph in enumerate((False, True, False, True, True, False, False)):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            if step == 5:
                params[1].grad = None
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + step)
            optimizer.max_grad_norm = 1.0 + step
            capturing[0] = in_graph and backend == "triton"
            optimizer.step()
            if backend == "triton":
                (batch,) = optimizer._plan.batches
                assert all(torch.equal(tensor, before) for tensor, before in kept)
                if in_graph:
                    tables = [getattr(batch, name) for name in ("rows", "groups", "scalars")]
                    tables += [launch.starts for launch in batch.launches] + [batch.counters, batch.partials]
                    for tensor in tables:
                        tensor.fill_(77)
                    kept += [(tensor, tensor.clone()) for tensor in tables]
        results.append([p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_state_is_not_made_in_a_graph(monkeypatch):
    monkeypatch.setattr(table, "capturing", lambda device: True)
    monkeypatch.setattr(triton_backend, "capturing", lambda device: True)
    params = oracle.make_params([(5,)], torch.float32, CPU)
    params[0].grad = torch.ones(5)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"has no state yet.*step once before capturing"):
        fused.AdamW(params, lr=0.1, backend="triton").step()
    assert torch.equal(params[0].detach(), before)
    fused.SGD(params, lr=0.1, backend="triton").step()  # keeps none
    assert torch.equal(params[0].detach(), before - 0.1)
