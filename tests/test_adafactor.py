"""Adafactor against the paper in float64, torch.optim, Hugging Face's rule, and itself in other layouts and formats."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

import fused
from fused import backends

SHAPES = [
    *((1,), (1, 1), (1, 65537), (65537, 1), (3, 5, 7), (), (7,), (70000,), (64, 64), (300, 700), (2, 33, 9000)),
    pytest.param((1023, 1025), id="1023x1025"),
    pytest.param((4, 65, 3, 3), id="convolution"),
]
# Many small matrices: elements, rows, columns; more than a block, a chunk and a tile hold; the largest, and one larger.
SMALL = [
    *((300, 1, 1), (9, 1, 1), (40, 1, 37), (40, 37, 1), (70, 11, 3, 5), (5, 30, 7, 7), (5000, 4, 4), (9, 2, 2)),
    *((12, 16, 16), (11, 16, 17), (8, 1, 256), (8, 256, 1), (31, 2, 3), (7, 3, 3)),
]
EPS32 = torch.finfo(torch.float32).eps


# ---- the float64 reference ----


def paper(p: Tensor, g: Tensor, state: dict[str, Tensor], t: int, **h: Any) -> Tensor:
    """One step of Algorithm 4 or 5 of arXiv:1804.04235 with sums as printed there, and of the variants' deviations.

    ``p`` and ``g`` are float64 with rows and columns last; ``state`` holds R and C as *sums*, or V.
    """
    h = {
        "lr": 1e-2, "tau": -0.8, "eps": (EPS32, 1e-3), "d": 1.0, "decay": 0.0, "relative": True, "warmup": False,
        "scale": True, "cap": 1.0, "add": False, "beta1": None, "late": True, "decay_by": "lr", "factored": p.ndim > 1,
        **h,
    }
    eps1, eps2 = h["eps"]
    beta2 = min(h["cap"], 1.0 - t ** h["tau"])
    square = g.square() + (eps1 if h["add"] else 0.0)
    if h["factored"]:
        n, m = p.shape[-2:]
        zero = torch.zeros((), dtype=torch.float64)
        rows = state["R"] = beta2 * state.get("R", zero) + (1 - beta2) * square.sum(-1, keepdim=True)
        cols = state["C"] = beta2 * state.get("C", zero) + (1 - beta2) * square.sum(-2, keepdim=True)
        total = rows.sum(-2, keepdim=True)
        # torch.optim bounds the mean over all elements; the paper does not bound it
        v = rows * cols / (total if h["add"] else total.clamp(min=eps1 * n * m))
        v = v.where(total != 0, 0.0) if h["add"] else v
        if not h["add"]:
            assert v.shape == p.shape
    else:
        v = state["V"] = beta2 * state.get("V", torch.zeros_like(p)) + (1 - beta2) * square
    # rows * cols / total of sums is n * m / (n * m) times that of means: no factor is left over
    u = g / (v.sqrt() if h["add"] else v.sqrt().clamp(min=eps1))
    if h["d"] is not None:
        u = u / max(1.0, rms(u) / h["d"])
    rho = min(h["lr"], 1 / math.sqrt(t)) if h["relative"] else h["lr"]
    rho = min(rho, 1e-6 * t) if h["warmup"] else rho
    alpha = max(eps2, rms(p)) * rho if h["scale"] else rho
    kept = p * (1 - h["decay"] * {"lr": h["lr"], "step": alpha, "none": 1.0}[h["decay_by"]])
    if h["beta1"] is None:
        return kept - alpha * u
    average = h["beta1"] * state.get("M", torch.zeros_like(p)) + (1 - h["beta1"]) * (alpha * u if h["late"] else u)
    state["M"] = average
    return kept - (average if h["late"] else alpha * average)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# Arguments of the class, and what they are in the reference.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torch": ({}, {}),
    "decay": ({"lr": 0.3, "weight_decay": 0.1, "d": 1.5}, {"lr": 0.3, "decay": 0.1, "d": 1.5}),
    "maximize": ({"maximize": True, "beta2_decay": -0.5, "lr": 1.0}, {"sign": -1.0, "tau": -0.5, "lr": 1.0}),
    "eps": ({"eps": (1e-2, 0.5), "lr": 0.1}, {"eps": (1e-2, 0.5), "lr": 0.1}),
    "paper": (
        {"eps": (1e-30, 1e-3), "eps1_mode": "add"},
        {"eps": (1e-30, 1e-3), "add": True},
    ),
    "hugging-face": (
        {"eps": (1e-3, 1e-3), "eps1_mode": "add", "beta1": 0.9, "decay_scale": "step", "weight_decay": 0.1}
        | {"warmup_init": True, "lr": 1e-2},
        {"eps": (1e-3, 1e-3), "add": True, "beta1": 0.9, "decay_by": "step", "decay": 0.1, "warmup": True},
    ),
    "t5x": (
        {"relative_step": False, "eps": (1e-30, 1e-3), "eps1_mode": "add", "beta1": 0.8, "decay_scale": "none"}
        | {"weight_decay": 1e-3, "lr": 0.05},
        {"relative": False, "eps": (1e-30, 1e-3), "add": True, "beta1": 0.8, "decay_by": "none", "decay": 1e-3}
        | {"lr": 0.05},
    ),
    "big-vision": (
        {"relative_step": False, "scale_parameter": False, "beta2_cap": 0.7, "eps": (1e-30, 0.0), "eps1_mode": "add"}
        | {"d": None, "beta1": 0.9, "moment_of": "update", "lr": 1e-3, "weight_decay": 0.1},
        {"relative": False, "scale": False, "cap": 0.7, "eps": (1e-30, 0.0), "add": True, "d": None, "beta1": 0.9}
        | {"late": False, "lr": 1e-3, "decay": 0.1},
    ),
}


def gradients(shape: Sequence[int], steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients whose size depends on step, row and column."""
    grads = []
    for t in range(steps):
        g = torch.randn(shape) * (0.1 + 0.3 * t)
        if len(shape) > 1:
            g = g * torch.logspace(-1, 1, shape[-1]) * torch.logspace(1, -2, shape[-2]).unsqueeze(-1)
        grads.append(g.to(dtype))
    return grads


