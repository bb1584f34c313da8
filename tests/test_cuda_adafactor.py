"""Adafactor's CUDA kernels without a GPU: their source, played by the CPU, against the paper and the CPU's kernels.

Sums are taken in another order than on the CPU, so the two agree to a few roundings; the kernels agree to the bit with
themselves, whatever the order blocks and threads run in.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from cuda_on_cpu.backend import FORWARD, RANDOM, REVERSE, CudaOnCpu
from cuda_on_cpu.build import CSRC
from cuda_on_cpu.defects import Defect, check_found
from test_adafactor import VARIANTS, assert_near, gradients, paper
from test_cuda_kernels import STORAGE, assert_same, bits, everything
from torch import Tensor

import fused
from fused import backends

if not CSRC.is_dir() or not sys.platform.startswith("linux"):
    pytest.skip("needs the source tree and Linux", allow_module_level=True)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# Every way to cut a tensor, with tiles that are full and tiles that are not: elements, whole matrices, lines of narrow
# ones, rectangles of wide ones with and without whole vectors and 8-bit blocks in a line.
SHAPES = (
    *((1,), (0,), (8195,), (), (3, 0), (1, 1), (300, 3, 3), (70, 61), (9001, 1), (2, 33, 129), (70, 288), (1, 4999)),
    (2, 129, 260),
)
FEW_SHAPES = ((7,), (600, 3, 3), (70, 61), (65, 288), (3, 1399))


def run(
    backend: str | None,
    shapes: tuple[tuple[int, ...], ...] = FEW_SHAPES,
    dtype: torch.dtype = F32,
    grad_dtype: torch.dtype = F32,
    steps: int = 2,
    **options: Any,
) -> fused.Adafactor:
    """Some steps from the same parameters, over the same gradients."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    optimizer = fused.Adafactor(params, backend=backend, **{"lr": 0.1, "weight_decay": 0.1, **options})
    for step in range(steps):
        set_grads(params, grad_dtype, step)
        optimizer.step()
    return optimizer


def set_grads(params: list[Tensor], dtype: torch.dtype, step: int) -> None:
    torch.manual_seed(100 + step)
    for p, g in zip(params, [gradients(p.shape, 1)[0] for p in params], strict=True):
        p.grad_dtype = None  # any
        p.grad = ((1 + step) * g).to(dtype)


