"""torch.optim's contract: what programs that use torch.optim's classes rely on holds for ours."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, COUNTERPART_IDS, WITH_COUNTERPART, Case, Variant
from conftest import Backend
from oracle import Oracle, make_params, set_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer, lr_scheduler
from torch.testing._internal.two_tensor import TwoTensor

import fused
from fused.backends.turns import span_of, turns_of
from fused.optimizer import OPTIMIZER_OPTIONS
from fused.precision import GROUP_OPTIONS
from fused.rules import RULES

CPU = torch.device("cpu")
ENGINE_OPTIONS = {*GROUP_OPTIONS, *OPTIMIZER_OPTIONS}
COUNTERPARTS = [case for case in CASES if case.counterpart is not None]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_counterpart = pytest.mark.parametrize("case", COUNTERPARTS, ids=lambda case: case.name)


def twins(shapes: tuple[tuple[int, ...], ...] = ((5,), (3, 4), ())) -> tuple[list[Any], list[Any]]:
    """Equal parameters for two optimizers, small enough that torch's vectorized square root is exact."""
    ours = make_params(shapes, torch.float32, CPU)
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def same_gradients(ours: list[Any], theirs: list[Any]) -> None:
    set_gradients(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()


def assert_close(ours: list[Any], theirs: list[Any]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2))


def backward(net: torch.nn.Module) -> Tensor:
    loss: Tensor = net(torch.ones(3, 6)).square().sum()
    loss.backward()
    return loss


# ---- constructors ----