def poison_free_step(optimizer: torch.optim.Optimizer, param: Tensor, grad: Tensor) -> None:
    param.grad = grad.clone()
    optimizer.step()
    assert torch.equal(param.grad, grad)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of each magnitude, and of a tenth of the largest."""
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all())
    error = (actual.double() - expected.double()).abs()
    bound = tolerance * (expected.double().abs() + 0.1 * expected.double().abs().max())
    assert bool((error <= bound).all()), f"off by {(error / bound.clamp(min=1e-300)).max():.2f} times the tolerance"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(5,), (33, 70), (2, 3, 40, 9), (300, 700), (3, 9000), (20000, 4)], ids=str)
def test_follows_the_paper(backend: Backend, variant: str, shape: tuple[int, ...]) -> None:
    kwargs, h = VARIANTS[variant]
    h = dict(h)
    sign = h.pop("sign", 1.0)
    start = torch.randn(shape)
    param = start.clone().to(backend.device).requires_grad_()
    optimizer = fused.Adafactor([param], backend=backend.name, **kwargs)
    expected, state = start.double(), {}
    for t, g in enumerate(gradients(shape, 8), start=1):
        poison_free_step(optimizer, param, g.to(backend.device))
        expected = paper(expected, sign * g.double(), state, t, **h)
    # The movement too: it is small beside the parameter.
    assert_near(param.detach().cpu(), expected, 2e-6)
    moved = (param.detach().cpu().double() - start.double(), expected - start.double())
    assert (moved[0] - moved[1]).norm() <= 1e-4 * moved[1].norm() + 1e-6 * math.sqrt(start.numel())
    assert float(optimizer.state[param]["step"]) == 8


@pytest.mark.parametrize("variant", ["torch", "paper", "hugging-face", "big-vision"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_matrices(backend: Backend, variant: str, shape: tuple[int, ...]) -> None:
    test_follows_the_paper(backend, variant, shape)


@pytest.mark.parametrize("eps1_mode", ["clamp", "add"])
def test_zero_gradient_of_a_single_element(backend: Backend, eps1_mode: str) -> None:
    """torch.optim squares the epsilon: with the published 1e-30 that is 0 in float32, and 0 / 0 a NaN."""
    start, g = torch.randn(20, 3, 1, 1), torch.randn(20, 3, 1, 1)
    g[7, 1] = g[19, 2] = 0.0
    param = start.clone().to(backend.device).requires_grad_()
    optimizer = fused.Adafactor([param], eps=(1e-30, 1e-3), eps1_mode=eps1_mode, backend=backend.name)
    for _ in range(2):
        poison_free_step(optimizer, param, g.to(backend.device))
    moved = param.detach().cpu() != start
    assert torch.equal(moved, g != 0)
    assert bool(param.isfinite().all())


def test_float64(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("float64 is tested on the CPU")
    check_float64(backend, (300, 257))


def check_float64(backend: Backend, matrix: tuple[int, int]) -> None:
    for shape in ((6,), matrix, (2, 3, 4), (50, 3, 4)):
        param = torch.randn(shape, dtype=torch.float64).requires_grad_()
        expected, state = param.detach().clone(), {}
        optimizer = fused.Adafactor([param], backend=backend.name, weight_decay=0.1)
        for t, g in enumerate(gradients(shape, 5, torch.float64), start=1):
            poison_free_step(optimizer, param, g)
            expected = paper(expected, g, state, t, decay=0.1, eps=(torch.finfo(torch.float64).eps, 1e-3))
        assert torch.allclose(param.detach(), expected, rtol=1e-12, atol=1e-13)
        assert all(v.dtype == torch.float64 for k, v in optimizer.state[param].items() if k != "step")


# ---- torch.optim ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_torch(backend: Backend, shape: tuple[int, ...]) -> None:
    start = torch.randn(shape)
    ours, theirs = start.clone().to(backend.device).requires_grad_(), start.clone().requires_grad_()
    a = fused.Adafactor([ours], 0.05, -0.7, (None, 1e-2), 1.2, 0.01, backend=backend.name)
    b = torch.optim.Adafactor([theirs], 0.05, -0.7, (None, 1e-2), 1.2, 0.01)
    for g in gradients(shape, 30):
        ours.grad, theirs.grad = g.to(backend.device), g
        a.step()
        b.step()
    assert_near(ours.detach().cpu(), theirs.detach(), 1e-5)
    assert set(a.state[ours]) == set(b.state[theirs])
    for name, value in b.state[theirs].items():
        assert_near(a.state[ours][name].cpu(), value, 4e-5)  # torch sums squares in float32


def test_same_defaults_as_torch() -> None:
    ours, theirs = (cls([torch.ones(2)]).defaults for cls in (fused.Adafactor, torch.optim.Adafactor))
    assert {name: ours[name] for name in theirs} == theirs


def test_state_goes_both_ways(backend: Backend) -> None:
    """A run that changes its optimizer, in either direction, goes on as torch.optim's alone would."""
    shapes = [(40, 30), (9,), (2, 5, 6), ()]
    starts = [torch.randn(s) for s in shapes]
    grads = [gradients(s, 12) for s in shapes]

    def run(kinds: Sequence[Callable[[list[Tensor]], torch.optim.Optimizer]]) -> list[Tensor]:
        params = [s.clone().to(backend.device).requires_grad_() for s in starts]
        saved = None
        for k, kind in enumerate(kinds):
            optimizer = kind(params)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for t in range(4 * k, 4 * k + 4):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g[t].to(backend.device)
                optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
        return [p.detach() for p in params]

    def ours(params: list[Tensor]) -> torch.optim.Optimizer:
        return fused.Adafactor(params, lr=0.1, backend=backend.name)

    def theirs(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(params, lr=0.1)

    expected = run([theirs, theirs, theirs])
    for kinds in ([theirs, ours, theirs], [ours, theirs, ours]):
        for actual, wanted in zip(run(kinds), expected, strict=True):
            assert_near(actual, wanted, 4e-6)


def test_loaded_bfloat16_state_becomes_float32() -> None:
    param = torch.randn(8, 4, dtype=torch.bfloat16).requires_grad_()
    theirs = torch.optim.Adafactor([param])
    param.grad = torch.randn_like(param)
    theirs.step()
    ours = fused.Adafactor([param])
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[param]["row_var"].dtype == torch.float32
    assert torch.equal(ours.state[param]["row_var"], theirs.state[param]["row_var"].float())
    ours.step()
    assert float(ours.state[param]["step"]) == 2


def test_from_torch_goes_on() -> None:
    start, grads = torch.randn(20, 10), gradients((20, 10), 6)
    results = []
    for convert in (False, True):
        param = start.clone().requires_grad_()
        optimizer: torch.optim.Optimizer = torch.optim.Adafactor([param], lr=0.1)
        for t, g in enumerate(grads):
            if convert and t == 3:
                optimizer = fused.from_torch(optimizer)
            param.grad = g
            optimizer.step()
        results.append(param.detach())
    assert_near(results[1], results[0], 2e-6)


def test_state_of_another_factoring_is_refused() -> None:
    param = torch.randn(4, 6).requires_grad_()
    param.grad = torch.randn(4, 6)
    whole = fused.Adafactor([param], min_dim_size_to_factor=128)
    whole.step()
    assert whole.state[param]["variance"].shape == (4, 6)
    factored = fused.Adafactor([param])
    saved = whole.state_dict()
    saved["param_groups"][0]["min_dim_size_to_factor"] = 0
    with pytest.raises(ValueError, match=r"'variance' of shape \(4, 6\).*'row_var' of shape \(4, 1\)"):
        factored.load_state_dict(saved)
    assert not factored.state


def test_eps_follows_each_parameter() -> None:
    """torch.optim keeps the epsilon of the first parameter's dtype: 65536 times too large for float32 ones after it."""
    start, g = torch.randn(16, 16), torch.randn(16, 16) * 1e-4
    alone = start.clone().requires_grad_()
    low, beside = torch.randn(16, 16).bfloat16().requires_grad_(), start.clone().requires_grad_()
    alone.grad, beside.grad, low.grad = g, g, g.bfloat16()
    fused.Adafactor([alone]).step()
    fused.Adafactor([low, beside]).step()
    assert torch.equal(alone, beside)
    assert (alone - start).norm() > 1e-3 * start.norm()

    spoiled = start.clone().requires_grad_()
    spoiled.grad = g
    torch.optim.Adafactor([low, spoiled]).step()
    assert not torch.allclose(spoiled - start, alone - start, rtol=0.5)  # else the comparison above shows nothing


def test_bfloat16_with_masters_uses_float32_epsilon(backend: Backend) -> None:
    start, g = torch.randn(32, 48).bfloat16(), torch.randn(32, 48).bfloat16() * 1e-4
    wide = start.float().to(backend.device).requires_grad_()
    low = start.clone().to(backend.device).requires_grad_()
    a = fused.Adafactor([wide], backend=backend.name)
    b = fused.Adafactor([low], master_weights="split", backend=backend.name)
    for _ in range(5):
        wide.grad, low.grad = g.float().to(backend.device), g.to(backend.device)
        a.step()
        b.step()
    assert torch.equal(low.float(), wide.bfloat16().float())


# ---- Hugging Face ----


class HuggingFaceRule:
    """The rule of ``transformers.Adafactor`` from its documentation and the paper, on one parameter, in float64."""

    def __init__(self, p: Tensor, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None,
            "weight_decay": 0.0, "scale_parameter": True, "relative_step": True, "warmup_init": False,
        }
        self.p, self.h, self.t = p.double(), {**defaults, **kwargs}, 0
        self.moments: dict[str, Tensor] = {}

    def _average(self, name: str, new: Tensor, beta: float) -> Tensor:
        old = self.moments.get(name, torch.zeros_like(new))
        self.moments[name] = beta * old + (1 - beta) * new
        return self.moments[name]

    def step(self, g: Tensor) -> None:
        h, g = self.h, g.double()
        self.t += 1
        size = h["lr"]
        if h["relative_step"]:
            size = min(1e-6 * self.t if h["warmup_init"] else 1e-2, self.t**-0.5)
        if h["scale_parameter"]:
            size *= max(h["eps"][1], rms(self.p))
        beta2 = 1 - self.t ** h["decay_rate"]
        square = g**2 + h["eps"][0]
        if g.ndim >= 2:
            row = self._average("row", square.mean(-1), beta2)
            col = self._average("col", square.mean(-2), beta2)
            factor = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) ** -0.5 * col.unsqueeze(-2) ** -0.5
        else:
            factor = self._average("whole", square, beta2) ** -0.5
        u = g * factor
        u = u / max(1.0, rms(u) / h["clip_threshold"]) * size
        if h["beta1"] is not None:
            u = self._average("moment", u, h["beta1"])
        self.p = self.p - h["weight_decay"] * size * self.p - u


