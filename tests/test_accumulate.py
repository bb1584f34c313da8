"""Accumulating gradients of micro-batches in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

import fused
from fused import accumulate


@pytest.fixture(params=["extension", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(accumulate, "extension", None)
    elif accumulate.extension is None:
        pytest.skip("the compiled extension is not there")
    return str(request.param)


SHAPES = ((70, 300), (33,), (0,), (), (5, 7))


def make_params(dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def backward(params: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> list[Tensor]:
    """A micro-batch through autograd; returns the gradients, which are random."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = [(torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype) for p in params]
    loss: Any = sum((p * g).sum() for p, g in zip(params, grads, strict=True))
    loss.backward()
    return grads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_against_float64(path: str, dtype: torch.dtype, hooks: bool, average: bool) -> None:
    params = make_params(dtype)
    accumulator = fused.GradientAccumulator(params, average=average, hooks=hooks)
    addresses = [buffer.data_ptr() for buffer in accumulator.buffers]
    for window in range(2):
        sums = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
        for micro in range(5):
            for total, grad in zip(sums, backward(params, 10 * window + micro), strict=True):
                total += grad.double()
            if not hooks:
                accumulator.accumulate()
            assert all(p.grad is None for p in params)
        assert accumulator.count == 5
        accumulator.finish()
        for param, total, address in zip(params, sums, addresses, strict=True):
            assert param.grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert param.grad.data_ptr() == address
            torch.testing.assert_close(param.grad.double(), total / 5 if average else total, rtol=1e-6, atol=1e-6)
        accumulator.reset()
        assert all(p.grad is None for p in params) and accumulator.count == 0


