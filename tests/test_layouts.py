"""Any layout, alignment, order and presence of parameters and gradients steps like the plain case."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case
from conftest import Backend
from oracle import Oracle, assign_gradient, make_params, random_gradient, set_gradients
from torch import Tensor

import fused

Layout = Callable[[Tensor], Tensor]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def permuted(x: Tensor) -> Tensor:
    return x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


def with_gaps(x: Tensor) -> Tensor:
    """Every second element along the last dimension of something larger."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def with_odd_rows(x: Tensor) -> Tensor:
    """Rows that are a few elements apart, as in a slice of a larger matrix."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def misaligned(x: Tensor) -> Tensor:
    """One element past the start of its storage."""
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    view = flat[1:].view(x.shape)
    view.copy_(x)
    return view


LAYOUTS: dict[str, Layout] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "transposed": transposed,
    "permuted": permuted,
    "with_gaps": with_gaps,
    "with_odd_rows": with_odd_rows,
    "misaligned": misaligned,
}
GRADIENT_LAYOUTS: dict[str, Layout] = {
    **LAYOUTS,
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "repeated_rows": lambda x: x[:, :1].expand(x.shape),
}
SHAPE = (5, 4, 3, 7)


def states_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {name: value for name, value in optimizer.state[p].items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("grad_layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_contiguous_result(layout: str, grad_layout: str, backend: Backend) -> None:
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            p = torch.nn.Parameter(LAYOUTS[layout](torch.randn(SHAPE).to(dtype)).to(backend.device))
            plain = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
            optimizer, expected = (case.make([x], backend=backend.name) for x in (p, plain))
            for _ in range(3):
                p.grad = GRADIENT_LAYOUTS[grad_layout](random_gradient(SHAPE, dtype, backend.device))
                plain.grad = p.grad.clone(memory_format=torch.contiguous_format)
                optimizer.step()
                expected.step()
            assert torch.equal(p, plain), f"{case.name} {dtype}"
            for name, value in states_of(optimizer, p).items():
                assert torch.equal(value, expected.state[plain][name]), f"{case.name} {dtype} {name}"


def test_elements_between_those_of_a_view_are_left_alone(backend: Backend) -> None:
    whole = torch.arange(40, dtype=torch.float32, device=backend.device)
    for case in CASES:
        before = whole.clone()
        p = torch.nn.Parameter(whole[2:22:2].view(2, 5))
        p.grad = torch.ones_like(p)
        case.make([p], backend=backend.name).step()
        assert (whole[2:22:2] != before[2:22:2]).all()
        outside = torch.ones(40, dtype=torch.bool, device=backend.device)
        outside[2:22:2] = False
        assert torch.equal(whole[outside], before[outside])


def test_neighbours_in_one_buffer_are_left_alone(backend: Backend) -> None:
    """Slices of one flat buffer, as DDP's and FSDP's: 4-byte aligned, nothing between them."""
    for case in CASES:
        sizes = [1, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65]
        flat, grads = (torch.randn(sum(sizes) + 2, device=backend.device) for _ in range(2))
        before = flat.clone()
        params = [torch.nn.Parameter(part) for part in flat[1:-1].split(sizes)]
        assert any(p.data_ptr() % 8 for p in params)
        for p, gradient in zip(params, grads[1:-1].split(sizes), strict=True):
            p.grad = gradient
        one = torch.nn.Parameter(before[1:-1].clone())
        one.grad = grads[1:-1].clone()
        for optimizer in (case.make(params, backend=backend.name), case.make([one], backend=backend.name)):
            optimizer.step()
            optimizer.step()
        assert torch.equal(flat[1:-1], one)
        assert flat[0] == before[0] and flat[-1] == before[-1]


def test_gradients_of_another_dtype_and_layout(backend: Backend) -> None:
    for case in CASES:
        p = torch.nn.Parameter(channels_last(torch.randn(SHAPE)).to(backend.device))
        plain = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        optimizer, expected = (case.make([x], backend=backend.name) for x in (p, plain))
        for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
            assign_gradient(p, transposed(random_gradient(SHAPE, dtype, backend.device)))
            assert p.grad is not None
            assign_gradient(plain, p.grad.contiguous())
            optimizer.step()
            expected.step()
            assert torch.equal(p, plain), f"{case.name} {dtype}"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_conjugated_complex_gradients(dtype: torch.dtype, backend: Backend) -> None:
    for case in CASES:
        p, plain = (torch.nn.Parameter(torch.ones(6, dtype=dtype, device=backend.device)) for _ in range(2))
        gradient = random_gradient((6,), dtype, backend.device)
        p.grad, plain.grad = gradient.conj(), gradient.conj().resolve_conj()
        assert p.grad.is_conj()
        case.make([p], backend=backend.name).step()
        case.make([plain], backend=backend.name).step()
        assert torch.equal(p, plain), case.name


def test_negated_gradients(backend: Backend) -> None:
    """A view that stands for the negated memory, as autograd leaves where a parameter is the imaginary part of z*."""
    for case in CASES:
        p, plain = (torch.nn.Parameter(torch.full((), 0.5, device=backend.device)) for _ in range(2))
        optimizer, expected = case.make([p], backend=backend.name), case.make([plain], backend=backend.name)
        for negated in (False, True, True, False):  # the address alone does not tell
            for x in (p, plain):
                x.grad = None
                z = torch.complex(torch.ones_like(x), x) * 1j
                (z.conj().imag if negated else z.imag).mul(2.0 - 3.0 * x).backward()
            assert p.grad is not None and plain.grad is not None
            p.grad = p.grad if not negated else torch._neg_view(-p.grad)
            plain.grad = plain.grad.resolve_neg()
            assert p.grad.is_neg() == negated
            optimizer.step()
            expected.step()
            assert torch.equal(p, plain), case.name
    p = torch.nn.Parameter(torch.zeros((), device=backend.device))
    (torch.complex(p + 1.0, p).conj() * (1 + 2j)).real.backward()
    fused.SGD([p], lr=1.0, backend=backend.name).step()
    assert float(p) == -3.0


@pytest.mark.parametrize("layout", ["contiguous", "with_gaps", "misaligned"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
def test_a_parameter_that_stands_twice(case: Case, layout: str, backend: Backend) -> None:
    """torch.optim warns, and its loop steps such a parameter once for each time it stands there, in that order."""
    for variant in case.variants if layout == "contiguous" else case.variants[:1]:
        p = torch.nn.Parameter(LAYOUTS[layout](torch.randn(257, 260)).to(backend.device))  # enough for two threads
        once = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        others = make_params([(7,), (3, 5)], torch.float32, backend.device)
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = case.make([others[0], p, p, others[1], p], variant, backend=backend.name)
        expected = case.make([once], variant, backend=backend.name)
        for _ in range(2):
            set_gradients([p, *others])
            assert p.grad is not None
            once.grad = p.grad.clone()
            optimizer.step()
            for _ in range(3):
                expected.step()
            assert torch.equal(p, once), variant.name
            for name, value in states_of(optimizer, p).items():
                assert torch.equal(value, expected.state[once][name]), (variant.name, name)
            assert all(int(optimizer.state[q].get("step", 0)) < 3 for q in others)


@pytest.mark.parametrize("case", [case for case in CASES if case.counterpart], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
def test_a_parameter_that_stands_twice_is_stepped_as_by_torch(case: Case, backend: Backend) -> None:
    ours = make_params([(5,), (4,)], torch.float32, backend.device)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = case.make([ours[0], ours[1], ours[0]], backend=backend.name, max_grad_norm=float("inf"))
    torchs = case.make_counterpart([theirs[0], theirs[1], theirs[0]], foreach=False)
    for _ in range(3):
        set_gradients(ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        torchs.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    if "step" in mine.state[ours[0]]:
        assert [int(mine.state[p]["step"]) for p in ours] == [6, 3]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mixed_lists(case: Case, backend: Backend) -> None:
    """Dtypes and sizes side by side; no elements at the start, in the middle and at the end; no dimension."""
    shapes = [(0,), (), (3, 0, 2), (7,), (0, 5), (64, 65), (1, 1), (0,)]
    params = [
        p
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        for p in make_params(shapes, dtype, backend.device)
    ]
    oracle = Oracle(case, case.variants[0], case.make(params, backend=backend.name), params)
    for _ in range(3):
        set_gradients(params)
        oracle.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_empty_parameters(case: Case, backend: Backend) -> None:
    params = make_params([(0,), (4, 0)], torch.float32, backend.device)
    set_gradients(params)
    optimizer = case.make(params, backend=backend.name)
    optimizer.step()
    optimizer.step()
    assert all(int(state["step"]) == 2 for state in optimizer.state.values() if "step" in state)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_that_come_and_go(case: Case, backend: Backend) -> None:
    """Steps are counted per parameter: one that joins late gets the bias correction of its own first step."""
    params = make_params([(33,)] * 4, torch.float32, backend.device)
    oracle = Oracle(case, case.variants[0], case.make(params, backend=backend.name), params)
    for missing in ({1, 3}, {0, 3}, set(), {3}, {0, 1, 2, 3}, {1}):
        set_gradients(params)
        for index in missing:
            params[index].grad = None
        oracle.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_gradient_makes_no_state(case: Case, backend: Backend) -> None:
    params = make_params([(3,), (4,)], torch.float32, backend.device)
    params[0].grad = torch.ones_like(params[0])
    optimizer = case.make(params, backend=backend.name)
    if case.name != "Adagrad":  # whose state is made at construction, as torch.optim's
        optimizer.step()
        assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    case.make(list(params[1:]), backend=backend.name).step()
    case.make([torch.nn.Parameter(torch.ones(2), requires_grad=False)]).step()


def test_the_same_storage_refilled(backend: Backend) -> None:
    """Gradients zeroed and accumulated in place, then set to None: the address changes or stays, the value counts."""
    for case in CASES:
        p = torch.nn.Parameter(torch.randn(9, device=backend.device))
        oracle = Oracle(case, case.variants[0], case.make([p], backend=backend.name), [p])
        for set_to_none in (False, False, True, False, True):
            p.square().sum().backward()
            oracle.step()
            oracle.optimizer.zero_grad(set_to_none=set_to_none)


def test_layout_changes_between_steps(backend: Backend) -> None:
    """``p.data`` replaced by another layout of the same values: state follows."""
    for case in CASES:
        p = torch.nn.Parameter(torch.randn(SHAPE, device=backend.device))
        oracle = Oracle(case, case.variants[0], case.make([p], backend=backend.name), [p])
        for layout in ("contiguous", "channels_last", "with_gaps", "permuted", "contiguous"):
            p.data = LAYOUTS[layout](p.data)
            p.grad = random_gradient(SHAPE, torch.float32, backend.device)
            oracle.step()


def test_dimensions_beyond_the_table(backend: Backend) -> None:
    """More dimensions than the table's rows keep."""
    for case in CASES:
        params = make_params([(2,) * 10, (1,) * 12], torch.float32, backend.device)
        oracle = Oracle(case, case.variants[0], case.make(params, backend=backend.name), params)
        for _ in range(2):
            set_gradients(params)
            oracle.step()
