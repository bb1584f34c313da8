"""Options of the engine that differ between the groups of one optimizer: each group steps as if it were alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from cases import CASES, Case, Variant
from conftest import Backend
from oracle import random_gradient

import fused
from fused.precision import GROUP_OPTIONS, Storage
from fused.rules import RULES

GROUPS: tuple[dict[str, Any], ...] = tuple(
    {"dtype": dtype, "master_weights": kind, "state_dtype": state, "stochastic_rounding": stochastic}
    for dtype, kinds in (
        (torch.float32, (None,)),
        (torch.bfloat16, (None, "fp32", "split", "split8")),
        (torch.float16, ("split", "split8")),
    )
    for kind, state, stochastic in itertools.product(
        kinds, (None, torch.float32, torch.bfloat16, torch.float16, "int8"), (False, True)
    )
    if not (stochastic and state is None)
)
SHAPES = ((65, 33), (7,))


def groups_of(params: list[list[torch.nn.Parameter]]) -> list[dict[str, Any]]:
    return [
        {"params": own, **{name: value for name, value in options.items() if name != "dtype"}}
        for own, options in zip(params, GROUPS, strict=True)
    ]


def make_params(backend: Backend) -> list[list[torch.nn.Parameter]]:
    return [
        [torch.nn.Parameter(torch.randn(shape).to(options["dtype"]).to(backend.device)) for shape in SHAPES]
        for options in GROUPS
    ]


class Recording(dict[str, Any]):
    """A parameter group that remembers what was read."""

    def __init__(self, group: dict[str, Any]) -> None:
        super().__init__(group)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_watches_what_it_depends_on(case: Case) -> None:
    for variant in case.variants:
        optimizer = case.make([torch.nn.Parameter(torch.ones(3))], variant)
        group = Recording(optimizer.param_groups[0])
        optimizer._rule(group)
        assert group.read == set(optimizer._rule_options)
        Storage.of(group)
        assert group.read == {*optimizer._rule_options, *GROUP_OPTIONS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_options_changed_between_steps(case: Case, backend: Backend) -> None:
    """From one variant to another and back, each time with the state that the rule asks for."""
    for first, second in itertools.permutations(case.variants, 2):
        params = [torch.nn.Parameter(torch.randn(9, 3, device=backend.device))]
        optimizer = case.make(params, first, backend=backend.name)
        other = case.make(params, second, backend=backend.name).param_groups[0]
        own = dict(optimizer.param_groups[0])
        for options in (own, other, own):
            optimizer.param_groups[0].update({k: v for k, v in options.items() if k != "params"})
            params[0].grad = random_gradient((9, 3), torch.float32, backend.device)
            optimizer.step()
            rule = optimizer._rule(optimizer.param_groups[0])
            assert optimizer._plan is not None
            assert [wanted for wanted, _, _ in optimizer._plan.signature] == [rule]
            assert set(rule.states) <= optimizer.state[params[0]].keys()


def test_options_taken_back_after_a_step_that_failed(backend: Backend) -> None:
    params = [torch.nn.Parameter(torch.randn(9, 3, device=backend.device)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fused.AdamW(params, backend=backend.name)
    optimizer.step()
    group, before = optimizer.param_groups[0], [p.detach().clone() for p in params]
    for wrong in ({"amsgrad": True, "master_weights": "split"}, {"state_dtype": "int7"}):
        right = {name: group[name] for name in wrong}
        group.update(wrong)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"split|int7"):
                optimizer.step()
        group.update(right)
        assert all(map(torch.equal, params, before))
    optimizer.step()
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert not torch.equal(params[0], before[0]) and optimizer.state[params[0]]["step"] == 2


def variant_of(case: Case) -> Variant:
    """The one with most states; not a centered one, whose variance low precision makes negative: NaN equals nothing."""
    plain = [variant for variant in case.variants if "centered" not in variant.rule]
    return max(plain, key=lambda variant: len(RULES[variant.rule].states))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_combination_side_by_side(case: Case, backend: Backend) -> None:
    """Bit for bit the groups alone; stochastic rounding draws by the parameter's place, which is made the same."""
    params = make_params(backend)
    twins = copy.deepcopy(params)
    variant = variant_of(case)
    together = case.make(groups_of(params), variant, backend=backend.name, lr=0.1, seed=5)
    alone = []
    for index, (own, options) in enumerate(zip(twins, GROUPS, strict=True)):
        before = [torch.nn.Parameter(torch.zeros_like(own[0][:1])) for _ in range(len(SHAPES) * index)]
        for_all = {name: value for name, value in options.items() if name != "dtype"}
        alone.append(case.make([*before, *own], variant, backend=backend.name, lr=0.1, seed=5, **for_all))
    for _ in range(2):
        for own, others in zip(params, twins, strict=True):
            for p, q in zip(own, others, strict=True):
                p.grad = random_gradient(p.shape, p.dtype, p.device)
                q.grad = p.grad.clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
    for own, others, optimizer, options in zip(params, twins, alone, GROUPS, strict=True):
        for p, q in zip(own, others, strict=True):
            assert torch.equal(p, q), options
            mine, theirs = together.state[p], optimizer.state[q]
            assert mine.keys() == theirs.keys(), options
            assert all(torch.equal(value, theirs[name]) for name, value in mine.items()), options
            for name in RULES[variant.rule].states:
                assert mine[name].dtype == expected_dtype(options), (name, options)
            assert ("master" in mine) == (options["master_weights"] == "fp32")
            assert ("remainder" in mine) == (options["master_weights"] in ("split", "split8"))


