"""Follows an optimizer step by step and compares every result with the float64 reference.

Each step is checked by itself, from the parameters and the state as they were stored before it: so a bound of a few
roundings holds for low precision as well, and errors cannot hide behind earlier ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import references
import torch
from cases import Case, Variant, rule_of
from torch import Tensor

SIZES = (0, 1, 7, 63, 1023, 65537)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For small operations between the steps, where threads that wait for each other only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def real(tensor: Tensor) -> Tensor:
    """A detached tensor, complex ones as pairs of reals."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """What steps of parameters of this dtype compute in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def random_gradient(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values over three decades, both signs."""
    size = (*shape, 2) if dtype.is_complex else tuple(shape)
    with one_thread():
        g = torch.randn(size, dtype=torch.float64, device=device) * 10 ** (torch.rand(size, device=device) * 3 - 2.5)
    return (torch.view_as_complex(g) if dtype.is_complex else g).to(dtype)


def half_spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to nearest may change when a float64 value goes to ``dtype``; 0 for the arithmetic's own dtypes."""
    if dtype in (torch.float32, torch.float64):
        return torch.zeros_like(x)
    info = torch.finfo(dtype)
    return info.eps / 2 * x.abs() + info.smallest_normal * info.eps / 2


class StepError(AssertionError):
    """A result is further from the reference than the roundings of one step explain."""


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Raises :class:`StepError` unless ``|actual - expected| <= bound`` everywhere; NaN and inf must be the same."""
    got = actual.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    wrong = ~(same | ((got - expected).abs() <= bound))
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        g, e, b = (float(t.flatten()[at]) for t in (got, expected, bound))
        raise StepError(
            f"{what}: {int(wrong.sum())} of {got.numel()} wrong; element {at}: {g!r}, expected {e!r} within {b:.3g}"
        )


class Oracle:
    """Checks the steps of an optimizer of one case.

    Args:
        case: what the optimizer is.
        variant: its hyperparameters.
        optimizer: one that was constructed with them; taken as it is, so that a test can hand in a wrong one.
        params: its parameters.
    """

    def __init__(
        self, case: Case, variant: Variant, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
    ) -> None:
        self.case, self.variant, self.optimizer, self.params = case, variant, optimizer, list(params)
        self.group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.steps = dict.fromkeys(self.params, 0)

    def step(self) -> None:
        """Steps the optimizer and checks every parameter, state and step count.

        Raises:
            StepError: a result is wrong; the message says which.
        """
        before = [self._stored(p) for p in self.params]
        versions = [p._version for p in self.params]
        self.optimizer.step()
        for index, (p, old, version) in enumerate(zip(self.params, before, versions, strict=True)):
            what = f"{self.case.name}-{self.variant.name}, parameter {index} ({p.dtype}, {tuple(p.shape)})"
            if p.grad is None:
                if self._stored(p).keys() != old.keys() or any(
                    not torch.equal(a, b) for a, b in zip(self._stored(p).values(), old.values(), strict=True)
                ):
                    raise StepError(f"{what}: has no gradient, but changed")
                continue
            self.steps[p] += 1
            if p._version <= version:
                raise StepError(f"{what}: autograd was not told")
            self._check(p, old, what)

    def _stored(self, p: Tensor) -> dict[str, Tensor]:
        """Copies of the parameter and of its rule's state."""
        state = self.optimizer.state.get(p, {})
        first = self.case.first_state(self.variant, p)
        copies = {name: real(state[name]).clone() if name in state else real(first[name]) for name in first}
        return {"param": real(p).clone(), **copies}

    def _check(self, p: Tensor, old: dict[str, Tensor], what: str) -> None:
        state, group, count = self.optimizer.state[p], self.group_of[p], self.steps[p]
        if "step" in state and int(state["step"]) != count:
            raise StepError(f"{what}: step is {state['step']}, expected {count}")
        assert p.grad is not None
        history = {name: value for name, value in old.items() if name != "param"}
        arithmetic = arithmetic_of(p.dtype)
        roundings = self.variant.ulps * (2 if arithmetic == torch.float64 else 1)  # the reference's own, too
        with one_thread():
            wanted, bounds = references.bounded(
                self.case.reference, old["param"], real(p.grad), history, count, group, arithmetic, roundings
            )
            for name in ("param", *rule_of(self.variant).states):
                stored = real(p if name == "param" else state[name])
                bound = bounds[name] + half_spacing(wanted[name].abs() + bounds[name], stored.dtype)
                assert_within(stored, wanted[name], bound, f"{what}, step {count}, {name}")


def make_params(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """Parameters of standard normal values."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.nn.Parameter(torch.randn(tuple(shape), dtype=wide, device=device).to(dtype)) for shape in shapes]


def set_gradients(params: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> None:
    """Gives every parameter a new gradient, of its own dtype or of ``dtypes`` in turn."""
    for index, p in enumerate(params):
        dtype = p.dtype if dtypes is None else dtypes[index % len(dtypes)]
        assign_gradient(p, random_gradient(p.shape, dtype, p.device))


def assign_gradient(p: Tensor, gradient: Tensor) -> None:
    """Sets a gradient of any dtype, which autograd has to be told where it is not the parameter's."""
    p.grad = None
    p.grad_dtype = gradient.dtype  # type: ignore[attr-defined]
    p.grad = gradient


def run(case: Case, variant: Variant, optimizer: Any, params: Sequence[Tensor], steps: int = 4) -> None:
    """Some checked steps with new gradients each."""
    oracle = Oracle(case, variant, optimizer, params)
    for _ in range(steps):
        set_gradients(params)
        oracle.step()