HF_KWARGS: list[dict[str, Any]] = [
    {},
    {"warmup_init": True},
    {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
    {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "clip_threshold": 1.3, "decay_rate": -0.6},
    {"eps": (1e-4, 0.1), "beta1": 0.5, "weight_decay": 0.2},
]


@pytest.mark.parametrize("kwargs", HF_KWARGS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 9001), (9001, 1), (3, 5, 7), (103, 105)], ids=str)
def test_follows_hugging_face(backend: Backend, shape: tuple[int, ...], kwargs: dict[str, Any]) -> None:
    start = torch.randn(shape)
    param = start.clone().to(backend.device).requires_grad_()
    optimizer = fused.Adafactor.from_hf_kwargs([param], **kwargs, backend=backend.name)
    rule = HuggingFaceRule(start, **kwargs)
    for g in gradients(shape, 30):
        poison_free_step(optimizer, param, g.to(backend.device))
        rule.step(g)
    assert_near(param.detach().cpu(), rule.p, 1e-5)
    moved = (param.detach().cpu().double() - start, rule.p - start)
    assert (moved[0] - moved[1]).norm() <= 1e-4 * moved[1].norm() + 2e-6 * start.norm()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kwargs", HF_KWARGS, ids=str)
def test_follows_transformers(kwargs: dict[str, Any]) -> None:
    from transformers.optimization import Adafactor

    for shape in ((5,), (3, 5, 7), (103, 105)):
        start = torch.randn(shape)
        ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
        a, b = fused.Adafactor.from_hf_kwargs([ours], **kwargs), Adafactor([theirs], **kwargs)
        for g in gradients(shape, 30):
            ours.grad, theirs.grad = g.clone(), g.clone()
            a.step()
            b.step()
        assert_near(ours.detach(), theirs.detach(), 1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 1e-3}, "Cannot combine manual `lr`"),
        ({"relative_step": False}, "lr=None needs relative_step=True"),
        ({"lr": 1.0, "relative_step": False, "warmup_init": True}, "`warmup_init=True` requires"),
    ],
)
def test_hugging_face_contradictions(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused.Adafactor.from_hf_kwargs([torch.ones(2)], **kwargs)


# ---- which dimensions ----


def test_largest_dimensions_and_threshold(backend: Backend) -> None:
    """A convolution factored over its channels is a matrix for each place of its window."""
    start, grads = torch.randn(40, 30, 3, 3), gradients((3, 3, 40, 30), 5)
    param = start.clone().to(backend.device).requires_grad_()
    optimizer = fused.Adafactor([param], factored_dims="largest", min_dim_size_to_factor=16, backend=backend.name)
    expected, state = start.permute(2, 3, 0, 1).double(), {}
    for t, g in enumerate(grads, start=1):
        poison_free_step(optimizer, param, g.permute(2, 3, 0, 1).contiguous().to(backend.device))
        expected = paper(expected, g.double(), state, t)
    assert optimizer.state[param]["row_var"].shape == (40, 1, 3, 3)
    assert optimizer.state[param]["col_var"].shape == (1, 30, 3, 3)
    assert_near(param.detach().cpu(), expected.permute(2, 3, 0, 1), 2e-6)

    narrow = torch.randn(40, 15).to(backend.device).requires_grad_()
    narrow.grad = torch.randn(40, 15).to(backend.device)
    optimizer = fused.Adafactor([narrow], min_dim_size_to_factor=16, backend=backend.name)
    optimizer.step()
    assert set(optimizer.state[narrow]) == {"step", "variance"}


@pytest.mark.parametrize("moment", [None, torch.float32, "int8"], ids=str)
def test_layouts(backend: Backend, moment: Any) -> None:
    """Transposed, padded, channels-last, expanded-gradient: the result depends on the values alone."""
    options = {"backend": backend.name, "weight_decay": 0.1}
    options |= {} if moment is None else {"beta1": 0.9, "state_dtype": moment}
    start, grads = torch.randn(6, 4, 10, 12), gradients((6, 4, 10, 12), 4)
    layouts = {
        "plain": start.clone(),
        "channels_last": start.clone().contiguous(memory_format=torch.channels_last),
        "transposed": start.transpose(-1, -2).contiguous().transpose(-1, -2),
        "padded": torch.empty(6, 4, 10, 20)[..., 3:15].copy_(start),
    }
    results = {}
    for name, value in layouts.items():
        param = value.to(backend.device).requires_grad_()
        optimizer = fused.Adafactor([param], **options)
        for t, g in enumerate(grads):
            laid_out = g if t % 2 else g.transpose(0, 2).contiguous().transpose(0, 2)
            param.grad = laid_out.to(backend.device)
            optimizer.step()
        results[name] = param.detach().clone(memory_format=torch.contiguous_format)
    for name, value in results.items():
        assert torch.equal(value, results["plain"]), name
    assert not torch.equal(results["plain"].cpu(), start)


# ---- extremes ----


def test_zero_gradients_move_nothing_but_the_decay(backend: Backend) -> None:
    for kwargs in ({}, {"eps": (0.0, 1e-3)}, {"eps": (1e-30, 1e-3), "eps1_mode": "add"}, {"beta1": 0.9}):
        for shape in ((5,), (40, 30), (2, 300, 400)):
            start = torch.randn(shape)
            param = start.clone().to(backend.device).requires_grad_()
            optimizer = fused.Adafactor([param], weight_decay=0.5, backend=backend.name, **kwargs)
            poison_free_step(optimizer, param, torch.zeros(shape, device=backend.device))
            assert_near(param.detach().cpu(), start * (1 - 1e-2 * 0.5), 1e-6)


def test_lr_zero_moves_nothing(backend: Backend) -> None:
    start = torch.randn(20, 30)
    param = start.clone().to(backend.device).requires_grad_()
    optimizer = fused.Adafactor([param], lr=0.0, weight_decay=0.1, backend=backend.name)
    poison_free_step(optimizer, param, torch.zeros(20, 30, device=backend.device))
    assert torch.equal(param.detach().cpu(), start)


@pytest.mark.parametrize("shape", [(30, 40), (300, 400)], ids=str)
def test_one_row_of_zeros(backend: Backend, shape: tuple[int, int]) -> None:
    start, grads = torch.randn(shape), gradients(shape, 3)
    for g in grads:
        g[7] = 0.0
        g[:, 5] = 0.0
    ours, theirs = start.clone().to(backend.device).requires_grad_(), start.clone().requires_grad_()
    a, b = fused.Adafactor([ours], backend=backend.name), torch.optim.Adafactor([theirs])
    for g in grads:
        poison_free_step(a, ours, g.to(backend.device))
        poison_free_step(b, theirs, g)
    assert_near(ours.detach().cpu(), theirs.detach(), 1e-6)
    assert torch.equal(ours.detach().cpu()[7], start[7])


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e12])
def test_scale_of_gradients(backend: Backend, scale: float) -> None:
    """Adafactor does not see the gradients' scale, where epsilon does not."""
    start, g = torch.randn(50, 60), torch.randn(50, 60)
    results = []
    for factor in (1.0, scale):
        param = start.clone().to(backend.device).requires_grad_()
        optimizer = fused.Adafactor([param], eps=(0.0, 1e-3), eps1_mode="clamp", backend=backend.name)
        poison_free_step(optimizer, param, (g * factor).to(backend.device))
        results.append(param.detach().cpu() - start)
    assert_near(results[1], results[0], 1e-3)


