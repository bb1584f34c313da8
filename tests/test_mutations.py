"""The checks notice wrong optimizers: each mutation is a mistake that an optimizer was shipped with somewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import CASE, CASES, Case, Variant
from oracle import Oracle, StepError, make_params, set_gradients
from torch import Tensor

import fused

CPU = torch.device("cpu")


class Wrong:
    """An optimizer with a mistake: it looks like the right one, and something is done to the parameters after."""

    def __init__(self, optimizer: fused.FusedOptimizer, spoil: Callable[[Tensor, Tensor], None]) -> None:
        self.optimizer, self.spoil = optimizer, spoil
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self) -> None:
        """The right step, then the mistake."""
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        self.optimizer.step()
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                self.spoil(p, old)


def no_step(p: Tensor, old: Tensor) -> None:
    p.copy_(old)


def flipped_sign(p: Tensor, old: Tensor) -> None:
    p.copy_(2 * old - p)


def tail_forgotten(p: Tensor, old: Tensor) -> None:
    p[-1] = old[-1]


def first_vector_only(p: Tensor, old: Tensor) -> None:
    p[16:] = old[16:]


def lr_off_by_a_thousandth(p: Tensor, old: Tensor) -> None:
    p.copy_(old + (p - old) * 1.001)


def one_element_written_over(p: Tensor, old: Tensor) -> None:
    p[len(p) // 2] = 0.0


def caught(case: Case, variant: Variant, optimizer: object, steps: int = 4) -> bool:
    """Whether the oracle raises within some steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]  # type: ignore[attr-defined]
    oracle = Oracle(case, variant, optimizer, params)  # type: ignore[arg-type]
    try:
        for _ in range(steps):
            set_gradients(params)
            oracle.step()
    except StepError:
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [no_step, flipped_sign, tail_forgotten, first_vector_only, lr_off_by_a_thousandth, one_element_written_over],
    ids=lambda spoil: spoil.__name__,
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_parameters(case: Case, spoil: Callable[[Tensor, Tensor], None], dtype: torch.dtype) -> None:
    if spoil is lr_off_by_a_thousandth and dtype == torch.bfloat16:
        pytest.skip("less than bfloat16 tells apart")
    lr = 100.0 if case.name == "Adadelta" else 0.1  # steps that bfloat16 tells from none
    params = make_params([(65,)], dtype, CPU)
    assert not caught(case, case.variants[0], case.make(params, lr=lr))
    params = make_params([(65,)], dtype, CPU)
    wrong = Wrong(case.make(params, lr=lr), spoil)
    assert caught(case, case.variants[0], wrong)


def variant(case: str, name: str) -> tuple[Case, Variant]:
    return CASE[case], next(v for v in CASE[case].variants if v.name == name)


# The class under test takes other hyperparameters than the reference is told.
WRONG_KWARGS = {
    "coupled decay": ("AdamW", "decay", {"decoupled_weight_decay": False}),
    "decoupled decay": ("Adam", "l2", {"decoupled_weight_decay": True}),
    "no decay": ("Lion", "decay", {"weight_decay": 0.0}),
    "no penalty": ("SGD", "l2", {"weight_decay": 0.0}),
    "no nesterov": ("SGD", "nesterov", {"nesterov": False}),
    "no dampening": ("SGD", "dampening", {"dampening": 0.0}),
    "not maximized": ("SGD", "maximize", {"maximize": False}),
    "betas swapped": ("Lion", "default", {"betas": (0.99, 0.9)}),
    "beta2 a little off": ("Adam", "default", {"betas": (0.9, 0.99901)}),
    "eps forgotten": ("Adadelta", "default", {"eps": 0.0}),
    "eps within float32": ("Adam", "l2", {"eps": 1e-5}),
    "lr decay forgotten": ("Adagrad", "lr-decay", {"lr_decay": 0.0}),
    "alpha off": ("RMSprop", "default", {"alpha": 0.9}),
    "amsgrad forgotten": ("Adam", "amsgrad", {"amsgrad": False}),
}


@pytest.mark.parametrize("mistake", WRONG_KWARGS)
def test_wrong_hyperparameters(mistake: str) -> None:
    name, which, change = WRONG_KWARGS[mistake]
    case, chosen = variant(name, which)
    params = make_params([(257,)], torch.float32, CPU)
    optimizer = case.make(params, chosen)
    right = [{k: v for k, v in group.items() if k in change} for group in optimizer.param_groups]

    class Mistaken(Wrong):
        def step(self) -> None:
            for group in self.param_groups:
                group.update(change)
            self.optimizer.step()
            for group, values in zip(self.param_groups, right, strict=True):
                group.update(values)

    if mistake == "amsgrad forgotten":
        with pytest.raises(KeyError, match="max_exp_avg_sq"):
            caught(case, chosen, Mistaken(optimizer, no_step))
    else:
        assert caught(case, chosen, Mistaken(optimizer, no_step))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_step_counts(case: Case) -> None:
    """Bias corrections of another step: counted twice, once per run, or not at all."""
    for wrong_count in (0.0, 2.0):
        params = make_params([(33,)], torch.float32, CPU)
        optimizer = case.make(params)
        set_gradients(params)
        optimizer.step()
        state = optimizer.state[params[0]]
        if "step" not in state:
            return
        oracle = Oracle(case, case.variants[0], optimizer, params)
        oracle.steps[params[0]] = 1
        set_gradients(params)
        state["step"].fill_(wrong_count)
        with pytest.raises(StepError, match="step is"):
            oracle.step()


def test_wrong_bias_correction_shows_in_the_parameter() -> None:
    case, chosen = variant("Adam", "default")
    params = make_params([(33,)], torch.float32, CPU)
    optimizer = case.make(params)

    def uncorrected(p: Tensor, old: Tensor) -> None:
        p.copy_(old + (p - old) * 0.1 / math.sqrt(0.001))

    assert caught(case, chosen, Wrong(optimizer, uncorrected))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_states(case: Case) -> None:
    for chosen in case.variants:
        for name in case.first_state(chosen, torch.ones(1)):
            params = make_params([(65,)], torch.float32, CPU)
            optimizer = case.make(params, chosen)

            def spoil(p: Tensor, old: Tensor, optimizer: fused.FusedOptimizer = optimizer, name: str = name) -> None:
                optimizer.state[p][name][-1] *= 1.00001

            assert caught(case, chosen, Wrong(optimizer, spoil)), (chosen.name, name)


def test_version_counters_are_checked() -> None:
    case = CASE["SGD"]

    class Silent(Wrong):
        def step(self) -> None:
            for p in params:
                version = p._version
                self.optimizer.step()
                torch._C._autograd._unsafe_set_version_counter((p,), (version,))

    params = make_params([(3,)], torch.float32, CPU)
    assert caught(case, case.variants[0], Silent(case.make(params), no_step))


def test_a_parameter_without_gradient_must_not_move() -> None:
    case = CASE["AdamW"]
    params = make_params([(3,), (3,)], torch.float32, CPU)
    optimizer = Wrong(case.make(params), lambda p, old: p.mul_(0.5) if p is params[1] else None)
    oracle = Oracle(case, case.variants[0], optimizer, params)  # type: ignore[arg-type]
    set_gradients(params)
    params[1].grad = None
    with pytest.raises(StepError, match="has no gradient, but changed"):
        oracle.step()
