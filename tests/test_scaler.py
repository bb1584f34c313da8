"""Loss scaling: this package's scaler and torch's, with this package's optimizers and torch's, in every order."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import fused

INF = float("inf")
CLIP = 0.05


def make_params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((40, 3), (7,), (0,), ())
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def fill_gradients(params: list[torch.nn.Parameter], scale: float, step: int, bad: bool) -> None:
    """Gradients of a step, times the loss scale, with an infinity or NaN at a place of the step's own."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
    if bad:
        victim = params[step % 2].grad
        assert victim is not None
        place = int(torch.randint(victim.numel(), (), generator=generator))
        victim.view(-1)[place] = (INF, -INF, math.nan)[step % 3]


def bad_steps() -> set[int]:
    generator = torch.Generator().manual_seed(7)
    return {int(i) for i in torch.randperm(50, generator=generator)[:9]} | {0}


def started(scaler: Any) -> Any:
    scaler.scale(torch.ones(()))
    return scaler


def run(scaler: Any, optimizer: Any, params: list[torch.nn.Parameter], *, unscale: bool, clip: str) -> list[float]:
    """50 steps; returns the scale after each. ``clip``: by a function after unscale_, in the step, or not at all."""
    scales = []
    bad = bad_steps()
    for step in range(50):
        fill_gradients(params, scaler.get_scale(), step, step in bad)
        if unscale:
            scaler.unscale_(optimizer)
        if clip == "torch":
            clip_grad_norm_(params, CLIP)
        elif clip == "fused":
            fused.clip_grad_norm_(params, CLIP)
        assert scaler.step(optimizer) is None
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def torch_run(clip: bool) -> tuple[list[float], list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = make_params()
    optimizer = torch.optim.AdamW(params, lr=0.01)
    scaler = started(torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4))
    scales = run(scaler, optimizer, params, unscale=clip, clip="torch" if clip else "none")
    return scales, params, optimizer


ORDERS = [(False, "none"), (True, "none"), (True, "torch"), (True, "fused"), (False, "step"), (True, "step")]


@pytest.mark.parametrize("unscale, clip", ORDERS)
@pytest.mark.parametrize("scaler_class, amp_scaling", [("fused", False), ("torch", False), ("torch", True)])
def test_every_order_is_torchs(
    backend: Backend, scaler_class: str, amp_scaling: bool, unscale: bool, clip: str
) -> None:
    expected_scales, expected, twin = torch_run(clip != "none")
    params = make_params()
    options = {"max_grad_norm": CLIP} if clip == "step" else {}
    optimizer = fused.AdamW(params, lr=0.01, backend=backend.name, amp_scaling=amp_scaling, **options)
    package: Any = fused if scaler_class == "fused" else torch.amp
    scaler = started(package.GradScaler("cpu", init_scale=1024.0, growth_interval=4))
    scales = run(scaler, optimizer, params, unscale=unscale, clip=clip)
    assert scales == expected_scales
    torch.testing.assert_close(params, expected, rtol=2e-5, atol=2e-6)
    for ours, theirs in zip(params, expected, strict=True):
        assert float(optimizer.state[ours]["step"]) == float(twin.state[theirs]["step"]) == 40
    assert not hasattr(optimizer, "grad_scale")


def test_against_float64() -> None:
    params = make_params()
    optimizer = fused.SGD(params, lr=0.5, max_grad_norm=CLIP)
    scaler = started(fused.GradScaler("cpu", init_scale=3.0, growth_interval=None))
    expected = [p.detach().double() for p in params]
    for step in range(20):
        fill_gradients(params, 3.0, step, step % 5 == 1)
        grads = [p.grad.double() / 3.0 for p in params]
        scaler.step(optimizer)
        scaler.update()
        if step % 5 == 1:
            assert float(optimizer.found_inf) == 1.0
            continue
        norm = torch.cat([g.flatten() for g in grads]).norm()
        expected = [p - 0.5 * g * min(1.0, CLIP / (float(norm) + 1e-6)) for p, g in zip(expected, grads, strict=True)]
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        assert float(optimizer.grad_norms()["0.1"]) == pytest.approx(float(grads[1].norm()), rel=1e-6)
    torch.testing.assert_close([p.detach().double() for p in params], expected, rtol=1e-6, atol=1e-6)
    assert scaler.get_scale() == 3.0