def test_empty_tensors_and_missing_gradients(backend: Backend) -> None:
    shapes = [(0,), (3, 0), (0, 4), (2, 0, 5), (4, 4)]
    params = [torch.randn(s).to(backend.device).requires_grad_() for s in shapes]
    idle = torch.randn(3, 3).to(backend.device).requires_grad_()
    before = params[-1].detach().clone()
    optimizer = fused.Adafactor([*params[:2], idle, *params[2:]], backend=backend.name)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert idle not in optimizer.state or not optimizer.state[idle]
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)
    assert not torch.equal(params[-1].detach(), before)


def test_nan_shows(backend: Backend) -> None:
    param = torch.ones(4, 5).to(backend.device).requires_grad_()
    g = torch.ones(4, 5)
    g[1, 2] = math.nan
    optimizer = fused.Adafactor([param], backend=backend.name)
    param.grad = g.to(backend.device)
    optimizer.step()
    assert bool(param.detach()[1, 2].isnan())


# ---- the engine's options ----


def test_max_grad_norm(backend: Backend) -> None:
    shapes = [(30, 40), (7,)]
    starts, grads = [torch.randn(s) for s in shapes], [torch.randn(s) * 3 for s in shapes]
    ours = [s.clone().to(backend.device).requires_grad_() for s in starts]
    theirs = [s.clone().requires_grad_() for s in starts]
    # without the clipping of updates, and with a large eps, so that the scale of gradients shows
    kwargs: dict[str, Any] = {"eps": (0.1, 1e-3), "d": 1e6, "lr": 0.5}
    a = fused.Adafactor(ours, **kwargs, max_grad_norm=0.5, backend=backend.name)
    b = torch.optim.Adafactor(theirs, **kwargs)
    for _ in range(3):
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = g.clone().to(backend.device), g.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        a.step()
        b.step()
        assert a.grad_norm is not None
        assert float(a.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert_near(p.detach().cpu(), q.detach(), 1e-5)


def test_skipped_step_changes_nothing(backend: Backend) -> None:
    check_skipped_step(backend, (300, 400))


def check_skipped_step(backend: Backend, matrix: tuple[int, int]) -> None:
    params = [torch.randn(s).to(backend.device).requires_grad_() for s in (matrix, (9,))]
    optimizer = fused.Adafactor(params, beta1=0.9, skip_nonfinite=True, backend=backend.name)

    def snapshot() -> list[Tensor]:
        states = [t.clone() for p in params for _, t in sorted(optimizer.state[p].items())]
        return [*(p.detach().clone() for p in params), *states]

    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = snapshot()
    bad = params[0].grad
    assert bad is not None
    bad[5, 5] = math.inf
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    bad[5, 5] = 1.0
    for p in params:
        p.grad = 2 * p.grad if p.grad is not None else None
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))