@each_counterpart
def test_constructor_is_torchs(case: Case) -> None:
    ours = inspect.signature(case.optimizer.__init__).parameters
    theirs = inspect.signature(case.counterpart.__init__).parameters
    for name, theirs_one in theirs.items():
        assert ours[name].default == theirs_one.default, name
        assert ours[name].kind == theirs_one.kind, name
    positional = [name for name, p in theirs.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional
    assert {name for name in ours if name not in theirs} == {"options"}


@each_counterpart
def test_defaults_are_torchs(case: Case) -> None:
    p = [torch.nn.Parameter(torch.ones(2))]
    ours, theirs = case.make(p), case.make_counterpart(p)
    assert {name: value for name, value in ours.defaults.items() if name not in ENGINE_OPTIONS} == theirs.defaults
    group = {name: value for name, value in ours.param_groups[0].items() if name not in GROUP_OPTIONS}
    assert group == theirs.param_groups[0]


def test_lion_has_the_papers_defaults() -> None:
    defaults = fused.Lion([torch.nn.Parameter(torch.ones(2))]).defaults
    assert (defaults["lr"], defaults["betas"], defaults["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)


@pytest.mark.parametrize("case, variant", WITH_COUNTERPART, ids=COUNTERPART_IDS)
def test_state_keys_are_torchs(case: Case, variant: Variant) -> None:
    ours, theirs = twins()
    optimizers = case.make(ours, variant), case.make_counterpart(theirs, variant)
    same_gradients(ours, theirs)
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        mine = optimizers[0].state[p]
        wanted = {name: value for name, value in optimizers[1].state[q].items() if value is not None}
        extra = {"step"} if variant.rule == "sgd_momentum" and variant.kwargs.get("dampening") else set()
        assert mine.keys() - extra == wanted.keys()
        for name, value in wanted.items():
            assert (mine[name].dtype, mine[name].shape, mine[name].device) == (value.dtype, value.shape, value.device)


@each_case
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"master_weights": "half"}, "master_weights.*'half'"),
        ({"state_dtype": torch.int32}, "state_dtype.*int32"),
        ({"backend": "tpu"}, "backend.*'tpu'"),
        ({"seed": -1}, "seed.*-1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm.*-1.0"),
        ({"norm_type": 1.0}, "norm_type.*1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(case: Case, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.make([torch.nn.Parameter(torch.ones(2))], **kwargs)


@each_case
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number, got '0.1'"),
        ({"max_grad_norm": "1.0"}, "max_grad_norm must be a number, got '1.0'"),
        ({"norm_type": "inf"}, "norm_type must be a number, got 'inf'"),
        ({"seed": None}, "seed must be a number, got None"),
        ({"stochastic_rounding": "no"}, "stochastic_rounding must be True or False, got 'no'"),
        ({"skip_nonfinite": "false"}, "skip_nonfinite must be True or False, got 'false'"),
        ({"amp_scaling": "off"}, "amp_scaling must be True or False, got 'off'"),
        ({"maximize": "no"}, "maximize must be True or False, got 'no'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_another_kind_are_named(case: Case, kwargs: dict[str, Any], message: str) -> None:
    """As a configuration file gives them: YAML reads ``1e-3`` as a string."""
    with pytest.raises(TypeError, match=message):
        case.make([torch.nn.Parameter(torch.ones(2))], **kwargs)


def test_options_of_some_are_named() -> None:
    p = [torch.nn.Parameter(torch.ones(2))]
    for cls, kwargs, kind, message in (
        (fused.AdamW, {"betas": 0.9}, TypeError, "betas must be a pair, got 0.9"),
        (fused.Lion, {"betas": (0.9,)}, ValueError, r"betas must be a pair, got \(0.9,\)"),
        (fused.Adam, {"betas": ("0.9", "0.99")}, TypeError, r"betas\[0\] must be a number, got '0.9'"),
        (fused.Adafactor, {"eps": 1e-3}, TypeError, "eps must be a pair, got 0.001"),
        (fused.SGD, {"momentum": 0.9, "dampening": "0.1"}, TypeError, "dampening must be a number, got '0.1'"),
        (fused.SGD, {"momentum": 0.9, "nesterov": "no"}, TypeError, "nesterov must be True or False, got 'no'"),
        (fused.AdamW, {"amsgrad": "no"}, TypeError, "amsgrad must be True or False, got 'no'"),
        (fused.Adafactor, {"beta1": "0.9"}, TypeError, "beta1 must be a number, got '0.9'"),
        (fused.AdamW, {"seed": 1.5}, ValueError, "Invalid seed value: 1.5"),
    ):
        with pytest.raises(kind, match=message):
            cls(p, **kwargs)  # type: ignore[arg-type]


def test_a_live_option_that_is_no_number_is_named(backend: Backend) -> None:
    p = torch.nn.Parameter(torch.ones(2, device=backend.device))
    p.grad = torch.ones_like(p)
    optimizer = fused.AdamW([p], backend=backend.name)
    optimizer.step()
    before = p.detach().clone()
    pair = torch.tensor([0.1, 0.2])
    for change, kind, message in (
        ({"lr": "1e-3"}, TypeError, "option 'lr' of parameter group 0 must be a number, got '1e-3'"),
        ({"betas": None}, TypeError, "option 'betas' of parameter group 0 must be a pair, got None"),
        ({"betas": (0.9,)}, ValueError, r"option 'betas' of parameter group 0 must be a pair, got \(0.9,\)"),
        ({"lr": None}, TypeError, "option 'lr' of parameter group 0 must be a number, got None"),
        ({"betas": (0.9, None)}, TypeError, "option 'betas' of parameter group 0 must be a number, got None"),
        ({"eps": pair}, ValueError, r"option 'eps' of parameter group 0 must be one number, got a tensor .*\(2,\)"),
    ):
        optimizer.param_groups[0].update(lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
        optimizer.param_groups[0].update(change)
        with pytest.raises(kind, match=message):
            optimizer.step()
        assert torch.equal(p, before) and optimizer.state[p]["step"] == 1
    optimizer.param_groups[0].pop("eps")
    with pytest.raises(KeyError, match="parameter group 0 has no option 'eps'"):
        optimizer.step()


@each_case
def test_parameters_in_each_others_memory_take_turns(case: Case, threads: None) -> None:
    torch.set_num_threads(2)
    size, step = 1 << 17, 1 << 15
    apart, tied = [(0, size), (size, 2 * size)], [(0, size), (step, size + step)]
    memory = torch.randn(1, 2 * size).repeat(2, 1)
    params = [[torch.nn.Parameter(row[start:end]) for start, end in tied] for row in memory]
    optimizers = [case.make(each, backend=backend) for each, backend in zip(params, (None, "reference"), strict=True)]
    for places in (tied, apart, [apart[0]] * 2):  # moved between steps, as tied weights are, through .data
        for row, each in zip(memory, params, strict=True):
            for p, (start, end) in zip(each, places, strict=True):
                p.data = row[start:end]
        for _ in range(4):
            for p, q in zip(*params, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(memory[0], memory[1], rtol=1e-5, atol=1e-6)


def test_views_between_each_other_are_stepped_at_once() -> None:
    matrix = torch.zeros(5, 12)
    apart: list[list[Tensor]] = [
        [matrix[:, i] for i in range(12)],
        [matrix[:, :4], matrix[:, 4:8], matrix[:, 8:]],
        [matrix[::2], matrix[1::2]],
        [matrix.view(-1)[::2], matrix.view(-1)[1::2]],
        [matrix[:2], matrix[2], matrix[3:].t(), matrix[:0]],
    ]
    for views in apart:
        assert turns_of([span_of(view) for view in views]) == [0] * len(views)
    crossing: list[list[Tensor]] = [
        [matrix[:, 3], matrix[1]],
        [matrix[:, :5], matrix[:, 4:]],
        [matrix, matrix.t()],
        [matrix.view(-1)[::2], matrix.view(-1)[::3]],
        [matrix[0, 0], matrix[:, 0]],
        [matrix[0].expand(3, 12), matrix[0, 5:]],
    ]
    for views in crossing:
        assert turns_of([span_of(view) for view in views]) == [0, 1]
    assert turns_of([span_of(view) for view in (matrix[1], matrix[:, 3], matrix[2], matrix)]) == [0, 1, 2, 3]


@each_counterpart
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_stands_twice_is_stepped_twice_wherever_it_moves(case: Case, backend: Backend) -> None:
    ours, theirs = twins(((3, 4),))
    optimizer, reference = case.make(ours * 2, backend=backend.name), case.make_counterpart(theirs * 2, foreach=False)
    for _ in range(3):
        same_gradients(ours, theirs)
        optimizer.step()
        reference.step()
        for p in (*ours, *theirs):
            p.data = p.data.clone()
    assert_close(ours, theirs)


@pytest.mark.parametrize("freed", ["parameter", "gradient", "exp_avg_sq"])
def test_freed_memory_is_refused(freed: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = fused.AdamW([p, q])
    for each in (p, q):
        each.grad = torch.ones(4)
    if freed != "gradient":
        optimizer.step()
    before = p.detach().clone()
    tensor = {"parameter": q.data, "gradient": q.grad, **optimizer.state[q]}[freed]
    tensor.untyped_storage().resize_(0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=rf"memory of '{freed}' of parameter 1 of its group .* is freed"):
        optimizer.step()
    assert torch.equal(p, before)


def test_adafactors_options_that_are_off(backend: Backend) -> None:
    p = torch.nn.Parameter(torch.ones(2, 3, device=backend.device))
    p.grad = torch.ones_like(p)
    optimizer = fused.Adafactor([p], eps=(None, 1e-3), d=None, beta1=None, backend=backend.name)
    optimizer.step()
    assert p.isfinite().all()
    optimizer.param_groups[0]["weight_decay"] = None
    with pytest.raises(TypeError, match="option 'weight_decay' of parameter group 0 must be a number, got None"):
        optimizer.step()


@each_case
def test_tensors_without_memory_are_stepped_in_torch_operations(case: Case) -> None:
    with FakeTensorMode():
        net = torch.nn.Linear(3, 2)
        optimizer = case.make(net.parameters(), max_grad_norm=1.0, skip_nonfinite=True)
        for _ in range(2):
            net(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        assert fused.clip_grad_norm_(net.parameters(), 1.0).shape == ()
        assert optimizer.memory().elements == 8
    halves = torch.randn(2, 3, 4)
    pair = torch.nn.Parameter(TwoTensor(halves[0].clone(), halves[0].clone()))
    plain = torch.nn.Parameter(halves[0].clone())
    optimizers = [case.make([p], max_grad_norm=1.0, backend="reference") for p in (pair, plain)]
    for _ in range(2):
        pair.grad, plain.grad = TwoTensor(halves[1], halves[1]), halves[1].clone()
        for each in optimizers:
            each.step()
    assert torch.equal(pair.a, plain)  # type: ignore[attr-defined]
    chosen = case.make([pair], max_grad_norm=1.0)
    chosen.step()
    assert pair.a.isfinite().all()  # type: ignore[attr-defined]


@each_case
def test_options_in_tensors_keep_the_dtype_of_numbers(case: Case, backend: Backend) -> None:
    ours, theirs = twins(((), (1,), (3,)))
    optimizer, reference = case.make(ours, backend=backend.name), case.make(theirs, backend="reference")
    for group in optimizer.param_groups:
        for name in ("lr", "weight_decay", "betas", "momentum", "rho", "alpha"):
            value = group.get(name)
            if isinstance(value, tuple):
                group[name] = tuple(torch.tensor(item, dtype=torch.float64) for item in value)
            elif value is not None:
                group[name] = torch.tensor(0.1 if name == "weight_decay" else value, dtype=torch.float64)
    for group in reference.param_groups:
        group["weight_decay"] = 0.1
    for _ in range(2):
        same_gradients(ours, theirs)
        optimizer.step()
        reference.step()
    assert_close(ours, theirs)


@each_case
def test_lazy_parameters_are_stepped_once_they_are_there(case: Case, backend: Backend) -> None:
    if case.optimizer is fused.Adagrad:
        pytest.skip("it makes its state in the constructor, as torch.optim's")
    net = torch.nn.LazyLinear(3, device=backend.device)
    optimizer = case.make(net.parameters(), backend=backend.name)
    optimizer.step()  # nothing to do, as torch.optim
    assert optimizer.memory().total == 0
    net(torch.ones(2, 4, device=backend.device)).sum().backward()
    before = net.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net.weight, before)


@each_case
def test_parameters_are_checked(case: Case) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        case.make([])
    with pytest.raises(TypeError):
        case.make(p)
    with pytest.raises(ValueError, match="non-leaf"):
        case.make([p * 2])
    with pytest.raises(TypeError):
        case.make([1.0])


@each_case
def test_constructed_from_its_defaults(case: Case) -> None:
    """As ZeroRedundancyOptimizer does: ``cls(params, **defaults)``."""
    p = [torch.nn.Parameter(torch.ones(2))]
    first = case.make(p, lr=0.25, max_grad_norm=2.0, seed=3, skip_nonfinite=True)
    defaults = {k: v for k, v in first.defaults.items() if k not in inspect.signature(Optimizer.__init__).parameters}
    if case.name == "AdamW":
        defaults.pop(
            "decoupled_weight_decay"
        )  # torch.optim.AdamW's defaults carry it too, and its constructor does not
    second = case.optimizer(p, **defaults)
    assert second.defaults == first.defaults
    assert second._options == first._options


# ---- groups, hooks, closures ----


@each_counterpart
def test_groups_with_their_own_options(case: Case) -> None:
    ours, theirs = twins(((4,), (5,), (6,)))
    made = []
    for params, make in ((ours, case.make), (theirs, case.make_counterpart)):
        groups = [{"params": params[:1], "lr": 0.5, "weight_decay": 0.1}, {"params": params[1:], "maximize": True}]
        made.append(make(groups, lr=0.125))
    for _ in range(3):
        same_gradients(ours, theirs)
        for optimizer in made:
            optimizer.step()
    assert_close(ours, theirs)


@each_case
def test_options_changed_between_steps(case: Case, backend: Backend) -> None:
    """Options are read at every step, those that lead to another rule or another state included."""
    params = make_params([(7,)], torch.float32, backend.device)
    optimizer = case.make(params, backend=backend.name)
    oracle = Oracle(case, case.variants[0], optimizer, params)
    for changes in ({"lr": 0.3}, {"weight_decay": 0.2}, {"maximize": True}, {"lr": 0.0}, {"maximize": False}):
        optimizer.param_groups[0].update(changes)
        set_gradients(params)
        oracle.step()


def test_a_changed_rule_makes_the_state_it_lacks(backend: Backend) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    p.grad = torch.ones_like(p)
    optimizer: Optimizer = fused.SGD([p], lr=0.5, backend=backend.name)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    for _ in range(2):
        optimizer.step()
    assert torch.equal(p, torch.full_like(p, 1 - 0.5 - 0.5 - 0.75))


@each_case
def test_groups_added_later_are_stepped(case: Case, backend: Backend) -> None:
    params = make_params([(3,), (4,), (5,)], torch.float32, backend.device)
    optimizer = case.make(params[:1], backend=backend.name)
    oracle = Oracle(case, case.variants[0], optimizer, params[:1])
    for count in (1, 2, 3):
        if count > 1:
            optimizer.add_param_group({"params": [params[count - 1]], "lr": 0.2 * count})
            grown = Oracle(case, case.variants[0], optimizer, params[:count])
            grown.steps.update(oracle.steps)
            oracle = grown
        set_gradients(params[:count])
        oracle.step()


@each_case
def test_add_param_group_rejects_what_does_not_fit(case: Case) -> None:
    optimizer = case.make([torch.nn.Parameter(torch.ones(2))])
    for group, message in (
        ({"params": [torch.nn.Parameter(torch.ones(3))], "seed": 1}, "seed=1"),
        ({"params": [torch.nn.Parameter(torch.ones(3))], "master_weights": "fp32"}, "master_weights='fp32'.*float32"),
        ({"params": optimizer.param_groups[0]["params"]}, "more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@each_case
def test_named_parameters_are_named_in_messages(case: Case, backend: Backend) -> None:
    net = torch.nn.Embedding(5, 3, sparse=True).to(backend.device)
    net(torch.tensor([1, 2], device=backend.device)).sum().backward()
    before = net.weight.detach().clone()
    for params, name in ((net.named_parameters(), "'weight'"), (net.parameters(), r"\(5, 3\)")):
        with pytest.raises(RuntimeError, match=f"sparse gradients.*{name}"):
            case.make(params, backend=backend.name).step()
        assert torch.equal(net.weight, before)


@each_case
def test_a_bad_gradient_stops_the_step_before_anything_changes(case: Case, backend: Backend) -> None:
    params = make_params([(4,), (5, 3)], torch.float32, backend.device)
    set_gradients(params)
    params[1].grad = params[1].grad.to_sparse()
    optimizer = case.make(params, backend=backend.name)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert all(int(state.get("step", 0)) == 0 for state in optimizer.state.values())


@each_case
def test_closure(case: Case, backend: Backend) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    optimizer, calls = case.make([p], lr=0.1, backend=backend.name), []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss) == 3.0 and len(calls) == 1
    with torch.no_grad():
        assert float(optimizer.step(closure)) < 3.0
    assert optimizer.step() is None


@each_case
def test_hooks(case: Case) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer, seen = case.make([p]), []
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", p.detach().clone()))),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", p.detach().clone()))),
        optimizer.register_state_dict_pre_hook(lambda opt: seen.append(("save", None))),
        optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "note": 1}),
        optimizer.register_load_state_dict_pre_hook(lambda opt, d: seen.append(("load", d.pop("note"))) or d),
        optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(("loaded", None))),
    ]
    optimizer.step()
    assert torch.equal(seen[0][1], torch.ones(3)) and torch.equal(seen[1][1], p)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [what for what, _ in seen] == ["pre", "post", "save", "load", "loaded"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 5


@each_case
def test_zero_grad(case: Case, backend: Backend) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    optimizer = case.make([p], backend=backend.name)
    p.sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is not None and not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None


@each_case
def test_repr_names_the_options(case: Case) -> None:
    text = repr(case.make([torch.nn.Parameter(torch.ones(2))]))
    assert text.startswith(f"{case.name} (") and "lr:" in text and "master_weights:" in text


# ---- learning rates ----

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2, cycle_momentum=_has_momentum(opt)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, 6, cycle_momentum=_has_momentum(opt)),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.02, 2),
}


