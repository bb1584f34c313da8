"""The CUDA kernels without a GPU: their source, played by the CPU (``cuda_on_cpu``), against the CPU's kernels.

The rules are compiled from one text and neither build contracts floating-point operations, so every case has to agree
to the bit; the CPU's kernels are held against float64 references elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import norms
import oracle
import pytest
import torch
from cases import IDS, VARIANTS, Case, Variant
from cuda_on_cpu.backend import FORWARD, RANDOM, REVERSE, CudaOnCpu, device_table
from cuda_on_cpu.build import CSRC, FLAGS, SANITIZED, build, compiler, run
from cuda_on_cpu.defects import Defect, check_found
from torch import Tensor

import fused

if not CSRC.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
if importlib.util.find_spec("pybind11") is None or shutil.which(compiler()[0]) is None:
    pytest.skip("needs pybind11 and a C++ compiler", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("fibers and linking are as on Linux", allow_module_level=True)

BF16, FP16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Around vectors (4, 8), 8-bit blocks (64), rounds (2048) and chunks (8192); 32768 is what one block of the norm reads.
SIZES = (0, 1, 3, 7, 8, 63, 64, 65, 0, 1023, 2049, 8191, 8192, 8193, 32769, 3)
FEW_SIZES = (0, 1, 7, 65, 1023, 8195)

RULES: dict[str, tuple[Callable[..., fused.FusedOptimizer], dict[str, Any]]] = {
    "adam": (fused.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (fused.AdamW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adam_amsgrad": (fused.AdamW, {"lr": 0.01, "amsgrad": True}),
    "lion": (fused.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    "sgd": (fused.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum": (fused.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "rmsprop": (fused.RMSprop, {"lr": 0.01}),
    "rmsprop_momentum": (fused.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "rmsprop_centered": (fused.RMSprop, {"lr": 0.01, "centered": True}),
    "rmsprop_centered_momentum": (fused.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "adagrad": (fused.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "adadelta": (fused.Adadelta, {"weight_decay": 0.1}),
}

STORAGE: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {  # parameter, gradient, options
    "float32": (F32, F32, {}),
    "float64": (F64, F64, {}),
    "float64-grad32": (F64, F32, {}),
    "bfloat16": (BF16, BF16, {}),
    "float16": (FP16, FP16, {}),
    "grad-bfloat16": (F32, BF16, {}),
    "grad-float16": (F32, FP16, {}),
    "grad-float64": (F32, F64, {}),
    "master-bfloat16": (BF16, BF16, {"master_weights": "fp32"}),
    "master-float16": (FP16, F32, {"master_weights": "fp32", "state_dtype": BF16}),
    "split-bfloat16": (BF16, F32, {"master_weights": "split", "state_dtype": FP16}),
    "split-float16": (FP16, FP16, {"master_weights": "split"}),
    "split8-bfloat16": (BF16, BF16, {"master_weights": "split8", "state_dtype": "int8"}),
    "split8-float16": (FP16, FP16, {"master_weights": "split8", "state_dtype": "int8"}),
    "int8": (F32, F32, {"state_dtype": "int8"}),
    "stochastic-bfloat16": (BF16, BF16, {"stochastic_rounding": True}),
    "stochastic-float16": (FP16, FP16, {"stochastic_rounding": True, "state_dtype": BF16, "seed": 2**40 + 7}),
    "stochastic-split8-bfloat16": (
        BF16,
        BF16,
        {"master_weights": "split8", "stochastic_rounding": True, "state_dtype": BF16},
    ),
    "stochastic-split8-float16": (
        FP16,
        F32,
        {"master_weights": "split8", "stochastic_rounding": True, "state_dtype": FP16},
    ),
}


def make_params(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in sizes]


def set_grads(params: list[Tensor], dtype: torch.dtype, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        # Two decades, zeros among them, and a missing gradient now and then.
        magnitude = scale * 10 ** (torch.rand(p.shape, generator=generator) * 2 - 2)
        g = torch.randn(p.shape, generator=generator) * magnitude
        g = torch.where(torch.rand(p.shape, generator=generator) < 0.05, 0.0, g)
        p.grad_dtype = None  # any: that a gradient's dtype may differ is under test here
        p.grad = None if p.numel() == 3 and step == 1 else g.to(dtype)


Everything = list[Tensor]


def everything(optimizer: fused.FusedOptimizer) -> Everything:
    tensors: Everything = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors.append(p.detach())
            tensors += [optimizer.state[p][key] for key in sorted(optimizer.state.get(p, {}))]
    return tensors


def bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def assert_same(ours: Everything, theirs: Everything) -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        different = (bits(a) != bits(b)).flatten().nonzero()
        assert different.numel() == 0, (
            f"tensor {i} ({a.dtype}, {tuple(a.shape)}): {different.numel()} elements differ, first "
            f"{int(different[0])}: "
            f"{a.flatten()[different[0]].item()} != {b.flatten()[different[0]].item()}"
        )


def both(
    make: Callable[..., fused.FusedOptimizer],
    options: dict[str, Any],
    sizes: tuple[int, ...] = FEW_SIZES,
    dtype: torch.dtype = F32,
    grad_dtype: torch.dtype = F32,
    steps: int = 3,
    scale: float = 1.0,
    shape: Callable[[list[Tensor]], list[Tensor]] = lambda params: params,
) -> tuple[Everything, Everything]:
    """The same steps by the CUDA kernels and by the CPU's."""
    results = []
    for backend in (None, "cpu"):
        params = shape(make_params(sizes, dtype))
        optimizer = make(params, backend=backend, **options)
        for step in range(steps):
            set_grads(params, grad_dtype, step, scale)
            optimizer.step()
        results.append(everything(optimizer))
    return results[0], results[1]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_as_the_cpu(served: CudaOnCpu, rule: str, storage: str) -> None:
    (make, options), (dtype, grad_dtype, more) = RULES[rule], STORAGE[storage]
    assert_same(*both(make, {**options, **more}, dtype=dtype, grad_dtype=grad_dtype))