@pytest.mark.parametrize("masters", ["fp32", "split"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masters_are_float32(backend: Backend, masters: str, grad_dtype: torch.dtype) -> None:
    """With an exact master a bfloat16 run is a float32 run."""
    for shape in ((33, 70), (300, 400), (11,)):
        start, grads = torch.randn(shape).bfloat16(), gradients(shape, 5, torch.bfloat16)
        low, wide = start.clone().to(backend.device).requires_grad_(), start.float().to(backend.device).requires_grad_()
        low.grad_dtype = grad_dtype
        a = fused.Adafactor([low], weight_decay=0.1, beta1=0.9, master_weights=masters, backend=backend.name)
        b = fused.Adafactor([wide], weight_decay=0.1, beta1=0.9, backend=backend.name)
        for g in grads:
            low.grad, wide.grad = g.to(grad_dtype).to(backend.device), g.float().to(backend.device)
            a.step()
            b.step()
        assert torch.allclose(low.float(), wide, rtol=2**-8, atol=0)
        for name in ("exp_avg", "row_var", "col_var") if len(shape) > 1 else ("exp_avg", "variance"):
            assert torch.equal(a.state[low][name], b.state[wide][name]), name


@pytest.mark.parametrize("moment", [torch.bfloat16, torch.float16, "int8"], ids=str)
def test_low_precision_first_moment(backend: Backend, moment: Any) -> None:
    start, grads = torch.randn(100, 90), gradients((100, 90), 10)
    results = []
    for state_dtype in (torch.float32, moment):
        param = start.clone().to(backend.device).requires_grad_()
        optimizer = fused.Adafactor([param], lr=0.1, beta1=0.9, state_dtype=state_dtype, backend=backend.name)
        for g in grads:
            poison_free_step(optimizer, param, g.to(backend.device))
        results.append(param.detach().cpu() - start)
        assert optimizer.state[param]["row_var"].dtype == torch.float32
    assert (results[1] - results[0]).norm() < 0.05 * results[0].norm()


def test_backends_agree_in_every_format() -> None:
    """The kernels and the reference store the same values, but for what the roundings of two programs may tip over."""
    if backends.extension is None:
        pytest.skip("the compiled extension is not there")
    for masters, stochastic in ((None, False), (None, True), ("split8", True), ("split", False), ("fp32", False)):
        for dtype in (torch.bfloat16, torch.float16):
            results = []
            start, grads = torch.randn(50, 60).to(dtype), gradients((50, 60), 3, dtype)
            for name in ("cpu", "reference"):
                param = start.clone().requires_grad_()
                optimizer = fused.Adafactor(
                    [param],
                    lr=0.1,
                    beta1=0.9,
                    state_dtype="int8",
                    master_weights=masters,
                    stochastic_rounding=stochastic,
                    seed=3,
                    backend=name,
                )
                for g in grads:
                    poison_free_step(optimizer, param, g)
                results.append(param.detach().float())
            same = (results[0] == results[1]).float().mean()
            assert float(same) > 0.99, (masters, stochastic, dtype)


def test_bytes_per_parameter() -> None:
    param = torch.randn(1024, 1024).bfloat16().requires_grad_()
    param.grad = torch.randn_like(param)
    optimizer = fused.Adafactor([param], master_weights="split8")
    optimizer.step()
    stored = param.numel() * param.element_size()
    stored += sum(t.numel() * t.element_size() for t in optimizer.state[param].values())
    assert stored / param.numel() <= 3.02


def test_deterministic(threads: None, isas: list[str]) -> None:
    """The same bits for any number of threads and any instruction set, whether a tensor is divided or not."""
    shapes = [(700, 900), (3, 70000), (40000, 5), (300, 16, 3, 3), (5, 300, 400), (200000,), (64, 64), (7,), (1, 9)]
    shapes += [(150000, 1, 1), (300, 100, 2, 3), (20, 3, 1, 7)]
    starts, grads = [torch.randn(s) for s in shapes], [gradients(s, 2) for s in shapes]
    expected: list[Tensor] | None = None
    for isa in isas:
        backends.extension.select_isa(isa)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            params = [s.clone().requires_grad_() for s in starts]
            optimizer = fused.Adafactor(params, weight_decay=0.1, beta1=0.9, backend="cpu")
            for t in range(2):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g[t]
                optimizer.step()
            results = [*(p.detach() for p in params), *(v for p in params for v in optimizer.state[p].values())]
            if expected is None:
                expected = results
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), (isa, count)


def test_lr_in_a_tensor_is_followed(backend: Backend) -> None:
    lr = torch.tensor(1e-2)
    params = [torch.ones(6, 5).to(backend.device).requires_grad_() for _ in range(2)]
    optimizers = [fused.Adafactor([p], lr=v, backend=backend.name) for p, v in zip(params, (lr, 1e-2), strict=True)]
    for value in (1e-2, 3e-3):
        lr.fill_(value)
        optimizers[1].param_groups[0]["lr"] = float(lr)
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.arange(30.0).view(6, 5).to(backend.device)
            optimizer.step()
    assert torch.equal(*params)


def test_options_may_differ_by_group(backend: Backend) -> None:
    starts, g = [torch.randn(20, 30) for _ in range(3)], torch.randn(20, 30)
    options: list[dict[str, Any]] = [{}, {"beta1": 0.9, "d": None}, {"lr": 0.5, "eps1_mode": "add", "eps": (1e-8, 0.1)}]
    together = [s.clone().to(backend.device).requires_grad_() for s in starts]
    alone = [s.clone().to(backend.device).requires_grad_() for s in starts]
    groups = [{"params": [p], **o} for p, o in zip(together, options, strict=True)]
    optimizers = [
        fused.Adafactor(groups, backend=backend.name),
        *(fused.Adafactor([p], **o, backend=backend.name) for p, o in zip(alone, options, strict=True)),
    ]
    for _ in range(3):
        for p in (*together, *alone):
            p.grad = g.to(backend.device)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


# ---- refusals ----


def test_refuses_what_it_cannot_do(backend: Backend) -> None:
    wave = torch.randn(3, 3, dtype=torch.complex64).to(backend.device).requires_grad_()
    wave.grad = torch.randn_like(wave)
    with pytest.raises(RuntimeError, match="Adafactor does not support complex parameters"):
        fused.Adafactor([wave], backend=backend.name).step()
    table = torch.randn(4, 3).to(backend.device).requires_grad_()
    table.grad = torch.randn(4, 3).to_sparse().to(backend.device)
    with pytest.raises(RuntimeError, match="Adafactor does not support sparse gradients"):
        fused.Adafactor([table], backend=backend.name).step()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"beta2_decay": 0.1}, "beta2_decay should be <= 0 but is: 0.1"),
        ({"eps": (-1.0, 1e-3)}, "epsilon1 should be >= 0 but is: -1.0"),
        ({"eps": (None, -1.0)}, "epsilon2 should be >= 0 but is: -1.0"),
        ({"d": 0.5}, "Clipping threshold d should be >= 1 but is: 0.5"),
        ({"weight_decay": -0.1}, "weight_decay should be >= 0 but is: -0.1"),
        ({"beta1": 1.0}, "beta1 should be in .* but is: 1.0"),
        ({"beta2_cap": 1.5}, "beta2_cap should be in .* but is: 1.5"),
        ({"eps1_mode": "max"}, "eps1_mode should be one of .* but is: max"),
        ({"moment_of": "grad"}, "moment_of should be one of .* but is: grad"),
        ({"decay_scale": "wd"}, "decay_scale should be one of .* but is: wd"),
        ({"factored_dims": "first"}, "factored_dims should be one of .* but is: first"),
        ({"min_dim_size_to_factor": -1}, "min_dim_size_to_factor should be >= 0 but is: -1"),
        ({"warmup_init": True, "relative_step": False}, "`warmup_init=True` requires"),
    ],
)
def test_refuses_values_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused.Adafactor([torch.ones(2)], **kwargs)


@pytest.mark.slow
def test_compiled_step() -> None:
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    compiled, eager = fused.Adafactor([p]), fused.Adafactor([q])
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend="eager", fullgraph=True)
    for _ in range(3):
        p.grad = torch.randn(4, 3)
        q.grad = p.grad.clone()
        step()
        eager.step()
        torch.testing.assert_close(p, q)
