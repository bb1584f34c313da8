"""Adafactor's Triton kernels, played by Triton's interpreter, in a process of their own as ``triton_interpreted.py``.

The same tests as every backend's, at the sizes where the kernels take another path, and what only these kernels have.
"""

from __future__ import annotations

import pytest
import test_adafactor as cases
import torch
from conftest import Backend

import fused
from fused.backends import triton_adafactor
from fused.backends.triton import adafactor as kernels

# what lies beyond the end is zero, and nobody reads its root
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TRITON = Backend("triton", torch.device("cpu"))
SHAPES = [(), (17000,), (5, 3, 3, 3), (300, 70), (140, 256), (1, 700), (3000, 2), (2, 3, 40, 96), (0, 4)]
"""A scalar; a vector, part with a mask; small matrices; narrow, wide, odd, flat and tall ones; several; none."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_follows_the_paper(variant):
    cases.test_follows_the_paper(TRITON, variant, (33, 70))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 40, 9), (4, 3, 3, 3), (34, 96)], ids=str)
def test_follows_the_paper_in_every_shape(shape):
    cases.test_follows_the_paper(TRITON, "t5x", shape)


def test_float64():
    cases.test_float64(TRITON)


def test_layouts():
    cases.test_layouts(TRITON, "int8")


def test_largest_dimensions_and_threshold():
    cases.test_largest_dimensions_and_threshold(TRITON)


def test_lr_in_a_tensor_is_followed():
    cases.test_lr_in_a_tensor_is_followed(TRITON)


def test_options_may_differ_by_group():
    cases.test_options_may_differ_by_group(TRITON)


def test_skipped_step_changes_nothing():
    cases.test_skipped_step_changes_nothing(TRITON)


def test_refuses_what_it_cannot_do():
    cases.test_refuses_what_it_cannot_do(TRITON)


def _run(backend, shapes, dtype=torch.float32, gradient_dtype=None, steps=2, **options):
    torch.manual_seed(1)
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    optimizer = fused.Adafactor(params, lr=0.1, weight_decay=0.1, backend=backend, **options)
    for _ in range(steps):
        for p in params:
            p.grad_dtype = None
            p.grad = torch.randn(p.shape).to(gradient_dtype or dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "d": None}, {"max_grad_norm": 1.0}], ids=str)
def test_agrees_with_the_cpu_kernels(options):
    expected, theirs = _run("cpu", SHAPES, **options)
    actual, ours = _run("triton", SHAPES, **options)
    for p, q in zip(expected, actual, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=1e-6)
        for name, value in theirs.state[p].items():
            torch.testing.assert_close(ours.state[q][name], value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("masters", [None, "fp32", "split", "split8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_storage_agrees_with_the_cpu_kernels(dtype, masters, stochastic):
    """The same random bits too: what two orders of summation tip over is rare."""
    options = {"beta1": 0.9, "master_weights": masters, "stochastic_rounding": stochastic, "seed": (1 << 63) + 5}
    options["state_dtype"] = "int8" if masters == "split8" else torch.bfloat16
    shapes = [(90,), (33, 50), (70, 96)]
    expected, theirs = _run("cpu", shapes, dtype, torch.float32, **options)
    actual, ours = _run("triton", shapes, dtype, torch.float32, **options)
    for p, q in zip(expected, actual, strict=True):
        assert float((p == q).float().mean()) > 0.99
        assert set(ours.state[q]) == set(theirs.state[p])
        moments = (ours.state[q]["exp_avg"], theirs.state[p]["exp_avg"])
        assert float((moments[0] == moments[1]).float().mean()) > 0.97


def test_the_order_of_programs_does_not_matter():
    results = []
    for reverse in (False, True):
        torch.manual_seed(2)
        params = [torch.randn(shape).requires_grad_() for shape in ((140, 320), (300, 70), (17000,), (9, 3, 3))]
        optimizer = fused.Adafactor(params, lr=0.1, backend="triton")
        for _ in range(2):  # the second step in the other order
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
            for launch in optimizer._plan.batches[0].launches if reverse else ():
                for work in (launch.tiles, launch.factored, launch.spans):
                    work.copy_(work.flip(0))
        results.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_launches_are_few(monkeypatch):
    """Whatever the tensors: a read for the norm, averages, squared updates, updates; nothing else in later steps."""
    launched = []
    run = type(kernels.stats).run

    def record(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(kernels.stats), "run", record)
    params = [torch.randn(shape).requires_grad_() for shape in ((5,), (40, 50), (0, 3), (3, 3, 3), (70, 96), ())]
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer = fused.Adafactor(params, max_grad_norm=1.0, backend="triton")
    for _ in range(2):
        launched.clear()
        optimizer.step()
        assert launched == ["reduce", "stats", "norm", "apply"]
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    for group in optimizer.param_groups:
        group["d"] = None
    launched.clear()
    optimizer.step()
    assert launched == ["reduce", "stats", "apply"]


def test_warmup_compiles_what_the_step_launches(monkeypatch):
    seen = {True: set(), False: set()}
    run = type(kernels.stats).run

    def record(self, *args, grid, warmup, **constants):
        seen[warmup].add((self.fn.__name__, *sorted((k, str(v)) for k, v in constants.items())))
        return run(self, *args, grid=grid, warmup=warmup, **constants)

    monkeypatch.setattr(type(kernels.stats), "run", record)
    param = torch.randn(40, 50).bfloat16().requires_grad_()
    optimizer = fused.Adafactor([param], beta1=0.9, master_weights="split", max_grad_norm=1.0, backend="triton")
    fused.warmup(optimizer)
    assert not seen[False]
    assert not optimizer.state
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert seen[False] == seen[True]


def test_work_stays_listed_while_only_addresses_change():
    params = [torch.randn(40, 50).requires_grad_(), torch.randn(9).requires_grad_()]
    optimizer = fused.Adafactor(params, backend="triton")
    kept = []
    launches = None
    for _ in range(3):
        for p in params:
            kept.append(p.grad)  # so that the next gradient gets another address
            p.grad = torch.randn(p.shape)
        optimizer.step()
        (batch,) = optimizer._plan.batches
        launches = launches or batch.launches
        assert batch.launches is launches
    params[1].grad = None
    optimizer.step()
    assert batch.launches is not launches


def test_tilings_cover_every_element():
    span = kernels.SPAN.value
    for lead, rows, cols in ((1, 1, 1), (7, 3, 3), (1, 50257, 768), (1, 4096, 4096), (3, 70000, 1), (1, 1, 1 << 33)):
        tiling = triton_adafactor.tiling_of(lead * rows * cols, (lead, rows, cols), True)
        assert tiling.spans * max(span, 1) >= lead * rows * cols
        if tiling.kind == kernels.SMALL.value:
            assert tiling.tiles * tiling.lines >= lead
        else:
            assert tiling.tiles == lead * tiling.down * tiling.across
            assert tiling.down * tiling.lines >= rows > (tiling.down - 1) * tiling.lines
            assert tiling.down <= triton_adafactor.MOST_TILES