def _has_momentum(optimizer: Optimizer) -> bool:
    return bool(optimizer.defaults.get("momentum")) or "betas" in optimizer.defaults


def test_every_scheduler_is_here() -> None:
    abstract = {"LRScheduler", "_LRScheduler"}
    assert set(lr_scheduler.__all__) - abstract <= set(SCHEDULERS)


@each_counterpart
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler: str, case: Case) -> None:
    ours, theirs = twins()
    variant = next((v for v in case.variants if v.name == "momentum"), case.variants[0])
    optimizers = case.make(ours, variant), case.make_counterpart(theirs, variant)
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in optimizers]
    for _ in range(5):
        same_gradients(ours, theirs)
        for optimizer, schedule in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        mine, wanted = ({k: v for k, v in o.param_groups[0].items() if k != "params"} for o in optimizers)
        assert {k: v for k, v in mine.items() if k not in GROUP_OPTIONS} == wanted
    assert_close(ours, theirs)


@each_case
def test_tensor_lr_changed_in_place(case: Case, backend: Backend) -> None:
    params = make_params([(9,)], torch.float32, backend.device)
    lr = torch.tensor(0.1, device=backend.device)
    optimizer = case.make(params, lr=lr, backend=backend.name)
    oracle = Oracle(case, case.variants[0], optimizer, params)
    for value in (0.1, 0.5, 0.0, 0.25):
        lr.fill_(value)
        set_gradients(params)
        oracle.step()
    assert optimizer.param_groups[0]["lr"] is lr