QUOTIENTS = """
#include <cstdint>
#include "rules.h"
extern "C" int64_t wrong(const float* x, int64_t count, float divisor) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float q = fused::quotient(x[i], divisor, 1.0f / divisor), expected = x[i] / divisor;
    found += q != expected && (q == q || expected == expected);
  }
  return found;
}
"""


def test_a_shared_divisor_divides_to_the_bit(tmp_path: Path) -> None:
    """Every mantissa of a root, and its ends, by corrections of the second moment."""
    source = tmp_path / "quotients.cpp"
    source.write_text(QUOTIENTS)
    library = tmp_path / "quotients.so"
    run([*compiler(), *FLAGS, "-fvisibility=default", f"-I{CSRC}", "-shared", str(source), "-o", str(library)])
    wrong = ctypes.CDLL(str(library)).wrong
    wrong.restype = ctypes.c_int64
    wrong.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float]
    mantissas = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
    ends = torch.tensor([0.0, 2.0**-149, 2.0**-126, 3.4028234663852886e38, math.inf, math.nan]).sqrt()
    x = torch.cat([mantissas, ends, ends[1:4].repeat_interleave(1000) * torch.linspace(1, 4, 3000)])
    corrections = [math.sqrt(1 - beta**step) for beta, step in ((0.999, 1), (0.999, 7), (0.95, 2), (1 - 1e-9, 1))]
    most = 1.0 - 2.0**-24
    for divisor in (*corrections, 1.0, most, most / 2):
        assert wrong(x.data_ptr(), x.numel(), divisor) == 0, divisor