def test_small_summands_survive(path: str) -> None:
    param = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    accumulator = fused.GradientAccumulator([param], average=False)
    param.grad = torch.ones(64, dtype=torch.bfloat16)
    accumulator.accumulate()
    for _ in range(256):
        param.grad = torch.full((64,), 2.0**-9, dtype=torch.bfloat16)
        accumulator.accumulate()
    accumulator.finish()
    assert torch.equal(param.grad, torch.full((64,), 1.5))


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"skip_nonfinite": True}], ids=str)
def test_step_reads_the_average(path: str, backend: Backend, hooks: bool, options: dict[str, Any]) -> None:
    params, twins = (make_params(torch.bfloat16, device=backend.device) for _ in range(2))
    for twin in twins:
        twin.grad_dtype = None
    ours = fused.AdamW(params, lr=0.1, master_weights="fp32", backend=backend.name, **options)
    theirs = fused.AdamW(twins, lr=0.1, master_weights="fp32", backend=backend.name, **options)
    accumulator = fused.GradientAccumulator(ours, hooks=hooks)
    for window in range(4):
        sums = [torch.zeros(p.shape, device=p.device) for p in params]
        for micro in range(4):
            for total, grad in zip(sums, backward(params, 10 * window + micro), strict=True):
                total += grad
            if not hooks and micro < 3:  # the step adds the last one
                accumulator.accumulate()
        ours.step()
        assert all(p.grad is None for p in params) and accumulator.count == 0
        for twin, total in zip(twins, sums, strict=True):
            twin.grad = total / 4
        theirs.step()
        for a, b in zip(params, twins, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(ours.state[a]["master"], theirs.state[b]["master"], rtol=1e-6, atol=1e-6)
        if options:
            torch.testing.assert_close(ours.grad_norm, theirs.grad_norm)


@pytest.mark.parametrize("unscale", [False, True])
def test_with_a_scaler(path: str, unscale: bool) -> None:
    params, twins = make_params(torch.float16), make_params(torch.float16)
    for twin in twins:
        twin.grad_dtype = None
    ours = fused.AdamW(params, master_weights="fp32", max_grad_norm=None if unscale else 0.1)
    theirs = fused.AdamW(twins, master_weights="fp32", max_grad_norm=0.1)
    accumulator = fused.GradientAccumulator(ours)
    scaler = fused.GradScaler("cpu", init_scale=256.0, growth_interval=None)
    scaler.scale(torch.ones(()))
    for window in range(6):
        sums = [torch.zeros(p.shape) for p in params]
        bad = window in (1, 4)
        for micro in range(4):
            for total, grad in zip(sums, backward(params, 10 * window + micro, 256.0), strict=True):
                total += grad / 256.0
            if bad and micro == 2:
                params[1].grad[7] = float("inf")
            accumulator.accumulate()
        if unscale:
            scaler.unscale_(ours)
            fused.clip_grad_norm_(params, 0.1)
        scaler.step(ours)
        scaler.update()
        assert all(p.grad is None for p in params)
        if bad:
            assert float(ours.found_inf) == 1.0
            continue
        for twin, total in zip(twins, sums, strict=True):
            twin.grad = total / 4
        theirs.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
        assert float(ours.state[a]["step"]) == 4.0


def test_parameters_without_gradient_are_not_stepped(path: str) -> None:
    params = make_params(torch.float32)
    optimizer = fused.SGD(params, lr=1.0)
    accumulator = fused.GradientAccumulator(optimizer)
    before = [p.detach().clone() for p in params]
    params[0].sum().backward()
    accumulator.accumulate()
    (params[0].sum() + params[1].sum()).backward()
    optimizer.step()
    assert torch.allclose(params[0], before[0] - 1.0)
    assert torch.allclose(params[1], before[1] - 0.5)  # of two micro-batches
    assert torch.equal(params[4], before[4])
    params[1].sum().backward()
    optimizer.step()  # the sum of the last window is gone
    assert torch.allclose(params[0], before[0] - 1.0)


def test_other_layouts_and_complex(path: str) -> None:
    image = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    wave = torch.nn.Parameter(torch.zeros(9, dtype=torch.complex64))
    accumulator = fused.GradientAccumulator([("image", image), ("wave", wave)], average=False)
    one, two = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    turn = torch.randn(9, dtype=torch.complex64)
    for grad in (one, two):
        image.grad, wave.grad = grad.clone(), turn.clone()
        accumulator.accumulate()
    accumulator.finish()
    torch.testing.assert_close(image.grad, one + two)
    torch.testing.assert_close(wave.grad, 2 * turn)


def test_loading_a_state_dict_keeps_it(path: str) -> None:
    """As launchers do that prepare an optimizer by loading its own state."""
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = fused.SGD([param], lr=1.0)
    accumulator = fused.GradientAccumulator(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    param.grad = torch.ones(4)
    accumulator.accumulate()
    optimizer.step()
    assert torch.equal(param, torch.full((4,), -1.0))


def test_negated_gradients(path: str) -> None:
    phase = torch.nn.Parameter(torch.zeros(()))
    accumulator = fused.GradientAccumulator([phase], average=False)
    for _ in range(2):
        phase.grad = torch.complex(torch.ones(()), torch.full((), 3.0)).conj().imag
        assert phase.grad.is_neg()
        accumulator.accumulate()
    accumulator.finish()
    assert float(phase.grad) == -6.0


def test_errors(path: str) -> None:
    embedding = torch.nn.Parameter(torch.zeros(4))
    dense = torch.nn.Parameter(torch.zeros(4))
    accumulator = fused.GradientAccumulator([("dense", dense), ("table", embedding)])
    dense.grad = torch.ones(4)
    embedding.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,))
    with pytest.raises(RuntimeError, match=r"'table' has a sparse"):
        accumulator.accumulate()
    assert accumulator.count == 0 and dense.grad is not None
    embedding.grad = None
    accumulator.finish()
    with pytest.raises(RuntimeError, match="reset"):
        accumulator.accumulate()
    with pytest.raises(ValueError, match="dtype"):
        fused.GradientAccumulator([dense], torch.bfloat16)
    with pytest.raises(TypeError, match="average must be True or False, got 'no'"):
        fused.GradientAccumulator([dense], average="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SGD"):
        accumulator.attach(torch.optim.SGD([dense]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="among"):
        accumulator.attach(fused.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))


def test_a_step_that_raises_keeps_the_sum(path: str) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    other = torch.nn.Parameter(torch.zeros(4))
    optimizer = fused.SGD([param, other], lr=1.0)
    accumulator = fused.GradientAccumulator(optimizer)
    param.grad = torch.ones(4)
    accumulator.accumulate()
    other.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,))
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    other.grad = None
    assert accumulator.count == 1 and param.grad is None
    optimizer.step()
    assert torch.equal(param, torch.full((4,), -1.0))


def test_hooks_can_be_removed(path: str) -> None:
    params = make_params(torch.float32)
    accumulator = fused.GradientAccumulator(params, hooks=True)
    accumulator.remove_hooks()
    backward(params, 0)
    assert accumulator.count == 0 and params[0].grad is not None


def test_same_bits_for_threads(threads: None) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        params = make_params(torch.bfloat16)
        accumulator = fused.GradientAccumulator(params)
        for micro in range(3):
            backward(params, micro)
            accumulator.accumulate()
        accumulator.finish()
        results.append([p.grad for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