def test_swa_and_ema() -> None:
    net = model()
    optimizer = fused.AdamW(net.parameters(), lr=0.1)
    swa = torch.optim.swa_utils.AveragedModel(net)
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        swa.update_parameters(net)
        ema.update_parameters(net)
        history.append([p.detach().clone() for p in net.parameters()])
    for index, (average, exponential) in enumerate(zip(swa.parameters(), ema.parameters(), strict=True)):
        a, b, c = (step[index] for step in history)
        torch.testing.assert_close(average.detach(), (a + b + c) / 3)
        torch.testing.assert_close(exponential.detach(), ((a + b) / 2 + c) / 2)


# ---- saving and loading ----


@pytest.mark.parametrize("case, variant", WITH_COUNTERPART, ids=COUNTERPART_IDS)
@pytest.mark.parametrize("direction", ["from_torch", "to_torch"])
def test_a_run_moves_between_torch_and_here(direction: str, case: Case, variant: Variant) -> None:
    ours, theirs = twins()
    mine, other = case.make(ours, variant), case.make_counterpart(theirs, variant)
    if direction == "from_torch":
        source, target, stepped, waiting = other, mine, theirs, ours
    else:
        source, target, stepped, waiting = mine, other, ours, theirs
    for _ in range(3):
        set_gradients(stepped)
        source.step()
    for p, q in zip(stepped, waiting, strict=True):
        q.data.copy_(p.data)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for p, q in zip(stepped, waiting, strict=True):
        for name, value in source.state[p].items():
            if value is not None and name in target.state[q]:
                assert torch.equal(value, target.state[q][name]), name
    for _ in range(3):
        same_gradients(ours, theirs)
        mine.step()
        other.step()
        assert_close(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        if "step" in other.state[q] and case.name != "SGD":  # torch's SGD keeps one that was loaded, and leaves it
            assert mine.state[p]["step"] == other.state[q]["step"] == 6


@each_case
@pytest.mark.parametrize("how", ["state_dict", "save", "pickle", "deepcopy"])
def test_a_copy_continues_bit_for_bit(how: str, case: Case, backend: Backend) -> None:
    for variant in case.variants:
        params = make_params([(5,), (33,), ()], torch.bfloat16, backend.device)
        optimizer = case.make(params, variant, backend=backend.name)
        set_gradients(params)
        optimizer.step()
        other: Any
        if how == "state_dict":
            copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
            other = case.make(copies, variant, backend=backend.name)
            other.load_state_dict(optimizer.state_dict())
        elif how == "save":
            copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
            other = case.make(copies, variant, backend=backend.name)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
        else:
            other = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
            copies = other.param_groups[0]["params"]
        for _ in range(2):
            same_gradients(params, copies)
            optimizer.step()
            other.step()
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p, q)
            mine, theirs = optimizer.state[p], other.state[q]
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype
                assert mine[name].data_ptr() != theirs[name].data_ptr() or mine[name].numel() == 0