@pytest.mark.parametrize("case, variant", VARIANTS, ids=IDS)
def test_float64_follows_the_references(served: CudaOnCpu, case: Case, variant: Variant) -> None:
    params = oracle.make_params([(0,), (1,), (7,), (1023,), (8195,), ()], F64, torch.device("cpu"))
    checked = oracle.Oracle(case, variant, case.make(params, variant), params)
    for grad_dtype in (F64, F32, BF16):
        oracle.set_gradients(params, (grad_dtype, F64))
        checked.step()


@pytest.mark.parametrize("storage", ["float32", "split8-bfloat16", "float64", "stochastic-bfloat16"])
def test_every_size(served: CudaOnCpu, storage: str) -> None:
    dtype, grad_dtype, more = STORAGE[storage]
    served.order(RANDOM)
    assert_same(*both(fused.AdamW, {"lr": 0.01, **more}, SIZES, dtype, grad_dtype))


@pytest.mark.parametrize("order", [REVERSE, RANDOM, RANDOM + 1])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_order_of_threads_does_not_matter(served: CudaOnCpu, storage: str, order: int) -> None:
    dtype, grad_dtype, more = STORAGE[storage]
    options = {"lr": 0.01, "max_grad_norm": 1.0, **more}
    results = []
    for which in (FORWARD, order):
        served.order(which)
        params = make_params(SIZES, dtype)
        optimizer = fused.AdamW(params, **options)
        for step in range(2):
            set_grads(params, grad_dtype, step)
            optimizer.step()
        assert optimizer.grad_norm is not None
        results.append([*everything(optimizer), optimizer.grad_norm])
    assert_same(results[0], results[1])


def test_mixed_dtypes_and_groups_in_one_step(served: CudaOnCpu) -> None:
    def step_on(backend: str | None) -> Everything:
        kinds = (F32, BF16, F64, FP16, F32)
        groups = [
            {"params": make_params((5, 130 + i), kind), "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i}
            for i, kind in enumerate(kinds)
        ]
        optimizer = fused.AdamW(groups, backend=backend, max_grad_norm=0.5)
        for step in range(3):
            for group in optimizer.param_groups:
                set_grads(group["params"], group["params"][0].dtype, step)
            optimizer.step()
        return everything(optimizer)

    ours, theirs = step_on(None), step_on("cpu")
    for a, b in zip(ours, theirs, strict=True):  # the norms are added up in another order
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype in (BF16, FP16) else 1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "split8-float16", "int8", "float64"])
def test_misaligned_and_strided_tensors(served: CudaOnCpu, storage: str) -> None:
    dtype, grad_dtype, more = STORAGE[storage]

    def views(params: list[Tensor]) -> list[Tensor]:
        shifted = [torch.cat((p.new_zeros(1), p.detach()))[1:].requires_grad_() for p in params]
        gaps = torch.randn(4, 33, 2, generator=torch.Generator().manual_seed(5)).to(dtype)[:, :, 0].requires_grad_()
        turned = torch.randn(9, 70, generator=torch.Generator().manual_seed(6)).to(dtype).t().requires_grad_()
        return [*shifted, gaps, turned]

    assert_same(*both(fused.AdamW, {"lr": 0.01, **more}, dtype=dtype, grad_dtype=grad_dtype, shape=views))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float64"])
def test_neighbours_in_memory_stay_as_they_are(served: CudaOnCpu, storage: str) -> None:
    check_neighbours(storage)


def check_neighbours(storage: str) -> None:
    """A parameter that begins where vectors fit and ends within one, amid others' elements."""
    dtype, _, more = STORAGE[storage]
    flat = torch.ones(64, dtype=dtype)
    p = flat[16:29].requires_grad_()
    p.grad = torch.ones_like(p)
    fused.AdamW([p], lr=0.1, weight_decay=1.0, **more).step()
    assert bool((p < 1).all())
    assert bool((flat[:16] == 1).all()) and bool((flat[29:] == 1).all())


