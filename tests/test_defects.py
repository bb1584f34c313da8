"""One regression test for every defect that a well-known optimizer library was reported with, where it applies here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import CASES, Case
from conftest import Backend
from oracle import Oracle, assign_gradient, make_params, set_gradients

import fused

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_gradient_strides_differ_from_the_parameters(case: Case, backend: Backend) -> None:
    """torch 2.13's fused CPU Adam reads such a gradient in the wrong order."""
    p = torch.nn.Parameter(torch.randn(6, 5, device=backend.device))
    oracle = Oracle(case, case.variants[0], case.make([p], backend=backend.name), [p])
    for _ in range(3):
        p.grad = torch.randn(5, 6, device=backend.device).t()
        oracle.step()


def test_load_state_dict_keeps_float32_moments(backend: Backend) -> None:
    """torch #43706: cast to the parameter's bfloat16."""
    p = torch.nn.Parameter(torch.randn(8, device=backend.device).bfloat16())
    optimizer = fused.AdamW([p], state_dtype=torch.float32, backend=backend.name)
    p.grad = torch.randn_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[p][name].dtype == torch.float32
        assert torch.equal(optimizer.state[p][name], saved["state"][0][name])


@each_case
def test_gradient_dtype_differs(case: Case, backend: Backend) -> None:
    """torch #120168, #158709: raises."""
    params = make_params([(9,)], torch.float32, backend.device)
    oracle = Oracle(case, case.variants[0], case.make(params, backend=backend.name), params)
    set_gradients(params, [torch.bfloat16])
    oracle.step()


def test_large_float16_gradients_are_clipped_not_zeroed(backend: Backend) -> None:
    """torch's clip_grad_norm_ sums squares in float16: inf, and every gradient becomes 0."""
    p = torch.nn.Parameter(torch.zeros(4, device=backend.device))
    assign_gradient(p, torch.full((4,), 3e4, dtype=torch.float16, device=backend.device))
    optimizer = fused.SGD([p], lr=1.0, max_grad_norm=2.0, backend=backend.name)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -1.0))
    assert math.isclose(float(optimizer.grad_norm), 6e4, rel_tol=1e-5)


@pytest.mark.parametrize("fused_flag", [None, True])
def test_unscale_and_clip_once(fused_flag: bool | None) -> None:
    """torch #90752, #96755: GradScaler.unscale_, clipping and a fused step unscaled twice."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = fused.SGD([p], lr=1.0, fused=fused_flag)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([p], 2.5)
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), torch.tensor([-1.5, -2.0]))


@each_case
def test_groups_added_after_construction(case: Case, backend: Backend) -> None:
    """apex FusedAdam never steps them."""
    first, second = make_params([(3,), (4,)], torch.float32, backend.device)
    optimizer = case.make([first], lr=0.1, backend=backend.name)
    set_gradients([first, second])
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    before = second.detach().clone()
    optimizer.step()
    assert not torch.equal(before, second)


@each_case
def test_empty_tensor_in_the_list(case: Case, backend: Backend) -> None:
    """apex, DeepSpeed: the last launch is dropped, or memory outside is written."""
    for shapes in ([(0,), (5,)], [(5,), (0,)], [(5,), (0,), (5,)]):
        params = make_params(shapes, torch.float32, backend.device)
        oracle = Oracle(case, case.variants[0], case.make(params, backend=backend.name), params)
        set_gradients(params)
        oracle.step()


@pytest.mark.large
def test_more_elements_than_int32(backend: Backend) -> None:
    """torch #101760, apex #1825, DeepSpeed #7639, TransformerEngine #3136."""
    size = 2**31 + 65
    p = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=backend.device))
    p.grad = torch.ones_like(p)
    fused.SGD([p], lr=0.5, backend=backend.name).step()
    assert bool((p[-100:] == 0.5).all()) and bool((p[:100] == 0.5).all()) and bool((p[2**31 - 50 : 2**31] == 0.5).all())


def test_bfloat16_master_weights_accumulate(backend: Backend) -> None:
    """apex #1728: masters of bfloat16 parameters are ignored, and small steps are lost."""
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16, device=backend.device))
    optimizer = fused.SGD([p], lr=1e-3, master_weights="fp32", backend=backend.name)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach().float(), torch.full_like(p, 0.9).float(), rtol=4e-3, atol=0)


def test_steps_are_counted_per_parameter(backend: Backend) -> None:
    """DeepSpeed #8471: one count per dtype gives the wrong bias correction."""
    a, b = (torch.nn.Parameter(torch.zeros(3, device=backend.device)) for _ in range(2))
    optimizer = fused.Adam([a, b], lr=0.1, eps=0.0, backend=backend.name)
    a.grad = torch.ones_like(a)
    for _ in range(5):
        optimizer.step()
    b.grad = torch.ones_like(b)
    optimizer.step()
    torch.testing.assert_close(b.detach(), torch.full_like(b, -0.1))
    assert (int(optimizer.state[a]["step"]), int(optimizer.state[b]["step"])) == (6, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lion_zero_and_nan(dtype: torch.dtype, backend: Backend) -> None:
    """DeepSpeed: sign(0) moves by lr, NaN is hidden."""
    p = torch.nn.Parameter(torch.ones(40, dtype=dtype, device=backend.device))
    p.grad = torch.zeros_like(p)
    p.grad[17], p.grad[18], p.grad[39] = float("nan"), 1.0, -1.0
    fused.Lion([p], lr=0.25, backend=backend.name).step()
    moved = {17: float("nan"), 18: 0.75, 39: 1.25}
    wanted = torch.tensor([moved.get(i, 1.0) for i in range(40)], dtype=dtype, device=backend.device)
    torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=0, equal_nan=True)