@each_case
def test_loaded_state_is_not_shared_with_the_dictionary(case: Case) -> None:
    params = make_params([(5,)], torch.float32, CPU)
    optimizer = case.make(params)
    set_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()
    other = case.make([torch.nn.Parameter(params[0].detach().clone())])
    other.load_state_dict(saved)
    frozen = copy.deepcopy(saved)
    set_gradients(other.param_groups[0]["params"])
    other.step()
    for name, value in saved["state"].get(0, {}).items():
        assert torch.equal(value, frozen["state"][0][name])


@each_case
def test_state_dict_is_plain(case: Case) -> None:
    params = make_params([(5,)], torch.bfloat16, CPU)
    optimizer = case.make(params, master_weights="split", state_dtype="int8")
    set_gradients(params)
    optimizer.step()

    def check(value: Any) -> None:
        if isinstance(value, dict | list | tuple):
            assert type(value) in (dict, list, tuple)
            for item in value.values() if isinstance(value, dict) else value:
                check(item)
        else:
            assert value is None or type(value) in (torch.Tensor, int, float, bool, str), type(value)

    check(optimizer.state_dict())


@each_case
def test_dtypes_survive_loading(case: Case) -> None:
    """float32 state beside bfloat16 parameters, which torch's load_state_dict would round (torch #43706)."""
    for variant in case.variants:
        params = make_params([(33,)], torch.bfloat16, CPU)
        optimizer = case.make(params, variant, master_weights="fp32")
        for _ in range(2):
            set_gradients(params)
            optimizer.step()
        for fresh in (case.make(params, variant, master_weights="fp32"), optimizer):
            saved = copy.deepcopy(optimizer.state_dict())
            fresh.load_state_dict(saved)
            state = fresh.state[params[0]]
            assert state["master"].dtype == torch.float32
            for name, value in saved["state"][0].items():
                assert state[name].dtype == value.dtype == torch.float32
                assert torch.equal(state[name], value), name


