"""Peaks of memory while state is made, saved and loaded: never more than one tensor above what is kept."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES

import fused
from fused import state

SIZES = ((1 << 18,), (512, 500), (500, 500), (77,))
LARGEST = 4 << 18
"""Bytes of the largest parameter in float32."""
LITTLE = 1 << 18
"""Bytes that conversions of ``state.PIECE`` elements may take on the way."""

KINDS = ("fp32", "split", "split8", None)
STATES = (torch.float32, torch.bfloat16, "int8")

Made = tuple[torch.nn.Module, fused.FusedOptimizer]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that they cannot be mistaken for a tensor."""
    monkeypatch.setattr(state, "PIECE", 1 << 11)


def measured(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> tuple[int, int]:
    """Bytes that torch's allocator had in use at most in ``call``, and in its end, above those in use before.

    What ``call`` frees counts if it was allocated by ``prepare``: the profiler knows no earlier sizes.
    """
    gc.collect()
    gc.disable()  # what other tests left behind must not be freed in between
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
        ) as profiler:
            prepared = prepare()
            with torch.profiler.record_function("measured"):
                result = call(prepared)
    finally:
        gc.enable()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    (start,) = (event.start_ns() for event in events if event.name() == "measured")
    live = peak = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() >= start:
            live += event.nbytes()
            peak = max(peak, live)
    del result, prepared
    return peak, live


def assert_no_spike(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> None:
    """No more than the largest tensor above what was there before or is there in the end."""
    peak, kept = measured(prepare, call)
    assert peak <= max(kept, 0) + LARGEST + LITTLE, f"{peak:,} at most, {kept:,} in the end"


def test_the_measure_sees_a_second_copy() -> None:
    def tensors() -> list[torch.Tensor]:
        return [torch.zeros(size) for size in SIZES]

    def replaced(old: list[torch.Tensor], at_once: bool) -> None:
        if at_once:
            old[:] = [tensor + 1 for tensor in old]
        for index in range(len(old)):
            old[index] = old[index] + 1

    assert_no_spike(tensors, lambda old: [tensor.clone() for tensor in old])
    assert_no_spike(tensors, lambda old: replaced(old, at_once=False))
    with pytest.raises(AssertionError, match="at most"):
        assert_no_spike(tensors, lambda old: replaced(old, at_once=True))
    with pytest.raises(AssertionError, match="at most"):
        assert_no_spike(tensors, lambda old: [tensor.float() for tensor in [tensor.double() for tensor in old]])


def make(steps: int = 1, **options: Any) -> Made:
    """A model in bfloat16 that has gradients, and its optimizer."""
    model = torch.nn.Module()
    for index, size in enumerate(SIZES):
        param = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        param.grad = torch.full_like(param, 0.5)
        model.register_parameter(f"p{index}", param)
    optimizer = fused.AdamW(model.parameters(), **options)
    for _ in range(steps):
        optimizer.step()
    return model, optimizer


def saved(**options: Any) -> dict[str, Any]:
    return copy.deepcopy(make(**options)[1].state_dict())


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(kind: str | None, state_dtype: Any) -> None:
    options = {"master_weights": kind, "state_dtype": state_dtype}
    dictionary = saved(**options)
    peak, _ = measured(lambda: make(**options), lambda made: made[1].state_dict())
    assert peak < 1 << 16, "state_dict() copies nothing"
    peak, _ = measured(lambda: make(**options), lambda made: made[1].load_state_dict(made[1].state_dict()))
    assert peak < 1 << 16, "its own tensors are not copied"
    peak, kept = measured(lambda: make(**options), lambda made: made[1].load_state_dict(dictionary))
    assert peak <= LARGEST + LITTLE, "the state until now is let go tensor by tensor"
    assert abs(kept) < 1 << 16
    assert_no_spike(lambda: make(steps=0, **options), lambda made: made[1].load_state_dict(dictionary))


@pytest.mark.parametrize("source, live", [(a, b) for a in STATES for b in STATES if a != b], ids=str)
def test_loading_into_another_format(source: Any, live: Any) -> None:
    dictionary = saved(master_weights="split", state_dtype=source)
    options = {"master_weights": "split8", "state_dtype": live}
    assert_no_spike(lambda: make(**options), lambda made: made[1].load_state_dict(dictionary))
    assert_no_spike(lambda: make(steps=0, **options), lambda made: made[1].load_state_dict(dictionary))


@pytest.mark.parametrize("live", KINDS[:3])
@pytest.mark.parametrize("source", KINDS)
def test_the_step_that_converts_masters(source: str | None, live: str) -> None:
    dictionary = saved(master_weights=source)

    def loaded() -> fused.FusedOptimizer:
        _, optimizer = make(master_weights=live)
        optimizer.load_state_dict(dictionary)
        return optimizer

    assert_no_spike(loaded, lambda optimizer: optimizer.step())


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step(kind: str | None, state_dtype: Any) -> None:
    options = {"master_weights": kind, "state_dtype": state_dtype}
    assert_no_spike(lambda: make(steps=0, **options), lambda made: made[1].step())


@pytest.mark.parametrize("kind", KINDS)
def test_master_weights(kind: str | None) -> None:
    assert_no_spike(lambda: make(master_weights=kind), lambda made: fused.master_state_dict(*made))
    model, optimizer = make(master_weights=kind)
    weights = {name: w.clone() for name, w in fused.master_state_dict(model, optimizer).items()}
    for steps in (0, 1):
        assert_no_spike(
            lambda steps=steps: make(steps=steps, master_weights=kind),
            lambda made: fused.load_master_state_dict(*made, weights),
        )


def test_taking_over_from_torch() -> None:
    def theirs() -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(make(0)[0].parameters())
        optimizer.step()
        return optimizer

    peak, _ = measured(theirs, fused.from_torch)
    assert peak < 1 << 16, "tensors are taken over"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_optimizer(case: Any) -> None:
    def stepped() -> fused.FusedOptimizer:
        optimizer: fused.FusedOptimizer = case.make(make(0)[0].parameters(), case.variants[-1], master_weights="split")
        optimizer.step()
        return optimizer

    dictionary = copy.deepcopy(stepped().state_dict())
    assert measured(stepped, lambda optimizer: optimizer.state_dict())[0] < 1 << 16
    assert measured(stepped, lambda optimizer: optimizer.load_state_dict(dictionary))[0] <= LARGEST + LITTLE
