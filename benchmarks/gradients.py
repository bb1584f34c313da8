"""The functions that work on gradients alone, this package's beside torch.nn.utils': checked, then timed.

Both work on gradients of their own, restored before each call, untimed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cases import Precision
from .measure import Session
from .problem import Problem, Side, total_norm
from .report import Row, cell_name
from .shapes import Profile
from .timing import Timed, interleave, make_clock, paired_ratio

CLIP = 1.0
LIMIT = 0.5  # of clip_grad_value_: about every second gradient lies beyond
_SAMPLE = 1 << 17


@dataclass(frozen=True)
class Function:
    """One of torch.nn.utils' functions, by its name there and here."""

    name: str
    arguments: Callable[[list[Tensor], list[Tensor], Tensor], tuple[Any, ...]]  # of parameters, gradients, their norm
    passes: int  # least times that an element is read or written
    after: Callable[[Tensor, float], Tensor]  # what gradients of that norm become

    def __call__(self, module: ModuleType, params: list[Tensor], grads: list[Tensor], norm: Tensor) -> Any:
        return getattr(module, self.name)(*self.arguments(params, grads, norm))


def _clipped(grads: Tensor, norm: float) -> Tensor:
    return grads * min(1.0, CLIP / (norm + 1e-6))


FUNCTIONS = {
    f.name: f
    for f in (
        Function("clip_grad_norm_", lambda p, _g, _n: (p, CLIP), 3, _clipped),
        Function("get_total_norm", lambda _p, g, _n: (g,), 1, lambda g, _n: g),
        Function("clip_grads_with_norm_", lambda p, _g, n: (p, CLIP, n), 2, _clipped),
        Function("clip_grad_value_", lambda p, _g, _n: (p, LIMIT), 2, lambda g, _n: g.clamp(-LIMIT, LIMIT)),
    )
}


def _ends(tensors: Sequence[Tensor]) -> Tensor:
    """The first and the last elements of every tensor, in float64."""
    k = max(4, _SAMPLE // max(1, len(tensors)))
    flat = [t.detach().reshape(-1) for t in tensors]
    return torch.cat([part for t in flat for part in (t[:k], t[-k:])]).double()


def error_of(function: Function, returned: object, grads: Sequence[Tensor], shared: Sequence[Tensor]) -> float:
    """The largest relative error: of the norm returned, of the gradients' ends, and of the norm of them all."""
    norm = total_norm(shared)
    want = function.after(_ends(shared), norm)
    errors = [float((_ends(grads) - want).norm() / want.norm())]
    if isinstance(returned, Tensor):
        errors.append(abs(float(returned) - norm) / norm)
    if function.after is _clipped:
        errors.append(abs(total_norm(grads) / min(norm, CLIP) - 1))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def tolerance(system: str, dtype: torch.dtype) -> float:
    if system != "fused":
        return 1e-2  # torch sums in the gradients' dtype
    return 1e-5 if dtype.itemsize >= 4 else 5e-3  # what is written is rounded


class GradientSides:
    """A problem and, for each system, parameters with gradients of their own, for one function after the other."""

    def __init__(self, problem: Problem) -> None:
        import fused

        self.problem = problem
        self.shared = problem.gradients()
        self.norm = torch.tensor(total_norm(self.shared), dtype=torch.float32, device=problem.device)
        self.modules: dict[str, ModuleType] = {"fused": fused, "torch": torch.nn.utils}

    def make(self, system: str, function: Function) -> Side:
        params = self.problem.parameters()
        grads: list[Tensor] = []
        module = self.modules[system.partition(".")[0]]
        side = Side(system, system.partition(".")[0], params, lambda: function(module, params, grads, self.norm))
        side.take_private_gradients()
        side.gradient_passes = function.passes
        grads += [p.grad for p in params if p.grad is not None]
        return side

    def error(self, side: Side, function: Function) -> float:
        """Of one call on fresh gradients."""
        if side.prepare:
            side.prepare()
        returned = side.step()
        return error_of(function, returned, [p.grad for p in side.params if p.grad is not None], self.shared)


def gradient_cells(
    session: Session, profile: Profile, precision: Precision | None = None, names: Sequence[str] = tuple(FUNCTIONS)
) -> list[Row]:
    """Rows of this package and of torch for each function, named by `bench`."""
    precision = precision or Precision()
    cells = {name: cell_name(name, "-", precision.name, profile.name) for name in names}
    if session.is_over():
        session.leave_out(*cells.values())
        return []
    gc.collect()
    made = GradientSides(Problem(profile, precision, session.device))
    rows = []
    for name in names:
        if session.is_over():
            session.leave_out(cells[name])
            continue
        rows += _measure(session, made, FUNCTIONS[name])
    return rows


def _measure(session: Session, made: GradientSides, function: Function) -> list[Row]:
    problem, profile = made.problem, made.problem.profile
    rows: dict[str, Row] = {}
    sides = []
    for system in ("fused", "torch.foreach"):
        side = made.make(system, function)
        row = Row(
            function.name, "-", problem.precision.name, profile.name, profile.tensors, profile.elements, system,
            side.label, beside=session.beside or None,
        )  # fmt: skip
        rows[system] = row
        row.error = made.error(side, function)
        if row.error < tolerance(system, problem.grad_dtype):
            sides.append(side)
            continue
        row.status = f"wrong result: relative error {row.error:.2g}"
        if system == "fused":
            session.wrong.append(f"{function.name} {problem.precision.name} {profile.name}: {row.status}")
    results = interleave(sides, make_clock(session.device), session.budget, session.part()) if sides else {}
    for side in sides:
        _fill(rows[side.system], session, function, problem, results[side.system], results.get("fused"))
    return list(rows.values())


def _fill(row: Row, session: Session, function: Function, problem: Problem, timed: Timed, ours: Timed | None) -> None:
    row.take_times(timed)
    row.model_bytes = function.passes * problem.grad_dtype.itemsize
    row.gbs = row.model_bytes * row.elements / timed.device.median / 1e9
    row.copy_fraction = row.gbs / session.bandwidth.copy if session.bandwidth.copy else None
    if ours:
        ratio = paired_ratio(timed.walls, ours.walls)
        row.ratio, row.ratio_p20, row.ratio_p80 = ratio.median, ratio.p20, ratio.p80
    session.note_spread(row)