@each_case
def test_a_failing_load_changes_nothing(case: Case) -> None:
    params = make_params([(5,), (4,)], torch.float32, CPU)
    variant = next((v for v in case.variants if RULES[v.rule].states), case.variants[0])
    optimizer = case.make(params, variant)
    set_gradients(params)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    name = RULES[variant.rule].states[0]

    def wrong_shape(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = torch.zeros(7)

    def one_parameter(saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["params"] = [0]

    def two_groups(saved: dict[str, Any]) -> None:
        saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))

    for spoil in (wrong_shape, one_parameter, two_groups):
        bad = copy.deepcopy(good)
        bad["param_groups"][0]["lr"] = 77.0
        spoil(bad)
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
        now = optimizer.state_dict()
        assert now["param_groups"] == good["param_groups"]
        for index, state in good["state"].items():
            assert all(torch.equal(value, now["state"][index][key]) for key, value in state.items())
    set_gradients(params)
    optimizer.step()


@each_counterpart
def test_old_checkpoints(case: Case) -> None:
    """Step counts as numbers, options missing that came later."""
    params = make_params([(5,)], torch.float32, CPU)
    optimizer = case.make(params)
    set_gradients(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("foreach", "maximize", "capturable", "differentiable", "fused", *GROUP_OPTIONS):
        saved["param_groups"][0].pop(name, None)
    if "step" in saved["state"].get(0, {}):
        saved["state"][0]["step"] = 1
    other = case.make(params)
    other.load_state_dict(saved)
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    set_gradients(params)
    other.step()
    if "step" in optimizer.state[params[0]]:
        step = other.state[params[0]]["step"]
        assert isinstance(step, Tensor) and step.dtype == torch.float32 and step == 2


# ---- parameters and state that move ----


@each_case
def test_module_to_dtype(case: Case, backend: Backend) -> None:
    """``.to(dtype)`` replaces ``p.data``; state made before keeps its dtype or follows, and steps go on."""
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        for variant in case.variants:
            net = torch.nn.Linear(7, 3).to(backend.device)
            optimizer = case.make(net.parameters(), variant, backend=backend.name)
            oracle = Oracle(case, variant, optimizer, list(net.parameters()))
            set_gradients(list(net.parameters()))
            oracle.step()
            net.to(dtype)
            for _ in range(2):
                set_gradients(list(net.parameters()))
                oracle.step()


@each_case
def test_state_moved_or_replaced(case: Case, backend: Backend) -> None:
    for variant in case.variants:
        params = make_params([(70,)], torch.float32, backend.device)
        optimizer = case.make(params, variant, backend=backend.name)
        oracle = Oracle(case, variant, optimizer, params)
        for move in ("none", "data", "replace", "dtype", "grow", "clear"):
            state = optimizer.state[params[0]]
            for name in RULES[variant.rule].states:
                if move == "data":
                    state[name].data = state[name].data.clone()
                elif move == "replace":
                    state[name] = state[name].clone() * 0.5
                elif move == "dtype":
                    state[name] = state[name].double()
                elif move == "grow":
                    state[name] = torch.stack((state[name], state[name]), 1)[:, 0]
            if move == "clear" and variant.rule != "sgd_momentum" and case.name != "Adagrad":
                optimizer.state.clear()
                oracle.steps = dict.fromkeys(params, 0)
            set_gradients(params)
            oracle.step()


@each_case
def test_state_of_another_shape_is_refused(case: Case, backend: Backend) -> None:
    variant = next(v for v in (*case.variants[::-1],) if RULES[v.rule].states)
    p = torch.nn.Parameter(torch.ones(4, device=backend.device))
    optimizer = case.make([p], variant, backend=backend.name)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = torch.ones(4096, device=backend.device)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@each_case
def test_parameters_share_memory_with_what_made_them(case: Case) -> None:
    """The step writes in place: tied weights, flat buffers and views of the parameter see it."""
    storage = torch.ones(6)
    p = torch.nn.Parameter(storage[1:5])
    p.grad = torch.ones(4)
    address = p.data_ptr()
    case.make([p], lr=0.5).step()
    assert p.data_ptr() == address and (storage[1:5] != 1).all() and storage[0] == storage[5] == 1


# ---- autograd ----


@each_case
def test_use_after_the_step_is_noticed(case: Case, backend: Backend) -> None:
    """Autograd's version counter: a graph that saved the old parameter must not give gradients of the new one."""
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    optimizer = case.make([p], lr=0.1, backend=backend.name)
    for _ in range(2):  # the first step binds, the second takes the cached table
        loss = p.square().sum()
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_case
def test_state_and_parameters_stay_out_of_graphs(case: Case, backend: Backend) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    p.square().sum().backward(create_graph=True)
    optimizer = case.make([p], backend=backend.name)
    optimizer.step()
    assert p.is_leaf and p.requires_grad
    assert not any(v.requires_grad for v in optimizer.state[p].values() if isinstance(v, Tensor))


@each_case
@pytest.mark.filterwarnings("ignore:.*Converting a tensor with requires_grad.*")
def test_differentiable(case: Case) -> None:
    """Derivatives through the step by its gradient and by the learning rate agree with finite differences."""
    for variant in case.variants:
        if variant.name in ("tensors", "lr0"):
            continue

        def stepped(gradient: Tensor, lr: Tensor, variant: Variant = variant) -> Tensor:
            p = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True).clone()
            p.retain_grad()
            leaf = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
            optimizer = case.make([leaf], variant, differentiable=True, lr=lr)
            for group in optimizer.param_groups:  # torch refuses non-leaf parameters in the constructor only
                group["params"] = [p]
            optimizer.state.clear()
            p.grad = gradient
            optimizer.step()
            return p

        gradient = torch.tensor([0.3, -0.7, 1.1, 0.4], dtype=torch.float64, requires_grad=True)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(stepped, (gradient, lr)), variant.name