def expected_dtype(options: dict[str, Any]) -> torch.dtype:
    if options["state_dtype"] is None:
        return torch.float32 if options["master_weights"] else options["dtype"]
    return torch.uint8 if options["state_dtype"] == "int8" else options["state_dtype"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_they_survive_a_state_dict_and_a_copy(case: Case, backend: Backend) -> None:
    params = make_params(backend)
    variant = variant_of(case)
    optimizer = case.make(groups_of(params), variant, backend=backend.name, seed=5)
    gradients = [[random_gradient(p.shape, p.dtype, p.device) for p in own] for own in params]

    def step(one: fused.FusedOptimizer) -> None:
        for group, own in zip(one.param_groups, gradients, strict=True):
            for p, gradient in zip(group["params"], own, strict=True):
                p.grad = gradient.clone()
        one.step()

    step(optimizer)
    twins = copy.deepcopy(params)
    loaded = case.make(groups_of(twins), variant, backend=backend.name, seed=5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, loaded, copied):
        step(one)
    for other in (loaded, copied):
        for group, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            for p, q in zip(group["params"], theirs["params"], strict=True):
                assert torch.equal(p, q)
                for name, value in optimizer.state[p].items():
                    assert torch.equal(value, other.state[q][name]), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_added_group_has_its_own(case: Case, backend: Backend) -> None:
    first = torch.nn.Parameter(torch.ones(5, device=backend.device))
    second = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16, device=backend.device))
    variant = variant_of(case)
    optimizer = case.make([first], variant, backend=backend.name)
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "master_weights": "split", "state_dtype": "int8"})
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert "remainder" in optimizer.state[second] and "remainder" not in optimizer.state[first]
    for name in RULES[variant.rule].states:
        assert optimizer.state[first][name].dtype == torch.float32
        assert optimizer.state[second][name].dtype == torch.uint8


@pytest.mark.parametrize(
    "dtype, options, message",
    [
        (torch.float32, {"master_weights": "split"}, "master_weights='split' needs bfloat16 or float16 .*float32"),
        (torch.float64, {"state_dtype": "int8"}, "state_dtype='int8' needs float32.*float64.*state_dtype=None"),
        (torch.complex64, {"state_dtype": torch.bfloat16}, "state_dtype='bfloat16' needs float32.*complex64"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(dtype: torch.dtype, options: Any, message: str) -> None:
    fits = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    for case in CASES:
        with pytest.raises(ValueError, match=message):
            case.make([{"params": [fits]}, {"params": [torch.nn.Parameter(torch.ones(3, dtype=dtype))], **options}])
