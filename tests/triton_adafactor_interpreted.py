"""Adafactor's Triton kernels, played by Triton's interpreter, in a process of their own as ``triton_interpreted.py``.

The same tests as every backend's, at the sizes where the kernels take another path, and what only these kernels have.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import interpreted
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
FEW_SHAPES = [(17000,), (5, 3, 3, 3), (300, 70), (140, 256)]
"""A vector, part of it with a mask; small matrices; one with odd lines and one with whole words, in tiles each way."""
SHAPES = [*FEW_SHAPES, (), (1, 700), (2100, 2), (2, 3, 40, 96), (0, 4)]
"""A scalar; a flat and a tall matrix; several; nothing."""
interpreted.hasten()


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_follows_the_paper(variant):
    cases.test_follows_the_paper(TRITON, variant, (33, 40))


@pytest.mark.parametrize("shape", [(5,), (2, 2, 40, 9), (4, 3, 3, 3), (34, 96)], ids=str)
def test_follows_the_paper_in_every_shape(shape):
    cases.test_follows_the_paper(TRITON, "t5x", shape)


def test_float64():
    cases.check_float64(TRITON, (33, 70))


def test_layouts():
    cases.test_layouts(TRITON, "int8")


def test_largest_dimensions_and_threshold():
    cases.test_largest_dimensions_and_threshold(TRITON)


def test_lr_in_a_tensor_is_followed():
    cases.test_lr_in_a_tensor_is_followed(TRITON)


def test_options_may_differ_by_group():
    cases.test_options_may_differ_by_group(TRITON)


def test_skipped_step_changes_nothing():
    cases.check_skipped_step(TRITON, (33, 96))


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


def _check_agreement(shapes, **options):
    expected, theirs = _run("cpu", shapes, **options)
    actual, ours = _run("triton", shapes, **options)
    for p, q in zip(expected, actual, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=1e-6)
        for name, value in theirs.state[p].items():
            torch.testing.assert_close(ours.state[q][name], value, rtol=2e-6, atol=1e-7)


def test_agrees_with_the_cpu_kernels():
    _check_agreement(SHAPES)


@pytest.mark.parametrize("options", [{"beta1": 0.9, "d": None}, {"max_grad_norm": 1.0}], ids=str)
def test_options_agree_with_the_cpu_kernels(options):
    _check_agreement(FEW_SHAPES, **options)


def _check_storage(dtype, masters, stochastic):
    options = {"beta1": 0.9, "master_weights": masters, "stochastic_rounding": stochastic, "seed": (1 << 63) + 5}
    options["state_dtype"] = "int8" if masters == "split8" else torch.bfloat16
    shapes = [(90,), (33, 40), (20, 96)]
    expected, theirs = _run("cpu", shapes, dtype, torch.float32, **options)
    actual, ours = _run("triton", shapes, dtype, torch.float32, **options)
    for p, q in zip(expected, actual, strict=True):
        assert float((p == q).float().mean()) > 0.99
        assert set(ours.state[q]) == set(theirs.state[p])
        moments = (ours.state[q]["exp_avg"], theirs.state[p]["exp_avg"])
        assert float((moments[0] == moments[1]).float().mean()) > 0.97


@pytest.mark.parametrize("masters", [None, "fp32", "split", "split8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_storage_agrees_with_the_cpu_kernels(dtype, masters, stochastic):
    """The same random bits too: what two orders of summation tip over is rare."""
    _check_storage(dtype, masters, stochastic)


def test_the_order_of_programs_does_not_matter():
    results = []
    for reverse in (False, True):
        torch.manual_seed(2)
        params = [torch.randn(shape).requires_grad_() for shape in ((140, 320), (300, 40), (17000,), (9, 3, 3))]
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
    launched = interpreted.record_launches(monkeypatch)
    params = [torch.randn(shape).requires_grad_() for shape in ((5,), (40, 50), (0, 3), (3, 3, 3), (70, 96), ())]
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer = fused.Adafactor(params, max_grad_norm=1.0, backend="triton")
    for _ in range(2):
        launched.clear()
        optimizer.step()
        assert [launch.kernel for launch in launched] == ["reduce", "stats", "norm", "apply"]
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    for group in optimizer.param_groups:
        group["d"] = None
    launched.clear()
    optimizer.step()
    assert [launch.kernel for launch in launched] == ["reduce", "stats", "apply"]


def test_warmup_compiles_what_the_step_launches(monkeypatch):
    launched = interpreted.record_launches(monkeypatch)
    param = torch.randn(40, 50).bfloat16().requires_grad_()
    optimizer = fused.Adafactor([param], beta1=0.9, master_weights="split", max_grad_norm=1.0, backend="triton")
    fused.warmup(optimizer)
    assert launched and all(launch.ahead for launch in launched)
    assert not optimizer.state
    param.grad = torch.randn_like(param)
    optimizer.step()
    interpreted.check_compiled_ahead(launched)


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


# ---- the tests can fail ----


def _agreement(*shapes, **options):
    return lambda: _check_agreement(shapes, **options)


PLANTED = {  # a place in the kernels' source, what is put there instead, and what has to notice
    "first-instead-of-last": ('sem="acq_rel") == count - 1', 'sem="acq_rel") == 0', _agreement((300, 40))),
    "counter-not-reset": ("tl.store(counters + at, 0)", "pass", _agreement((300, 40))),
    "last-line-left-out": ("tl.sum(square, 1), mask=one < last)", "tl.sum(square, 1), mask=one < last - 1)",
                           _agreement((40, 96))),
    "last-column-left-out": ("last = tl.minimum((j + 1) * width, tl.load(shape + COLS))",
                             "last = tl.minimum((j + 1) * width, tl.load(shape + COLS) - 1)", _agreement((40, 70))),
    "mean-of-one-stripe": ("_sum_of(means, row_tiles)", "_sum_of(means, 1)", _agreement((300, 40))),
    "columns-of-another-matrix": ("+ m * columns\n    for begin", "\n    for begin", _agreement((2, 40, 96))),
    "small-matrices-run-together": ("column // columns * (rows * columns) + column % columns", "column",
                                    _agreement((5, 3, 3, 3))),
    "matrix-not-left": ("m = line // rows + further", "m = line // rows + 0 * further", _agreement((5, 3, 3, 3))),
    "line-not-left": ("value - tl.where(turned, divisor, 0)", "value", _agreement((2, 700))),
    "block-left-out": ("tl.minimum(begin + SPAN, numel), BLOCK):\n        offset = tl.multiple_of",
                       "tl.minimum(begin + SPAN - BLOCK, numel), BLOCK):\n        offset = tl.multiple_of",
                       _agreement((17000,))),
    "squares-of-tiles": ("tl.where(tl.load(shape + ROW_VAR) == 0, tiles, tl.load(shape + SPANS))", "tiles",
                         _agreement((140, 256))),
    "counted-twice": ("tl.store(counter, counted)", "tl.store(counter, counted + 1.0)", _agreement((5,))),
    "skipped-all-the-same": ("# a small one comes with 32 bits\n    if tl.load(skip) == 0:", "\n    if True:",
                             lambda: cases.check_skipped_step(TRITON, (33, 40))),
    "random-bits-twice": ("random_bits(seed, offset, stream, 1, step)", "random_bits(seed, offset, stream, 0, step)",
                          lambda: _check_storage(torch.bfloat16, None, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name, tmp_path, monkeypatch):
    good, bad, check = PLANTED[name]
    text = Path(kernels.__file__).read_text()
    assert text.count(good) == 1, "there is no such place any more"
    path = tmp_path / "planted.py"
    path.write_text(text.replace(good, bad))
    spec = importlib.util.spec_from_file_location(f"{kernels.__package__}.planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(triton_adafactor, "kernels", planted)
    with pytest.raises(AssertionError):
        check()