def test_gradients_stay_as_they_are() -> None:
    params = make_params()
    optimizer = fused.AdamW(params)
    scaler = started(fused.GradScaler("cpu"))
    fill_gradients(params, 65536.0, 0, False)
    before = [p.grad.clone() for p in params]
    scaler.step(optimizer)
    for param, grad in zip(params, before, strict=True):
        assert torch.equal(param.grad, grad)


def everything(optimizer: fused.FusedOptimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_skipped_step_changes_no_bit(backend: Backend, unscale: bool, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    master = None if dtype == torch.float32 else "split"
    optimizer = fused.AdamW(params, backend=backend.name, master_weights=master)
    scaler = started(fused.GradScaler("cpu", init_scale=8.0))
    for step in range(12):
        bad = step % 3 != 1
        fill_gradients(params, 8.0, step, bad)
        before = everything(optimizer)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        if not unscale:
            assert optimizer.find_nonfinite() == ([f"0.{step % 2}"] if bad else [])
        scaler.update(8.0)
        after = everything(optimizer)
        if bad and step > 0:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        elif not bad:
            assert not torch.equal(before[0], after[0])


def test_several_optimizers_under_one_scaler() -> None:
    groups = [make_params(seed) for seed in range(3)]
    twins = [make_params(seed) for seed in range(3)]
    ours: list[Any] = [fused.AdamW(groups[0]), torch.optim.SGD(groups[1], lr=0.1), fused.Lion(groups[2])]
    theirs: list[Any] = [torch.optim.AdamW(twins[0]), torch.optim.SGD(twins[1], lr=0.1), fused.Lion(twins[2])]
    scaler = started(fused.GradScaler("cpu", init_scale=64.0, growth_interval=3))
    other = started(torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3))
    for step in range(30):
        for k in range(3):
            for params in (groups[k], twins[k]):
                fill_gradients(params, scaler.get_scale(), step + k, step % 7 == k)
        for k in range(3):
            scaler.step(ours[k])
            other.step(theirs[k])
        scaler.update()
        other.update()
        assert scaler.get_scale() == other.get_scale()
    torch.testing.assert_close(groups, twins, rtol=1e-5, atol=1e-6)


def test_float16_parameters_and_overflow() -> None:
    params = make_params(dtype=torch.float16)
    optimizer = fused.AdamW(params, master_weights="fp32", max_grad_norm=1.0)
    scaler = started(fused.GradScaler("cpu", init_scale=2.0**14, growth_interval=None))
    for param in params:
        param.grad = torch.full_like(param, 40000.0)  # squares and sums far beyond float16
    scaler.step(optimizer)
    norm = 40000.0 / 2**14 * math.sqrt(sum(p.numel() for p in params))
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-3)
    assert float(optimizer.found_inf) == 0.0
    scaler.update()
    scaler.unscale_(optimizer)
    assert float(params[1].grad[0]) == pytest.approx(40000.0 / 2**14, rel=1e-3)


def test_one_unscale_per_step() -> None:
    params = make_params()
    optimizer = fused.SGD(params, lr=1.0)
    scaler = started(fused.GradScaler("cpu"))
    fill_gradients(params, 1.0, 0, False)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer, lambda: None)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()


def test_closure() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = fused.SGD([param], lr=0.1)
    scaler = fused.GradScaler("cpu", init_scale=1024.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param**2).sum()
        scaler.scale(loss).backward()
        return loss.item()

    scaler.scale(torch.ones(()))
    assert scaler.step(optimizer, closure) == 5.0
    torch.testing.assert_close(param.detach(), torch.tensor([0.8, 1.6]))


def outcomes(scaler: Any, found: list[int]) -> list[float]:
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = fused.SGD([param], lr=0.0)
    started(scaler)
    scales = []
    for bad in found:
        param.grad = torch.tensor([INF if bad else 1.0])
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_bounds() -> None:
    scaler = fused.GradScaler("cpu", init_scale=8.0, growth_interval=1, min_scale=2.0, max_scale=16.0)
    assert outcomes(scaler, [0, 0, 0, 1, 1, 1, 1, 1, 0]) == [16, 16, 16, 8, 4, 2, 2, 2, 4]
    scaler.update(1.0)
    assert scaler.get_scale() == 2.0


