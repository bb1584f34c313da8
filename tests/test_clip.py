"""Norms and clipping: the functions, and the options of an optimizer, against float64 and torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import norms
import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import clip_grad_value_ as torch_clip_grad_value_
from torch.overrides import TorchFunctionMode

import fused
from fused import backends, clip

INF = float("inf")
READS = ("__get__", "is_conj", "is_neg", "is_complex", "numel", "conj", "detach", "requires_grad")
"""What is asked of every tensor, without work for a device."""
SIZES = [(0,), (1,), (7,), (63,), (1023,), (65537,), (3, 5), (17, 31, 3), ()]


@pytest.fixture(params=["extension", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(clip, "extension", None)
    elif backends.extension is None:
        pytest.skip("the compiled extension is not there")
    return str(request.param)


def parameter(grad: Tensor | None, like: Tensor | None = None) -> torch.nn.Parameter:
    shape = torch.zeros_like(like if grad is None else grad)
    param = torch.nn.Parameter(shape)
    param.grad = grad
    return param


def random_params(
    seed: int = 0, dtypes: list[torch.dtype] = norms.DTYPES, scale: float = 1.0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [
        parameter((torch.randn(shape, generator=generator) * scale).to(dtype)) for dtype in dtypes for shape in SIZES
    ]
    params.insert(2, parameter(None, torch.ones(3)))
    return params


def norm64(params: list[torch.nn.Parameter], norm_type: float = 2.0) -> float:
    parts = [torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad for p in params if p.grad is not None]
    flat = torch.cat([part.double().reshape(-1) for part in parts])
    return float(torch.linalg.vector_norm(flat, norm_type))


def grads_of(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, INF, 1.0, 3.0])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, INF])
def test_norm_and_gradients_against_float64(path: str, norm_type: float, max_norm: float) -> None:
    params = random_params()
    expected_norm = norm64(params, norm_type)
    factor = min(1.0, max_norm / (expected_norm + 1e-6))
    expected = [(g.double() * factor).to(g.dtype) for g in grads_of(params)]
    norm = fused.clip_grad_norm_(params, max_norm, norm_type)
    assert norm.shape == () and norm.dtype == torch.float64 and norm.device.type == "cpu"
    assert float(norm) == pytest.approx(expected_norm, rel=1e-9)
    assert_close(grads_of(params), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_agrees_with_torch(path: str, dtype: torch.dtype, norm_type: float) -> None:
    ours, theirs = random_params(1, [dtype]), random_params(1, [dtype])
    for params in (ours, theirs):
        params[:] = [p for p in params if p.numel() != 0]  # of which torch has no largest element
    norm = fused.clip_grad_norm_(ours, 0.3, norm_type)
    torch.testing.assert_close(norm, torch_clip_grad_norm_(theirs, 0.3, norm_type))
    assert norm.dtype == dtype
    assert_close(grads_of(ours), grads_of(theirs))


def test_two_calls_are_one(path: str) -> None:
    once, twice = random_params(2), random_params(2)
    expected = fused.clip_grad_norm_(once, 0.7)
    norm = fused.get_total_norm([p.grad for p in twice if p.grad is not None])
    fused.clip_grads_with_norm_(twice, 0.7, norm)
    assert torch.equal(norm, expected)
    assert_close(grads_of(once), grads_of(twice))


@pytest.mark.parametrize("dtype", norms.DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_norm_of_hard_gradients(backend: Backend, dtype: torch.dtype, norm_type: float) -> None:
    norms.check(dtype, norm_type, backend.device, backend=backend.name)


def test_float16_squares_do_not_overflow(path: str) -> None:
    grad = torch.full((1000,), 60000.0, dtype=torch.float16)
    param = parameter(grad)
    norm = fused.clip_grad_norm_([param], 1.0)
    assert float(norm) == pytest.approx(60000.0 * math.sqrt(1000), rel=1e-3)
    assert float(param.grad.double().norm()) == pytest.approx(1.0, rel=1e-2)


def test_bfloat16_sum_is_exact_to_float32(path: str) -> None:
    grad = torch.full((1 << 16,), 0.01).bfloat16()
    norm = fused.get_total_norm([grad])
    assert float(norm) == pytest.approx(float(grad.double().norm()), rel=1e-6)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_torchs_functions_are_called_as_often_for_many_gradients(
    norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a launch or more on a GPU."""
    monkeypatch.setattr(clip, "extension", None)

    class Calls(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
            self.count += getattr(func, "__name__", "") not in READS
            return func(*args, **(kwargs or {}))  # type: ignore[operator,misc]

    counts = []
    for number in (2, 200):
        params = [parameter(torch.ones(3)) for _ in range(number)]
        monkeypatch.setattr(clip, "_sum", clip._sum_in_torch)
        with Calls() as calls:
            norm = fused.clip_grad_norm_(params, 1.0, norm_type)
        assert float(norm) == pytest.approx(1.0 if norm_type == INF else math.sqrt(3.0 * number))
        counts.append(calls.count)
    assert counts[0] == counts[1] < 30


def test_many_tiny_gradients(path: str) -> None:
    params = [parameter(torch.full((1,), 1e-3)) for _ in range(100_000 if path == "extension" else 3000)]
    norm = fused.clip_grad_norm_(params, 1e-3)
    assert float(norm) == pytest.approx(1e-3 * math.sqrt(len(params)), rel=1e-6)
    assert float(params[-1].grad) == pytest.approx(1e-3 / math.sqrt(len(params)), rel=1e-2)


def layouts() -> Iterator[tuple[str, Tensor]]:
    base = torch.arange(1.0, 481.0).reshape(2, 4, 6, 10) / 100
    yield "transposed", base.transpose(1, 3)
    yield "channels last", base.contiguous(memory_format=torch.channels_last)
    yield "strided", base[..., ::2]
    yield "expanded", base[:1, :1].expand(3, 2, 6, 10)
    yield "unaligned", base.reshape(-1)[1:]
    yield "one element of many", base[1:, 1:2, 2:3, 3:4]


@pytest.mark.parametrize("name, grad", list(layouts()), ids=[name for name, _ in layouts()])
def test_layouts(path: str, name: str, grad: Tensor) -> None:
    surrounding = grad._base.clone() if grad._base is not None else grad.clone()
    place = (grad.size(), grad.stride(), grad.storage_offset())
    param = parameter(grad if name == "expanded" else surrounding.as_strided(*place))
    untouched = torch.ones_like(surrounding, dtype=torch.bool)
    untouched.as_strided(*place).fill_(False)
    expected = norm64([param])
    if name == "expanded":  # no operation may write through overlapping elements
        assert float(fused.get_total_norm([param.grad])) == pytest.approx(expected, rel=1e-6)
        return
    before = param.grad.clone()
    assert float(fused.clip_grad_norm_([param], 0.5)) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(param.grad, before * (0.5 / (expected + 1e-6)))
    if name != "channels last":
        assert torch.equal(surrounding[untouched], (grad._base if grad._base is not None else grad)[untouched])


class Named(torch.Tensor):
    """A tensor of a class of its own, over memory of its own."""


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_gradients_of_other_classes_count(path: str, norm_type: float) -> None:
    def params() -> list[torch.nn.Parameter]:
        return [parameter(torch.full((4,), 3.0).as_subclass(Named)), parameter(torch.full((2,), -5.0))]

    for number in (1, 2):  # alone, and beside an ordinary one
        ours, theirs = params()[:number], params()[:number]
        norm = fused.clip_grad_norm_(ours, 1.0, norm_type)
        expected = torch_clip_grad_norm_(theirs, 1.0, norm_type)
        assert float(norm) == pytest.approx(float(expected))
        assert_close(grads_of(ours), grads_of(theirs))


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """New tensors are made on another device than the parameters unless a device is named."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("norm_type", [2.0, INF, 3.0])
def test_default_device_does_not_matter(path: str, norm_type: float) -> None:
    param = parameter(torch.full((6,), 2.0, device="cpu"))
    sliced = parameter(torch.full((12,), 2.0, device="cpu")[::2])
    for params in ([param], [param, sliced], []):
        norm = fused.clip_grad_norm_(params, 1.0, norm_type)
        assert norm.device.type == "cpu" and float(norm) >= 0.0
    assert fused.get_total_norm([], norm_type).device.type == "cpu"
    assert float(param.grad.abs().max()) < 1.0  # type: ignore[union-attr]


@pytest.mark.usefixtures("elsewhere")
def test_a_step_does_not_ask_for_the_default_device(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("the default device is another one for the CPU's tensors only")
    p = parameter(torch.ones(5, device="cpu"), torch.ones(5, device="cpu"))
    optimizer = fused.AdamW([p], max_grad_norm=1.0, skip_nonfinite=True, backend=backend.name)
    scaler = fused.GradScaler("cpu", init_scale=4.0)
    for unscale in (False, True):
        scaler.scale(p.sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[p]["step"] == 2
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 7  # as older versions of torch kept it
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[p]["step"] == 8 and optimizer.grad_norm is not None


def test_a_gradient_that_stands_twice_is_scaled_twice(path: str) -> None:
    def params() -> list[torch.nn.Parameter]:
        p, q = parameter(torch.full((1 << 18,), 2.0)), parameter(torch.ones(3))
        return [p, q, p, p]

    ours, theirs = params(), params()
    torch.testing.assert_close(fused.clip_grad_norm_(ours, 1.0), torch_clip_grad_norm_(theirs, 1.0))
    assert_close(grads_of(ours), grads_of(theirs))
    seen = clip.Gradients(ours, of_params=True)
    assert len({grad.data_ptr() for grad in seen.taken}) == len(seen.taken)  # kernels write to all of these at once
    assert len(seen.taken) + len(seen.rest) == 4


def test_complex_gradients(path: str) -> None:
    grads = [torch.randn(33, dtype=torch.complex64), torch.randn(5, dtype=torch.complex128)]
    for norm_type in (2.0, INF):
        params = [parameter(g.clone()) for g in grads]
        expected = torch.linalg.vector_norm(torch.cat([g.to(torch.complex128) for g in grads]), norm_type)
        assert float(fused.clip_grad_norm_(params, 0.1, norm_type)) == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(params[0].grad, (grads[0] * (0.1 / (expected + 1e-6))).to(torch.complex64))
    with pytest.raises(RuntimeError, match="complex"):
        fused.clip_grad_value_(params, 0.1)


def test_conjugated_and_negated_gradients(path: str) -> None:
    def make() -> list[torch.nn.Parameter]:
        z = torch.tensor([3.0 + 4.0j, 1.0 - 2.0j, 0.5j])
        return [parameter(z.clone().conj()), parameter(z.clone().conj().imag), parameter(z[1].clone().conj().imag)]

    expected = math.sqrt(30.25 + 20.25 + 4.0)
    for norm_type in (2.0, 3.0):
        params = make()
        before = [grad.resolve_conj().resolve_neg() for grad in grads_of(params)]
        assert params[0].grad.is_conj() and params[1].grad.is_neg() and params[2].grad.is_neg()
        norm = fused.clip_grad_norm_(params, 0.5, norm_type)
        if norm_type == 2.0:
            assert float(norm) == pytest.approx(expected, rel=1e-6)
        for grad, old in zip(grads_of(params), before, strict=True):
            torch.testing.assert_close(grad.resolve_conj().resolve_neg(), old * (0.5 / (float(norm) + 1e-6)))
    params = make()
    assert clip.Gradients(params, of_params=True).unscale(torch.tensor(0.25))[torch.device("cpu")] == 0.0
    for grad, old in zip(grads_of(params), before, strict=True):
        torch.testing.assert_close(grad.resolve_conj().resolve_neg(), old * 0.25)
    real = make()[1:]
    fused.clip_grad_value_(real, 0.75)
    assert real[0].grad.tolist() == [-0.75, 0.75, -0.5] and float(real[1].grad) == 0.75


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
@pytest.mark.parametrize("dtype", norms.DTYPES)
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_nonfinite_as_torch(path: str, bad: float, dtype: torch.dtype, norm_type: float) -> None:
    def make() -> list[torch.nn.Parameter]:
        params = random_params(3, [dtype])
        params[5].grad.view(-1)[400] = bad
        return [p for p in params if p.numel() != 0]

    ours, theirs = make(), make()
    before = grads_of(ours)
    with pytest.raises(RuntimeError, match="non-finite"):
        fused.clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True)
    assert_close(grads_of(ours), before)
    norm = fused.clip_grad_norm_(ours, 1.0, norm_type)
    expected = torch_clip_grad_norm_(theirs, 1.0, norm_type)
    assert torch.equal(norm.isnan(), expected.isnan()) and not norm.isfinite()
    assert_close(grads_of(ours), grads_of(theirs))
    fused.clip_grad_norm_(ours, INF, norm_type)  # measures only


def test_clip_value(path: str) -> None:
    for dtype in norms.DTYPES:
        ours, theirs = random_params(4, [dtype]), random_params(4, [dtype])
        for params in (ours, theirs):
            params[0].grad = None
            params[6].grad.view(-1)[:4] = torch.tensor([math.nan, INF, -INF, -0.0])
        fused.clip_grad_value_(ours, 0.3)
        torch_clip_grad_value_([p for p in theirs if p.grad is not None], 0.3)
        for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_arguments_as_torch() -> None:
    param = parameter(torch.tensor([3.0, 4.0]))
    assert float(fused.clip_grad_norm_(param, max_norm=2.5, norm_type=2, error_if_nonfinite=False, foreach=True)) == 5.0
    torch.testing.assert_close(param.grad, torch.tensor([1.5, 2.0]))
    assert fused.clip_grad_norm_([], 1.0) == 0.0
    assert fused.clip_grad_norm_([parameter(None, torch.ones(2))], 1.0) == 0.0
    assert fused.get_total_norm([], 3.0) == 0.0
    with pytest.warns(UserWarning, match="empty generator"):
        fused.clip_grad_norm_((p for p in []), 1.0)
    assert float(fused.clip_grad_norm_((p for p in [param]), "inf", "inf")) == pytest.approx(2.0, rel=1e-6)
    sparse = parameter(None, torch.ones(4))
    sparse.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,))
    with pytest.raises(RuntimeError, match="sparse"):
        fused.clip_grad_norm_([sparse], 1.0)


def test_arguments_that_are_no_numbers_are_named() -> None:
    param = parameter(torch.tensor([3.0, 4.0]))
    for call, kind, message in (
        (lambda: fused.clip_grad_norm_(param, None), TypeError, "max_norm must be a number, got None"),
        (lambda: fused.clip_grad_norm_(param, "one"), ValueError, "max_norm must be a number, got 'one'"),
        (lambda: fused.get_total_norm([param], "max"), ValueError, "norm_type must be a number, got 'max'"),
        (lambda: fused.clip_grad_value_(param, None), TypeError, "clip_value must be a number, got None"),
        (lambda: fused.clip_grad_value_(param, math.nan), ValueError, "clip_value must be a number, got nan"),
        (lambda: fused.clip_grads_with_norm_(param, [], torch.ones(())), TypeError, "max_norm must be a number"),
        (lambda: fused.clip_grads_with_norm_(param, 1.0, torch.ones(2)), ValueError, r"total_norm .* shape \(2,\)"),
    ):
        with pytest.raises(kind, match=message):
            call()
        assert param.grad.tolist() == [3.0, 4.0]


def test_version_counter_tells_autograd(path: str) -> None:
    param = parameter(torch.full((4,), 2.0))
    version = param.grad._version
    fused.clip_grad_norm_([param], 1.0)
    assert param.grad._version > version


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not there")
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_same_bits_for_threads_and_instruction_sets(threads: None, norm_type: float) -> None:
    extension = backends.extension

    def run() -> list[Tensor]:
        params = random_params(5)
        norm = fused.clip_grad_norm_(params, 0.1, norm_type)
        return [norm, *grads_of(params)]

    try:
        results = []
        for isa in extension.built_isas():
            try:
                extension.select_isa(isa)
            except ValueError:
                continue
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run())
    finally:
        extension.select_isa("")
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---- the options of an optimizer ----


def optimizers() -> list[str]:
    return ["reference", *(["cpu"] if backends.extension is not None else [])]


@pytest.fixture(params=optimizers())
def make_adamw(request: pytest.FixtureRequest) -> Callable[..., fused.AdamW]:
    def make(params: object, **options: object) -> fused.AdamW:
        return fused.AdamW(params, lr=0.1, backend=request.param, **options)

    return make


def test_max_grad_norm_is_clip_then_step(make_adamw: Callable[..., fused.AdamW]) -> None:
    generator = torch.Generator().manual_seed(6)
    shapes = [(5,), (0,), (64, 3), (70000,)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:]}]
    optimizer = make_adamw(groups, max_grad_norm=0.5)
    twin = torch.optim.AdamW([{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:]}], lr=0.1)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10.0 ** (step - 3)
            b.grad = a.grad.clone()
        before = grads_of(ours)
        optimizer.step()
        expected = torch_clip_grad_norm_(theirs, 0.5)
        twin.step()
        torch.testing.assert_close(optimizer.grad_norm, expected)
        for a, b in zip(before, grads_of(ours), strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(
            list(optimizer.grad_norms().values()), [g.norm() for g in before], rtol=1e-6, atol=0.0
        )
        by_group = [torch.cat([g.flatten() for g in part]).norm() for part in (before[:2], before[2:])]
        torch.testing.assert_close(optimizer.group_norms(), by_group)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_infinite_limit_measures_only(make_adamw: Callable[..., fused.AdamW]) -> None:
    param = parameter(torch.tensor([3.0, -4.0]))
    plain = parameter(torch.tensor([3.0, -4.0]))
    optimizer, other = make_adamw([param], max_grad_norm=INF, norm_type=INF), make_adamw([plain])
    optimizer.step()
    other.step()
    assert float(optimizer.grad_norm) == 4.0 and float(optimizer.found_inf) == 0.0
    assert torch.equal(param, plain)
    assert other.grad_norm is None and other.found_inf is None
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        other.grad_norms()


def test_results_are_copies(make_adamw: Callable[..., fused.AdamW]) -> None:
    param = parameter(torch.tensor([3.0, 4.0]))
    optimizer = make_adamw([param], max_grad_norm=INF)
    optimizer.step()
    kept = optimizer.grad_norm
    param.grad.mul_(2)
    optimizer.step()
    assert float(kept) == 5.0 and float(optimizer.grad_norm) == 10.0


def snapshot(optimizer: fused.FusedOptimizer) -> list[Tensor]:
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for p in tensors for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "int8"}, {"master_weights": "split"}, {"master_weights": "fp32", "stochastic_rounding": True}],
    ids=str,
)
@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_a_skipped_step_changes_no_bit(
    make_adamw: Callable[..., fused.AdamW], options: dict[str, object], bad: float
) -> None:
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    named = [("weight", parameter(torch.randn(50, 3).to(dtype))), ("bias", parameter(torch.randn(3).to(dtype)))]
    optimizer = make_adamw(named, skip_nonfinite=True, max_grad_norm=1.0, **options)
    with torch.no_grad():
        named[0][1].grad[3, 1] = bad
    optimizer.step()  # the first step of all
    assert float(optimizer.state[named[0][1]]["step"]) == 0.0
    for good in range(3):
        named[0][1].grad = torch.randn(50, 3).to(dtype)
        optimizer.step()
        assert float(optimizer.found_inf) == 0.0 and optimizer.find_nonfinite() == []
        assert float(optimizer.state[named[0][1]]["step"]) == good + 1
        before = snapshot(optimizer)
        with torch.no_grad():
            named[0][1].grad[49, 2] = bad
        optimizer.step()
        assert float(optimizer.found_inf) == 1.0 and optimizer.find_nonfinite() == ["weight"]
        for a, b in zip(before, snapshot(optimizer), strict=True):
            assert torch.equal(a, b)


def test_names_without_names(make_adamw: Callable[..., fused.AdamW]) -> None:
    params = [parameter(torch.ones(2)) for _ in range(3)]
    optimizer = make_adamw([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=INF)
    params[2].grad = None
    optimizer.step()
    norms = {name: float(value) for name, value in optimizer.grad_norms().items()}
    assert norms == {"0.0": pytest.approx(2**0.5), "1.0": pytest.approx(2**0.5), "1.1": 0.0}


def test_closure(make_adamw: Callable[..., fused.AdamW]) -> None:
    param = parameter(None, torch.ones(2))
    optimizer = make_adamw([param], max_grad_norm=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((param - 3) ** 2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 18.0
    assert float(optimizer.grad_norm) == pytest.approx(6 * 2**0.5)


def test_results_do_not_outlive_a_copy(make_adamw: Callable[..., fused.AdamW]) -> None:
    import copy

    param = parameter(torch.ones(2))
    optimizer = make_adamw([param], max_grad_norm=1.0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.grad_norm is None
    twin.param_groups[0]["params"][0].grad = torch.ones(2)
    twin.step()
    assert twin.grad_norm is not None
