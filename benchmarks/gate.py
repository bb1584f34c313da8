"""The correctness gate: no side is timed before its first steps on the very problem agree with a float64 reference.

Elementwise optimizers are checked on the first, the last and random elements of every tensor; others on whole tensors,
one of each shape. The three steps see gradients of changing sign and size, so a flipped sign, coupled instead of
decoupled decay, a missing tail or a step that does nothing all fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case
from .problem import Problem, Side, total_norm
from .reference import reference

FACTORS = (1.0, -0.5, 2.0)
STEPS = len(FACTORS)
_SAMPLE = 1 << 18
_WHOLE = 1 << 26


@dataclass(frozen=True)
class Verdict:
    error: float  # |update - reference update| / |reference update|, over the whole sample
    moved: float  # fraction of the sampled elements that moved
    tolerance: float
    gradients_kept: bool = True

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance and self.moved > 0.5 and self.gradients_kept

    def __str__(self) -> str:
        why = "" if self.gradients_kept else ", gradients changed"
        return (
            f"relative error {self.error:.2g} (allowed {self.tolerance:.2g}), {self.moved:.1%} of elements moved{why}"
        )


def _indices(n: int, k: int, generator: torch.Generator) -> Tensor:
    if n <= k:
        return torch.arange(n)
    ends = k // 4
    inner = torch.randint(n, (k - 2 * ends,), generator=generator)
    return torch.cat([torch.arange(ends), torch.arange(n - ends, n), inner])


class _Sample:
    """Which elements of the problem are compared, and their values in float64."""

    def __init__(self, case: Case, problem: Problem) -> None:
        shapes = problem.profile.shapes
        self.elementwise = case.elementwise
        if self.elementwise:
            k = max(16, min(4096, _SAMPLE // max(1, len(shapes))))
            generator = torch.Generator().manual_seed(1)
            self.picks = {i: _indices(t.numel(), k, generator) for i, t in enumerate(problem.initial)}
            self.picks = {i: idx.to(problem.device) for i, idx in self.picks.items()}
        else:
            distinct = {shape: i for i, shape in reversed(list(enumerate(shapes)))}
            chosen, budget = (
                sorted({*distinct.values(), len(shapes) - 1}, key=lambda i: problem.initial[i].numel()),
                _WHOLE,
            )
            self.whole: list[int] = []
            for i in chosen:
                budget -= problem.initial[i].numel()
                if budget >= 0 or not self.whole:
                    self.whole.append(i)

    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.elementwise:
            parts = [tensors[i].detach().reshape(-1)[idx] for i, idx in self.picks.items()]
            return [torch.cat(parts).double().cpu()] if parts else []
        return [tensors[i].detach().double().cpu() for i in self.whole]


def check(
    case: Case, problem: Problem, sides: list[Side], clip: float | None = None, scale: float = 1.0
) -> dict[str, Verdict | Exception]:
    """Step every side through FACTORS and compare. `clip` and `scale` say what a pipeline does to the gradients first.

    A side that raises gets its exception as the answer; the others go on.
    """
    sample = _Sample(case, problem)
    start = sample.take(problem.initial)
    grads = sample.take(problem.gradients())
    norm = total_norm(problem.gradients()) / problem.factor if clip is not None else 0.0
    grads = [g / problem.factor for g in grads]

    ref_params = [torch.nn.Parameter(p.clone()) for p in start]
    ref = reference(case, list(ref_params))
    kept = dict.fromkeys((side.system for side in sides), True)
    verdicts: dict[str, Verdict | Exception] = {}
    for factor in FACTORS:
        problem.set_factor(factor * scale)
        expected = sample.take(problem.gradients())
        coefficient = 1.0 if clip is None else min(1.0, clip / (norm * abs(factor) + 1e-6))
        for p, g in zip(ref_params, grads, strict=True):
            p.grad = g * (factor * coefficient)
        ref.step()
        for side in sides:
            if side.system in verdicts:
                continue
            try:
                if side.prepare:
                    side.prepare()
                side.step()
            except Exception as error:  # noqa: BLE001  a peer may raise anything
                verdicts[side.system] = error
                continue
            now = sample.take(problem.gradients())
            if not all(torch.equal(a, b) for a, b in zip(now, expected, strict=True)):
                kept[side.system] = False
                problem.restore_gradients()
    problem.set_factor(scale)

    want = torch.cat([(p.detach() - s).flatten() for p, s in zip(ref_params, start, strict=True)])
    for side in sides:
        if side.system in verdicts:
            continue
        got = torch.cat([(p - s).flatten() for p, s in zip(sample.take(side.params), start, strict=True)])
        off = float((got - want).norm() / want.norm()) if bool(got.isfinite().all()) else float("inf")
        moved = float((got != 0).double().mean())
        verdicts[side.system] = Verdict(off, moved, problem.precision.tolerance(case), kept[side.system])
    return verdicts