@each_case
def test_zero_gradients_at_lr_0_change_nothing(case: Case, backend: Backend) -> None:
    """How torch.distributed.checkpoint makes the state exist."""
    for variant in case.variants:
        for dtype in (torch.float32, torch.bfloat16):
            params = make_params([(33,), ()], dtype, backend.device)
            params[0].data[:2] = torch.tensor([0.0, 1e-38])
            before = [p.detach().clone() for p in params]
            optimizer = case.make(params, variant, backend=backend.name, lr=0.0)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            for p, old in zip(params, before, strict=True):
                assert torch.equal(p, old), variant.name
                assert all(name in optimizer.state[p] for name in RULES[variant.rule].states)


# ---- torch.compile, GradScaler ----


@each_case
@pytest.mark.slow
def test_compiled_step(case: Case) -> None:
    """A step inside torch.compile is one graph of torch operations and gives the eager result, before and after one."""
    ours, theirs = twins(((7,), (3, 4)))
    rate = torch.tensor(0.1)
    compiled, eager = case.make(ours, lr=rate), case.make(theirs, lr=rate)
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend="eager", fullgraph=True)
    for number, one in enumerate((step, step, step, compiled.step, step)):
        rate.fill_(0.1 / (number + 1))  # read from the tensor, no new graph
        same_gradients(ours, theirs)
        one()
        eager.step()
        assert_close(ours, theirs)
    assert all(p._version > 0 for p in ours)
    assert [type(batch) for batch in compiled._plan.batches] == [type(batch) for batch in eager._plan.batches]


