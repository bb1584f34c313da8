"""The CUDA and Triton kernels on a GPU: what only hardware shows. The cases that every backend runs are elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import fused
from fused import backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "split": (torch.bfloat16, {"master_weights": "split", "state_dtype": torch.bfloat16}),
    "int8": (torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8"}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
}


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Name of each backend with kernels for GPUs."""
    name: str = request.param
    available, reason = backends.status()[name]
    if not available:
        pytest.skip(reason)
    return name


def model(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (0, 1, 7, 64, 1023, 8195, 70_001)
    params = [torch.randn(n, generator=generator).to(device, dtype).requires_grad_() for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return params


def tensors(optimizer: fused.FusedOptimizer) -> list[torch.Tensor]:
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            result += [p.detach(), *(value for _, value in sorted(optimizer.state[p].items()))]
    return result


@pytest.mark.parametrize("storage", OPTIONS)
def test_same_bits_as_the_cpu(kernels: str, storage: str) -> None:
    # Adam's bias correction takes powers, which a GPU may round to another last bit of float64 than the C library does.
    make = fused.AdamW if kernels == "cuda" else fused.Lion
    dtype, options = OPTIONS[storage]
    results = []
    for device, backend in (("cuda", kernels), ("cpu", "cpu")):
        optimizer = make(model(device, dtype), lr=0.01, weight_decay=0.1, backend=backend, **options)
        for _ in range(3):
            optimizer.step()
        results.append([t.cpu() for t in tensors(optimizer)])
    for ours, theirs in zip(*results, strict=True):
        if make is fused.AdamW and ours.dtype == torch.float64:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(ours, theirs)


def matrices(dtype: torch.dtype) -> list[torch.Tensor]:
    """Every way in which Adafactor's kernels cut a tensor."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((0,), (8195,), (600, 3, 3), (70, 61), (9001, 1), (3, 1399), (2, 700, 1288), (300, 4096))
    params = [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to("cuda", dtype)
    return params


def needs_adafactor(kernels: str) -> None:
    if not backends._has_kernels(kernels, "adafactor"):
        pytest.skip(f"{kernels} has no kernels for Adafactor")


@pytest.mark.parametrize("storage", OPTIONS)
def test_adafactor_repeats_to_the_bit_and_follows_the_reference(kernels: str, storage: str) -> None:
    needs_adafactor(kernels)
    dtype, options = OPTIONS[storage]
    results = []
    for backend in (kernels, kernels, "reference"):
        optimizer = fused.Adafactor(matrices(dtype), lr=0.1, beta1=0.9, max_grad_norm=1.0, backend=backend, **options)
        for _ in range(3):
            optimizer.step()
        results.append(tensors(optimizer))
    for first, second, expected in zip(*results, strict=True):
        assert torch.equal(first, second)
        if first.dtype in (torch.float32, torch.float64) and not options:
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
        elif first.is_floating_point():
            torch.testing.assert_close(first.float(), expected.float(), rtol=2**-6, atol=2e-3)


@pytest.mark.parametrize("rule", ["AdamW", "Adafactor"])
@pytest.mark.parametrize("storage", OPTIONS)
def test_graph_replays_are_eager_steps(kernels: str, storage: str, rule: str) -> None:
    if rule == "Adafactor":
        needs_adafactor(kernels)
    dtype, options = OPTIONS[storage]
    eager, captured = (
        getattr(fused, rule)(
            matrices(dtype) if rule == "Adafactor" else model("cuda", dtype),
            lr=torch.tensor(0.01, device="cuda"),
            max_grad_norm=1.0,
            backend=kernels,
            **options,
        )
        for _ in range(2)
    )
    eager.step()
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (0.02, 0.005):
        for optimizer in (eager, captured):
            optimizer.param_groups[0]["lr"].fill_(lr)
        eager.step()
        graph.replay()
    for a, b in zip(tensors(eager), tensors(captured), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["AdamW", "Adafactor"])
def test_nothing_waits_for_the_device(kernels: str, rule: str) -> None:
    if rule == "Adafactor":
        needs_adafactor(kernels)
    params = matrices(torch.float32)
    optimizer = getattr(fused, rule)(params, lr=0.01, max_grad_norm=1.0, skip_nonfinite=True, backend=kernels)
    optimizer.step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_another_stream(kernels: str) -> None:
    first, second = model("cuda", torch.float32), model("cuda", torch.float32)
    plain, streamed = (fused.AdamW(params, lr=0.01, backend=kernels) for params in (first, second))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        plain.step()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            for p in second:
                assert p.grad is not None
                p.grad.mul_(1.0)
            streamed.step()
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(tensors(plain), tensors(streamed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_in_one_optimizer(kernels: str) -> None:
    params = [*model("cuda:0", torch.float32), *model("cuda:1", torch.float32)]
    optimizer = fused.AdamW(params, lr=0.01, max_grad_norm=1.0, backend=kernels)
    optimizer.step()
    half = len(params) // 2
    for a, b in zip(params[:half], params[half:], strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.large
def test_more_elements_than_an_int32_counts(kernels: str) -> None:
    n = 2**31 + 70_001
    if torch.cuda.mem_get_info()[0] < 5 * n * 2:
        pytest.skip("needs 22 GB of GPU memory")
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda").requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = fused.AdamW([p], lr=0.5, weight_decay=0.0, max_grad_norm=float("inf"), backend=kernels)
    optimizer.step()
    assert p.detach().amax().item() == p.detach().amin().item() == -0.5
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(n**0.5)


def test_debugging_checks_every_launch() -> None:
    available, reason = backends.status()["cuda"]
    if not available:
        pytest.skip(reason)
    program = (
        "import torch, fused\n"
        "p = torch.zeros(10, device='cuda').requires_grad_(); p.grad = torch.ones(10, device='cuda')\n"
        "o = fused.AdamW([p], lr=0.1); o.step(); print(round(p[0].item(), 4))\n"
    )
    environment = {**os.environ, "FUSED_CUDA_DEBUG": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "-0.1", result.stderr