def test_misaligned_gradients_alone(served: CudaOnCpu) -> None:
    results = []
    for backend in (None, "cpu"):
        (p,) = make_params((8199,), F32)
        optimizer = fused.AdamW([p], lr=0.01, backend=backend)
        flat = torch.randn(8200, generator=torch.Generator().manual_seed(3))
        p.grad = flat[1:]  # as in a bucket of DistributedDataParallel
        optimizer.step()
        results.append(everything(optimizer))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("grad_dtype", [F32, BF16, FP16, F64], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norm(served: CudaOnCpu, norm_type: float, grad_dtype: torch.dtype) -> None:
    params = make_params(SIZES, F32 if grad_dtype is F64 else grad_dtype)
    optimizer = fused.SGD(params, lr=0.0, max_grad_norm=1.0, norm_type=norm_type)
    set_grads(params, grad_dtype, 0)
    optimizer.step()
    flat = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None])
    expected = flat.abs().max() if norm_type == math.inf else flat.square().sum().sqrt()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(expected.item(), rel=2e-7)
    before = optimizer.grad_norm.clone()
    served.order(REVERSE)
    optimizer.step()
    assert torch.equal(before, optimizer.grad_norm)


@pytest.mark.parametrize("grad_dtype", norms.DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norm_of_hard_gradients(served: CudaOnCpu, norm_type: float, grad_dtype: torch.dtype) -> None:
    norms.check(grad_dtype, norm_type, torch.device("cpu"))


def test_clipping_scales_the_update(served: CudaOnCpu) -> None:
    (p,) = make_params((10_000,), F32)
    before = p.detach().clone()
    p.grad = torch.randn(10_000, generator=torch.Generator().manual_seed(9))
    optimizer = fused.SGD([p], lr=1.0, max_grad_norm=0.25)
    optimizer.step()
    clipped = p.grad * (0.25 / (p.grad.double().norm() + 1e-6)).float()
    torch.testing.assert_close(p.detach(), before - clipped, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("storage", ["float32", "split8-bfloat16", "float64"])
def test_a_skipped_step_changes_nothing(served: CudaOnCpu, storage: str, bad: float) -> None:
    dtype, grad_dtype, more = STORAGE[storage]
    params = make_params(FEW_SIZES, dtype)
    optimizer = fused.AdamW(params, lr=0.01, skip_nonfinite=True, **more)
    set_grads(params, grad_dtype, 0)
    optimizer.step()
    before = [t.clone() for t in everything(optimizer)]
    set_grads(params, grad_dtype, 2)
    assert params[-1].grad is not None
    params[-1].grad[-1] = bad
    optimizer.step()
    assert optimizer.found_inf is not None and optimizer.found_inf.item() == 1.0
    assert_same(everything(optimizer), before)
    set_grads(params, grad_dtype, 2)
    optimizer.step()
    assert optimizer.found_inf.item() == 0.0
    assert not torch.equal(params[-1].detach(), before[-1])
    assert optimizer.state[params[-1]]["step"].item() == 2.0


def test_nonfinite_tensors_are_counted_once_each(served: CudaOnCpu) -> None:
    params = make_params((8192 * 9, 5, 40_000), F32)
    optimizer = fused.SGD(params, lr=0.1, skip_nonfinite=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    (batch,) = optimizer._plan.batches  # type: ignore[union-attr]
    assert params[0].grad is not None and params[2].grad is not None
    params[0].grad[::8192] = math.nan
    params[2].grad[-1] = -math.inf
    for _ in range(2):
        assert batch.reduce(2.0)[1].item() == 2.0
        assert batch.row_values[:, 1].tolist() == [1.0, 0.0, 1.0]
    params[0].grad.zero_()
    params[2].grad.zero_()
    assert batch.reduce(2.0).tolist() == [0.0, 0.0]
    params[0].grad.fill_(1e30)
    assert batch.reduce(2.0)[1].item() == 0.0


def test_row_values(served: CudaOnCpu) -> None:
    params = make_params((0, 5, 100_000, 32_768, 7), F32)
    optimizer = fused.SGD(params, lr=0.1, skip_nonfinite=True)
    set_grads(params, F32, 0)
    params[4].grad = torch.ones(7)
    optimizer.step()
    (batch,) = optimizer._plan.batches  # type: ignore[union-attr]
    batch.reduce(2.0)
    expected = [0.0 if p.grad is None else p.grad.double().square().sum().item() for p in params]
    assert batch.row_values[:, 0].tolist() == pytest.approx(expected, rel=4 * 2.0**-24)  # squares.h
    params[4].grad = None
    optimizer.step()
    assert batch.row_values[4, 0].item() == 0.0


def test_grad_scale_and_found_inf_of_a_scaler(served: CudaOnCpu) -> None:
    (p,) = make_params((100,), F32)
    before = p.detach().clone()
    p.grad = torch.full((100,), 512.0)
    optimizer = fused.SGD([p], lr=1.0, amp_scaling=True)
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 512.0), torch.zeros(())
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 1.0, rtol=0, atol=0)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 1.0, rtol=0, atol=0)