def test_hysteresis() -> None:
    scaler = fused.GradScaler("cpu", init_scale=64.0, growth_interval=2, hysteresis=2)
    #            spared, lowered, still lowered, growing replenishes, spared again, lowered
    assert outcomes(scaler, [1, 1, 0, 1, 0, 0, 1, 1]) == [64, 32, 32, 16, 16, 32, 32, 16]


def test_fixed_scale() -> None:
    scaler = fused.GradScaler("cpu", init_scale=64.0, growth_interval=None)
    assert outcomes(scaler, [1, 0, 0, 1] * 3) == [64.0] * 12
    loaded = torch.amp.GradScaler("cpu")
    loaded.load_state_dict(scaler.state_dict())
    assert outcomes(loaded, [0] * 5) == [64.0] * 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"init_scale": 0.0}, {"init_scale": INF}, {"min_scale": -1.0}, {"min_scale": 4.0, "max_scale": 2.0},
        {"init_scale": 2.0, "min_scale": 4.0}, {"hysteresis": 0}, {"growth_interval": 0}, {"growth_factor": 1.0},
        {"backoff_factor": 1.0}, {"backoff_factor": 0.0},
    ],
)
def test_invalid_arguments(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"Invalid {name} value: {arguments[name]}"):
        fused.GradScaler("cpu", **arguments)


@pytest.mark.parametrize(
    "name", ["init_scale", "growth_factor", "backoff_factor", "growth_interval", "min_scale", "hysteresis", "enabled"]
)
def test_arguments_of_another_kind(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be .*, got '4'"):
        fused.GradScaler("cpu", **{name: "4"})  # type: ignore[arg-type]


def test_a_growth_interval_that_is_none() -> None:
    scaler = fused.GradScaler("cpu")
    with pytest.raises(ValueError, match="new_interval value: 0"):
        scaler.set_growth_interval(0)
    assert scaler.get_growth_interval() == 2000


def test_state_dict_both_ways() -> None:
    pattern = [0, 0, 1, 0, 0, 0, 1]
    ours = fused.GradScaler("cpu", init_scale=128.0, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=3)
    assert outcomes(ours, pattern) == outcomes(theirs, pattern)
    crossed, back = torch.amp.GradScaler("cpu"), fused.GradScaler("cpu", max_scale=2.0**20)
    crossed.load_state_dict(ours.state_dict())
    back.load_state_dict(theirs.state_dict())
    assert crossed.state_dict() == theirs.state_dict()
    assert {k: back.state_dict()[k] for k in theirs.state_dict()} == theirs.state_dict()
    assert back.state_dict()["max_scale"] == 2.0**20
    assert outcomes(back, pattern) == outcomes(crossed, pattern) == outcomes(theirs, pattern)


def test_own_state_and_pickle() -> None:
    scaler = fused.GradScaler("cpu", init_scale=64.0, growth_interval=3, hysteresis=3, min_scale=1.0)
    outcomes(scaler, [1, 0])
    loaded = fused.GradScaler("cpu")
    loaded.load_state_dict(scaler.state_dict())
    twins = [loaded, pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)]
    for twin in twins:
        assert twin.state_dict() == scaler.state_dict()
    expected = outcomes(scaler, [1, 1, 0, 0])
    assert expected == [64, 32, 32, 32]
    for twin in twins:
        assert outcomes(twin, [1, 1, 0, 0]) == expected


def test_is_torchs() -> None:
    scaler = fused.GradScaler("cpu", 4.0, 2.0, 0.5, 7, True)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.get_growth_interval() == 7 and scaler.get_scale() == 4.0 and scaler.is_enabled()
    disabled = fused.GradScaler("cpu", enabled=False)
    params = make_params()
    optimizer = fused.SGD(params, lr=1.0)
    fill_gradients(params, 1.0, 0, False)
    before = params[1].detach().clone()
    disabled.unscale_(optimizer)
    disabled.step(optimizer)
    disabled.update()
    torch.testing.assert_close(params[1].detach(), before - params[1].grad)
    assert disabled.state_dict() == {} and disabled.scale(before) is before


def test_step_without_gradients() -> None:
    optimizer = fused.SGD(make_params(), lr=1.0)
    scaler = started(fused.GradScaler("cpu"))
    for _ in itertools.repeat(None, 2):
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 65536.0