def params_of(optimizer: fused.Adafactor) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_close(ours: fused.Adafactor, theirs: fused.Adafactor) -> None:
    """Equal but for a few roundings of the arithmetic, and for the values that these tip over where they are stored."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        pairs = {name: (value, theirs.state[q][name]) for name, value in ours.state[p].items()}
        low = any(value.element_size() < 4 for value in ours.state[p].values())  # a tipped moment moves masters, too
        for name, (a, b) in {"param": (p.detach(), q.detach()), **pairs}.items():
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.numel() == 0:
                continue
            if a.dtype in (F32, F64):
                assert_near(a, b, 1e-12 if a.dtype == F64 else 2e-3 if low else 1e-5)
            elif a.numel() > 100:
                same = (bits(a) == bits(b)).float().mean()
                assert float(same) > (0.9 if name == "param" else 0.8), (name, tuple(p.shape), float(same))


@pytest.mark.parametrize("storage", STORAGE)
def test_follows_the_cpu(served: CudaOnCpu, storage: str) -> None:
    dtype, grad_dtype, more = STORAGE[storage]
    options = {"dtype": dtype, "grad_dtype": grad_dtype, "beta1": 0.9, **more}
    assert_close(run(None, **options), run("cpu", **options))


def test_every_shape(served: CudaOnCpu) -> None:
    served.order(RANDOM)
    for options in ({}, {"dtype": BF16, "grad_dtype": BF16}, {"dtype": F64, "beta1": 0.5}):
        ours = run(None, SHAPES, steps=2, **options)
        assert_close(ours, run("cpu", SHAPES, steps=2, **options))
        assert all(float(ours.state[p]["step"]) == 2 for p in params_of(ours))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(33,), (2, 3, 40, 9), (67, 70), (70, 260)], ids=str)
def test_follows_the_paper(served: CudaOnCpu, variant: str, shape: tuple[int, ...]) -> None:
    kwargs, h = VARIANTS[variant]
    h = dict(h)
    sign = h.pop("sign", 1.0)
    start = torch.randn(shape)
    param = start.clone().requires_grad_()
    optimizer = fused.Adafactor([param], **kwargs)
    expected, state = start.double(), {}
    for t, g in enumerate(gradients(shape, 5), start=1):
        param.grad = g
        optimizer.step()
        expected = paper(expected, sign * g.double(), state, t, **h)
    assert_near(param.detach(), expected, 2e-6)
    moved = (param.detach().double() - start.double(), expected - start.double())
    assert (moved[0] - moved[1]).norm() <= 1e-4 * moved[1].norm() + 1e-6 * math.sqrt(start.numel())


@pytest.mark.parametrize("storage", ["float32", "split8-bfloat16", "float64"])
def test_order_of_blocks_and_threads_does_not_matter(served: CudaOnCpu, storage: str) -> None:
    dtype, grad_dtype, more = STORAGE[storage]
    results = []
    for order in (FORWARD, REVERSE, RANDOM):
        served.order(order)
        optimizer = run(None, dtype=dtype, grad_dtype=grad_dtype, beta1=0.9, max_grad_norm=1.0, **more)
        results.append(everything(optimizer))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_odd_places(served: CudaOnCpu) -> None:
    """Where no vector fits the results are the same: misaligned parameters and gradients, and turned ones."""
    shape = (70, 288)
    start, grads = torch.randn(shape), gradients(shape, 2)

    def shifted(value: Tensor) -> Tensor:
        return torch.cat((value.new_zeros(1), value.flatten()))[1:].view(shape)

    results = []
    for place in (torch.clone, shifted, lambda value: value.t().contiguous().t()):
        param = place(start).requires_grad_()
        optimizer = fused.Adafactor([param], beta1=0.9)
        for g in grads:
            param.grad = place(g)
            optimizer.step()
        results.append([v.contiguous() for v in everything(optimizer)])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_launches_and_uploads_per_step(served: CudaOnCpu) -> None:
    optimizer = run(None, SHAPES * 3, steps=1)
    table = optimizer._plan.batches[0].device_table  # type: ignore[union-attr]
    group = optimizer.param_groups[0]
    for options, d, launches in (({}, 1.0, 3), ({"max_grad_norm": 1.0, "skip_nonfinite": True}, 1.0, 4), ({}, None, 3)):
        optimizer._options.update(options)
        group["lr"] *= 0.5
        group["d"] = d
        before = table.launches, table.uploads
        optimizer.step()
        assert (table.launches - before[0], table.uploads - before[1]) == (launches, 0)


def test_mixed_dtypes_and_many_groups_take_the_same_launches(served: CudaOnCpu) -> None:
    def step_on(backend: str | None) -> fused.Adafactor:
        groups: list[dict[str, Any]] = []
        for i in range(23):  # more than fit in a kernel's arguments
            dtype = (F32, BF16, F64)[i % 3]
            p = torch.randn(9, 8 + i, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_()
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 50)).to(dtype)
            groups.append({"params": [p], "lr": 0.01 * (i + 1), "beta1": 0.9 if i % 2 else None})
        optimizer = fused.Adafactor(groups, backend=backend)
        for _ in range(2):
            optimizer.step()
        return optimizer

    ours = step_on(None)
    assert_close(ours, step_on("cpu"))
    assert ours._plan.batches[0].device_table.launches == 6  # type: ignore[union-attr]


def test_clipping_is_by_the_norm_of_all(served: CudaOnCpu) -> None:
    options = {"max_grad_norm": 0.5, "eps": (0.1, 1e-3), "d": 1e6}
    ours, theirs = run(None, **options), run("cpu", **options)
    assert_close(ours, theirs)
    assert ours.grad_norm is not None and theirs.grad_norm is not None
    assert ours.grad_norm.item() == pytest.approx(theirs.grad_norm.item(), rel=1e-6)


@pytest.mark.parametrize("storage", ["float32", "split8-bfloat16"])
def test_a_skipped_step_changes_nothing(served: CudaOnCpu, storage: str) -> None:
    dtype, grad_dtype, more = STORAGE[storage]
    optimizer = run(None, dtype=dtype, grad_dtype=grad_dtype, beta1=0.9, skip_nonfinite=True, **more)
    before = [t.clone() for t in everything(optimizer)]
    params = params_of(optimizer)
    assert params[-1].grad is not None
    params[-1].grad[-1, -1] = math.inf
    optimizer.step()
    assert optimizer.found_inf is not None and optimizer.found_inf.item() == 1.0
    assert_same(everything(optimizer), before)
    set_grads(params, grad_dtype, 0)
    optimizer.step()
    assert optimizer.found_inf.item() == 0.0
    assert all(float(optimizer.state[p]["step"]) == 3 for p in params)
    assert not any(torch.equal(a, b) for a, b in zip(everything(optimizer), before, strict=True))


def test_nothing_to_update(served: CudaOnCpu) -> None:
    optimizer = run(None, ((0,), (3, 0)), max_grad_norm=1.0)
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == 0.0
    for p in params_of(optimizer):
        p.grad = None
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [2.0, 2.0]


def test_nan_shows(served: CudaOnCpu) -> None:
    for shape in FEW_SHAPES:
        param = torch.ones(shape).requires_grad_()
        param.grad = torch.ones(shape)
        param.grad.view(-1)[3] = math.nan
        fused.Adafactor([param]).step()
        assert param.detach().view(-1)[3].isnan()


def test_a_captured_step_is_replayed(served: CudaOnCpu) -> None:
    """With its own tables and sums, the learning rate of the time, and gradients where they were."""
    lr = torch.tensor(0.1)
    captured, eager = (run(None, steps=1, lr=lr, beta1=0.9, max_grad_norm=1.0) for _ in range(2))
    served.begin_capture()
    captured.step()
    assert served.end_capture() == 4
    where_they_were = [p.grad for p in params_of(captured)]
    for p in params_of(captured):
        p.grad = torch.zeros_like(p)
    for value in (0.02, 0.5):
        lr.fill_(value)
        served.replay()
        eager.step()
        assert_same(everything(captured), everything(eager))
    assert all(g is not None for g in where_they_were)


def test_gradients_that_come_and_go(served: CudaOnCpu) -> None:
    def step_on(backend: str | None) -> fused.Adafactor:
        optimizer = run(backend, steps=0)
        params = params_of(optimizer)
        for step, present in enumerate([(0, 1), (1, 2, 3), (), (4,), (0, 1, 2, 3, 4)]):
            set_grads(params, F32, step)
            for i, p in enumerate(params):
                p.grad = p.grad if i in present else None
            optimizer.step()
        return optimizer

    assert_close(step_on(None), step_on("cpu"))


def test_sums_take_little_memory(served: CudaOnCpu) -> None:
    for shape, most in (((512, 1024), 0.1), ((2048, 32), 0.3), ((400, 3, 3), 2.5)):
        optimizer = run(None, (shape,), steps=1)
        workspace = optimizer._plan.batches[0].device_table.workspace_bytes  # type: ignore[union-attr]
        assert workspace / params_of(optimizer)[0].numel() < most, shape


def test_debugging_names_the_state(served: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused.backends import cuda

    optimizer = run(None, steps=1)
    monkeypatch.setattr(cuda.extension, "cuda_debugging", lambda: True)
    optimizer.step()
    monkeypatch.setenv("CUDA_ON_CPU_HOST_POINTERS", "1")
    with pytest.raises(RuntimeError, match=r"parameter 0 .*: state variance is not in CUDA memory"):
        optimizer.step()


def test_is_chosen() -> None:
    assert backends._has_kernels("cuda", "adafactor")


# ---- the tests can fail ----

PLANTED: dict[str, Defect] = {
    "squares-read-early": (
        "adafactor_stats.cu",
        "  stage(job, squares);\n  __syncthreads();",
        "  stage(job, squares);",
    ),
    "columns-read-early": (
        "adafactor_stats.cu",
        "of_warp[first_line()][first_column() + j] = col[j];\n  __syncthreads();",
        "of_warp[first_line()][first_column() + j] = col[j];",
    ),
    "last-line-left-out": (
        "adafactor_stats.cu",
        "mine < job.tile.lines) row_part",
        "mine < job.tile.lines - 1) row_part",
    ),
    "tail-not-told": ("adafactor_tiles.h", "present[u] = count_at(lines, at) > 0;", "present[u] = true;"),
    "lane-mask": (
        "adafactor_stats.cu",
        "__shfl_xor_sync(0xffffffffu, given, lanes)",
        "__shfl_xor_sync(0xffffu, given, lanes)",
    ),
    "wrong-lane": ("adafactor_stats.cu", "lane / (kWarp / U) * kWarps", "lane / (kWarp / U / 2) * kWarps"),
    "first-instead-of-last": ("block.h", "atomicAdd(arrived, 1u) == count - 1u", "atomicAdd(arrived, 1u) == 0u"),
    "tiles-not-reset": ("adafactor_apply.cu", "  *arrived = 0u;\n", ""),
    "straddled-block": ("adafactor_apply.cu", "range = {tile.begin / kRangeUnit * kRangeUnit,", "range = {tile.begin,"),
    "count-stored-early": (
        "adafactor_stats.cu",
        "  job.factor = decision.grad_factor",
        "  *job.row.step = float(job.count);\n  job.factor = decision.grad_factor",
    ),
}


def run_selection(kernels: CudaOnCpu) -> None:
    """Short steps over every way to cut a tensor; raises where something is wrong."""
    for order, storage in ((FORWARD, "float32"), (REVERSE, "float32"), (RANDOM, "split8-bfloat16")):
        kernels.order(order)
        dtype, grad_dtype, more = STORAGE[storage]
        options = {"dtype": dtype, "grad_dtype": grad_dtype, "beta1": 0.9, **more}
        assert_close(run(None, **options), run("cpu", **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *PLANTED])
def test_planted_defects_are_found(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_found(f"{__file__}::test_planted_defects_are_found[{name}]", name, PLANTED, run_selection, monkeypatch)