COMPILED_OPTIONS: list[dict[str, Any]] = [
    {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    {"stochastic_rounding": True, "master_weights": "split8", "state_dtype": "int8"},
    {"master_weights": "split", "max_grad_norm": 0.1},
    {"skip_nonfinite": True},
]


@pytest.mark.parametrize(
    "case, options",
    [(case, COMPILED_OPTIONS[0]) for case in CASES] + [(CASES[0], options) for options in COMPILED_OPTIONS[1:]],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
@pytest.mark.slow
def test_compiled_step_with_options(case: Case, options: dict[str, Any]) -> None:
    """Every option is part of the one graph: a break in it lets torch step one parameter in place of another."""
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    ours = make_params(((7,), (3, 4)), dtype, CPU)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    made = [case.make(params, lr=torch.tensor(0.1), backend="reference", **options) for params in (ours, theirs)]
    torch._dynamo.reset()
    steps = torch.compile(made[0].step, backend="eager", fullgraph=True), made[1].step
    for _ in range(3):
        same_gradients(ours, theirs)
        for step in steps:
            step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        for name, value in made[1].state[q].items():
            torch.testing.assert_close(made[0].state[p][name], value, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_compiled_training_step() -> None:
    """Forward, backward, clipping and step in one compiled function, with the graph breaks torch makes of it."""
    net = model()
    plain = copy.deepcopy(net)
    steps = []
    for one in (net, plain):
        optimizer = fused.AdamW(one.parameters(), lr=0.1, max_grad_norm=0.5)

        def train(one: torch.nn.Module = one, optimizer: fused.AdamW = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = backward(one)
            optimizer.step()
            return loss

        steps.append(train)
    torch._dynamo.reset()
    compiled = torch.compile(steps[0], backend="eager")
    for _ in range(4):
        torch.testing.assert_close(compiled(), steps[1]())
    assert_close(list(net.parameters()), list(plain.parameters()))


@each_case
def test_grad_scaler(case: Case) -> None:
    """torch.amp.GradScaler unscales, skips on infinities, and leaves a good step as it is without scaling."""
    net = model()
    plain = copy.deepcopy(net)
    optimizer, unscaled = case.make(net.parameters(), lr=0.125), case.make(plain.parameters(), lr=0.125)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for spoiled in (False, True, False):
        for o in (optimizer, unscaled):
            o.zero_grad()
        loss: Tensor = net(torch.ones(3, 6)).square().sum()
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in net.parameters()]
        if spoiled:
            next(net.parameters()).grad[0, 0] = float("inf")
        else:
            backward(plain)
        scaler.step(optimizer)
        scaler.update()
        if spoiled:
            assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
        else:
            unscaled.step()
    assert scaler.get_scale() == 512.0
    assert_close(list(net.parameters()), list(plain.parameters()))