def test_lion_decay_is_decoupled_and_of_the_old_parameter(backend: Backend) -> None:
    """bitsandbytes #1992, #2010: coupled, or after the step."""
    p = torch.nn.Parameter(torch.full((3,), 2.0, device=backend.device))
    p.grad = torch.ones_like(p)
    optimizer = fused.Lion([p], lr=0.5, weight_decay=0.5, backend=backend.name)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 2.0 * 0.75 - 0.5))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full_like(p, 0.01))


def test_adagrad_weight_decay_is_torchs(backend: Backend) -> None:
    """DeepSpeed's CPU Adagrad decays wrongly."""
    ours, theirs = (torch.nn.Parameter(torch.full((3,), 2.0, device=backend.device)) for _ in range(2))
    for p, optimizer in (
        (ours, fused.Adagrad([ours], lr=0.1, weight_decay=0.3, backend=backend.name)),
        (theirs, torch.optim.Adagrad([theirs], lr=0.1, weight_decay=0.3)),
    ):
        for value in (1.0, -2.0):
            p.grad = torch.full_like(p, value)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_capturable_keeps_float32_moments(backend: Backend) -> None:
    """apex: the capturable kernel rounds float32 moments to the parameter's dtype."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=backend.device))
    p.grad = torch.full_like(p, 1.0)
    optimizer = fused.AdamW([p], state_dtype=torch.float32, capturable=True, backend=backend.name)
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state[p]["exp_avg_sq"], torch.full_like(p, 1e-3, dtype=torch.float32), rtol=1e-6, atol=0
    )


def test_split_weights_keep_nan(backend: Backend) -> None:
    """TransformerEngine: with 16-bit remainders a NaN weight becomes 0."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device=backend.device))
    p.data[1], p.data[2] = float("nan"), float("inf")
    p.grad = torch.ones_like(p)
    optimizer = fused.SGD([p], lr=0.5, master_weights="split", backend=backend.name)
    for _ in range(2):
        optimizer.step()
    assert p[0] == 0.0 and p[1].isnan() and p[2] == float("inf")


def test_norm_of_mixed_dtypes(backend: Backend) -> None:
    """TransformerEngine, Megatron #7338: kernels chosen by the first tensor's dtype."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in ((2, torch.bfloat16), (3, torch.float32))]
    params += [torch.nn.Parameter(torch.zeros(4, dtype=torch.float16)), torch.nn.Parameter(torch.zeros(7).double())]
    for p in params:
        p.data = p.data.to(backend.device)
        p.grad = torch.full_like(p, 0.5)
    optimizer = fused.SGD(params, lr=1.0, max_grad_norm=1.0, backend=backend.name)
    optimizer.step()
    assert math.isclose(float(optimizer.grad_norm), 2.0, rel_tol=1e-6)
    for p in params:
        torch.testing.assert_close(p.detach().float(), torch.full_like(p, -0.25).float(), rtol=1e-5, atol=0)


@each_case
def test_zero_gradients_with_clipping(case: Case, backend: Backend) -> None:
    """DeepSpeed #5223: an assertion; here a step of nothing."""
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    p.grad = torch.zeros_like(p)
    case.make([p], weight_decay=0.0, max_grad_norm=1.0, backend=backend.name).step()
    assert torch.equal(p, torch.ones_like(p))


@each_case
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_nonfinite_gradients_skip_the_step(case: Case, bad: float, backend: Backend) -> None:
    """DeepSpeed PR #8614: a non-finite norm negates the gradients."""
    params = make_params([(33,), (5,)], torch.float32, backend.device)
    optimizer = case.make(params, max_grad_norm=1.0, skip_nonfinite=True, backend=backend.name)
    set_gradients(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    assert params[1].grad is not None
    params[1].grad[4] = bad
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before[1], strict=True))
    for index, state in before[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(optimizer.state[params[index]][name], value), name


@each_case
def test_autograd_hears_of_the_write(case: Case, backend: Backend) -> None:
    """Kernels that write through raw pointers leave autograd with silently wrong gradients."""
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    p.grad = torch.ones_like(p)
    version = p._version
    case.make([p], backend=backend.name).step()
    assert p._version > version


def test_group_count_changes_nothing(backend: Backend) -> None:
    """rf-detr #1409: hundreds of groups made steps slower. Here each is a row, and results are those of one group."""
    torch.manual_seed(1)
    one, many = (
        [torch.nn.Parameter(torch.full((3,), float(i), device=backend.device)) for i in range(300)] for _ in range(2)
    )
    for p, q in zip(one, many, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    fused.AdamW(one, backend=backend.name).step()
    fused.AdamW([{"params": [p]} for p in many], backend=backend.name).step()
    assert all(torch.equal(p, q) for p, q in zip(one, many, strict=True))