def test_a_tensor_learning_rate_is_read_on_the_device(served: CudaOnCpu) -> None:
    (p,) = make_params((100,), F32)
    lr = torch.full((), 0.5)
    optimizer = fused.SGD([p], lr=lr)
    p.grad = torch.ones(100)
    optimizer.step()
    served.begin_capture()
    optimizer.step()
    assert served.end_capture() == 2
    for value in (0.25, 2.0):
        lr.fill_(value)
        before = p.detach().clone()
        served.replay()
        torch.testing.assert_close(p.detach(), before - value, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [21, 22, 300])
def test_many_groups(served: CudaOnCpu, groups: int) -> None:
    def step_on(backend: str | None) -> Everything:
        params = make_params((5,) * groups, F32)
        optimizer = fused.AdamW([{"params": [p], "lr": 0.001 * (i + 1)} for i, p in enumerate(params)], backend=backend)
        for step in range(3):
            set_grads(params, F32, step)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        return everything(optimizer)

    assert_same(step_on(None), step_on("cpu"))


def test_launches_and_uploads_per_step(served: CudaOnCpu) -> None:
    params = make_params(SIZES * 20, F32)
    optimizer = fused.AdamW(params, lr=0.01)
    grads = [torch.ones_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    table = device_table(optimizer)
    for options, launches in (({}, 2), ({"max_grad_norm": 1.0}, 3), ({"skip_nonfinite": True}, 3)):
        optimizer._options.update(options)
        optimizer.param_groups[0]["lr"] *= 0.5
        before = table.launches, table.uploads
        optimizer.step()
        assert (table.launches - before[0], table.uploads - before[1]) == (launches, 0)
    # New gradients move one address per tensor: 320 of them travel in one launch.
    for p in params:
        p.grad = torch.ones_like(p)
    before = table.launches, table.uploads
    optimizer.step()
    assert (table.launches - before[0], table.uploads - before[1]) == (3, 1)


def test_gradients_that_come_and_go(served: CudaOnCpu) -> None:
    def step_on(backend: str | None) -> Everything:
        params = make_params((10, 9000, 20, 40_000), F32)
        optimizer = fused.AdamW(params, lr=0.01, backend=backend)
        for step, present in enumerate([(0, 1), (1, 2, 3), (), (0,), (0, 1, 2, 3)]):
            set_grads(params, F32, step)
            for i, p in enumerate(params):
                p.grad = p.grad if i in present else None
            optimizer.step()
        return everything(optimizer)

    assert_same(step_on(None), step_on("cpu"))


def test_a_captured_step_keeps_its_own_tables(served: CudaOnCpu) -> None:
    """Eager steps in between, with other gradients and another number of them, do not disturb the graph."""
    params = make_params((100, 9000), F32)
    static = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(params)]
    optimizer = fused.AdamW(params, lr=0.01, max_grad_norm=1.0)

    def use(grads: list[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    use(static)
    optimizer.step()
    served.begin_capture()
    optimizer.step()
    assert served.end_capture() == 3
    expected = make_params((100, 9000), F32)
    reference = fused.AdamW(expected, lr=0.01, max_grad_norm=1.0)

    def reference_step(grads: list[Tensor | None]) -> None:
        for p, g in zip(expected, grads, strict=True):
            p.grad = None if g is None else g.clone()
        reference.step()

    reference_step([*static])
    served.replay()
    reference_step([*static])
    assert_same(everything(optimizer), everything(reference))
    params[0].grad, params[1].grad = None, torch.ones(9000)
    optimizer.step()
    reference_step([None, torch.ones(9000)])
    use(static)
    static[0].mul_(3.0)
    served.replay()
    reference_step([*static])
    assert_same(everything(optimizer), everything(reference))


@pytest.mark.parametrize("make", [fused.AdamW, fused.Adafactor])
def test_tables_find_room_in_what_torch_keeps(make: Any, served: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch holds for later is asked for before a step fails; one that fails changes nothing."""
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def stepped(refusals: int) -> list[Tensor]:
        params = make_params((100, 9000), F32)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer = make(params, lr=0.01, max_grad_norm=1.0)
        before = [p.detach().clone() for p in params]
        if refusals > 1:
            served.refuse_memory(refusals)
            with pytest.raises(RuntimeError, match="cudaMalloc of the tables"):
                optimizer.step()
            assert_same([p.detach() for p in params], before)
        served.refuse_memory(min(refusals, 1))
        optimizer.step()
        return everything(optimizer)

    plenty = stepped(0)
    assert not emptied
    assert_same(stepped(1), plenty)
    assert_same(stepped(2), plenty)
    assert len(emptied) == 3


# ---- what is said where it cannot work ----


def test_reasons(kernels: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)  # os.environ reaches getenv of C through putenv

    def reason(**variables: str) -> str:
        for name, value in variables.items():
            libc.setenv(name.encode(), value.encode(), 1)
        try:
            return str(kernels.extension.cuda_problem(0))
        finally:
            for name in variables:
                libc.unsetenv(name.encode())

    assert reason() == ""
    assert reason(CUDA_ON_CPU_DRIVER="0") == "no NVIDIA driver is loaded"
    assert "supports CUDA 12.4, but the kernels were built with CUDA 13.0" in reason(CUDA_ON_CPU_DRIVER="12040")
    assert "compute capability 7.0" in reason(CUDA_ON_CPU_NO_KERNEL_IMAGE="1")
    assert "there is no CUDA device 3" in kernels.extension.cuda_problem(3)


def test_debugging_names_the_parameter(served: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused.backends import cuda

    params = make_params((10, 20), F32)
    optimizer = fused.AdamW([("first", params[0]), ("second", params[1])], lr=0.01)
    set_grads(params, F32, 0)
    optimizer.step()
    before = [t.clone() for t in everything(optimizer)]
    monkeypatch.setattr(cuda.extension, "cuda_debugging", lambda: True)
    optimizer.step()
    assert not torch.equal(before[0], params[0])
    before = [t.clone() for t in everything(optimizer)]
    monkeypatch.setenv("CUDA_ON_CPU_HOST_POINTERS", "1")
    with pytest.raises(RuntimeError, match="parameter 'first': parameter is not in CUDA memory"):
        optimizer.step()
    assert_same(everything(optimizer), before)


# ---- the tests can fail ----

PLANTED: dict[str, Defect] = {
    "missing-barrier": (
        "block.h",
        "if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;\n  __syncthreads();",
        "if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;",
    ),
    "barrier-before-reuse": (
        "block.h",
        "  __syncthreads();  // the last use of `of_warp` is over\n",
        "",
    ),
    "missing-barrier-of-last": ("block.h", "  __syncthreads();\n  if (last) ", "  if (last) "),
    "tail-off-by-one": ("update_chunk.h", "count_of<V>(left), p, s);", "count_of<V>(left - 1), p, s);"),
    "round-too-short": ("update_chunk.h", "round < chunk.n; round +=", "round < chunk.n - 1; round +="),
    "whole-untold": ("update_plain.cu", " && chunk.n % storage.kElements == 0", ""),
    "rows-read-early": ("update_mixed.cu", "  __syncthreads();\n  if (!chunk.skip)", "  if (!chunk.skip)"),
    "vectors-of-the-norm": ("reduce.cu", "left >= (kAtOnce - 1) * kStride + V", "left >= (kAtOnce - 1) * kStride"),
    "rest-of-the-pair": ("squares.h", "double(high_) + double(low_) + wide_", "double(high_) + wide_"),
    "squares-too-large": ("squares.h", "sum >= kLeast && sum < kMost", "sum >= kLeast && sum < kMost * kMost"),
    "squares-too-small": ("squares.h", "sum >= kLeast && sum < kMost", "sum < kMost"),
    "lane-mask": (
        "blocks8_warp.h",
        "__shfl_xor_sync(kAllLanes, value, lanes, kBlockLanes)",
        "__shfl_xor_sync(0x00ffffffu, value, lanes, kBlockLanes)",
    ),
    "lanes-leave-early": ("update_mixed.cu", "kLanesMeet = true;", "kLanesMeet = false;"),
    "counter-not-reset": ("reduce.cu", "    *args.counter = 0u;\n", ""),
}


def run_selection(kernels: CudaOnCpu) -> None:
    """Short steps over every kind of kernel; raises where something is wrong."""
    check_neighbours("float32")
    check_neighbours("bfloat16")
    for order, (storage, options) in itertools.product(
        (FORWARD, REVERSE, RANDOM), (("float32", {}), ("int8", {}), ("float32", {"max_grad_norm": 1e9}))
    ):
        kernels.order(order)
        dtype, grad_dtype, more = STORAGE[storage]
        assert_same(*both(fused.AdamW, {"lr": 0.01, **more, **options}, (1, 7, 1025, 2049, 70_001), dtype, grad_dtype))
    norms.check(F32, 2.0, torch.device("cpu"))
    for order, dtype in itertools.product((FORWARD, REVERSE, RANDOM), (F32, F64)):
        kernels.order(order)
        params = make_params((300, 40_000), dtype)
        optimizer = fused.SGD(params, lr=0.0, max_grad_norm=1.0, skip_nonfinite=True)
        for step in (0, 2):
            set_grads(params, dtype, step)
            optimizer.step()
            expected = torch.cat([p.grad.double() for p in params if p.grad is not None]).norm().item()
            assert optimizer.grad_norm is not None
            assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *PLANTED])
def test_planted_defects_are_found(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_found(f"{__file__}::test_planted_defects_are_found[{name}]", name, PLANTED, run_selection, monkeypatch)


@pytest.mark.slow
def test_sanitizers() -> None:
    """Kernels and hosts' code read and write nothing that is not theirs, and rely on nothing undefined."""
    if SANITIZED:
        pytest.skip("this is the sanitized run")
    asan = subprocess.run([*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip(f"{compiler()[0]} has no AddressSanitizer")
    build(sanitize=True)
    environment = {
        **os.environ,
        "CUDA_ON_CPU_SANITIZED": "1",
        "LD_PRELOAD": str(Path(asan).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    selection = (
        "same_bits and (adamw or sgd_momentum) or misaligned or norm or captured or come_and_go or many_groups"
        " or follows_the_cpu or odd_places"
    )
    files = [__file__, str(Path(__file__).with_name("test_cuda_adafactor.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", f"({selection}) and not planted"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
