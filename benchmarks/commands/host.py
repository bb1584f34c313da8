"""`host`: python and launch time of a step against the number of tensors, all so small that nothing else is left.

"fresh" replaces every gradient tensor between steps, as `zero_grad(set_to_none=True)` and backward do.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..cases import get_cases
from ..measure import measure_cell
from ..problem import Problem, Side
from ..report import Progress, Row, number, show_table, times
from ..shapes import get_profile
from ..systems import SYSTEMS, System
from .arguments import add_beside, add_case_arguments, add_run_arguments, precision_of, systems_of
from .run import Run

HELP = "time the host side of a step against the number of tensors"
COUNTS = (1, 10, 100, 1000, 10_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_beside(parser)
    add_case_arguments(parser, opt="adamw")
    parser.add_argument("--vs", default="torch", help="systems to run beside")
    parser.add_argument("--groups", type=int, default=1, help="parameter groups to split the parameters into")


def _swap_gradients(side: Side) -> Callable[[], None]:
    """Two sets of private gradient tensors that take turns, with the shared values in them."""
    params = [p for p in (*side.params, *side.extra) if p.grad is not None]
    shared = [p.grad for p in params if p.grad is not None]
    turns = itertools.cycle([[g.clone() for g in shared], [g.clone() for g in shared]])

    def swap() -> None:
        grads = next(turns)
        torch._foreach_copy_(grads, shared)
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    return swap


def kernel_seconds(step: Callable[[], object], rounds: int = 30) -> float | None:
    """Median time inside the compiled CPU kernels during one step of this package; None without them."""
    try:
        extension: Any = importlib.import_module("fused._C")
    except ImportError:
        return None
    spent = 0.0

    def timed(kernel: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal spent
            start = time.perf_counter()
            try:
                return kernel(*args)
            finally:
                spent += time.perf_counter() - start

        return call

    originals = {name: getattr(extension, name) for name in dir(extension) if name.endswith("_cpu")}
    samples = []
    try:
        for name, kernel in originals.items():
            setattr(extension, name, timed(kernel))
        for _ in range(rounds):
            spent = 0.0
            step()
            samples.append(spent)
    finally:
        for name, kernel in originals.items():
            setattr(extension, name, kernel)
    return statistics.median(samples)


def measure_host(
    run: Run, case_key: str, count: int, systems: list[System], fresh: bool, args: argparse.Namespace
) -> list[Row]:
    (case,) = get_cases(case_key)
    problem = Problem(get_profile(f"{count}x1"), precision_of(args), run.device)

    def build(system: System) -> Side:
        side = system.make(case, problem, run.session.options)
        if fresh:
            side.prepare = _swap_gradients(side)
        return side

    rows = measure_cell(run.session, case, problem, systems, "host fresh" if fresh else "host", build)
    if run.device.type == "cpu":
        for row in rows:
            row.device_ms = None  # a clock outside cannot tell it from the host's
        if rows and rows[0].ok:
            seconds = kernel_seconds(SYSTEMS["fused"].make(case, problem, run.session.options).step)
            rows[0].device_ms = None if seconds is None else 1e3 * seconds
    return rows


def run(args: argparse.Namespace) -> int:
    cases = get_cases(args.opt)
    systems = systems_of(args)
    counts = COUNTS[:-1] if args.quick else COUNTS
    run_ = Run("host", args)
    run_.session.planned = len(cases) * len(counts) * 2
    with run_, Progress("host", run_.session.planned) as progress:
        for case in cases:
            rows = []
            for count in counts:
                for fresh in (False, True):
                    progress(f"{case} {count} tensors{' fresh' if fresh else ''}")
                    rows += run_.keep(measure_host(run_, case.key, count, systems, fresh, args))
            cells = [
                [
                    f"{r.tensors:,}",
                    "fresh" if r.bench.endswith("fresh") else "same",
                    r.label,
                    number(1e3 * r.host_ms) if r.host_ms else "-",
                    number(1e3 * r.host_ms / r.tensors) if r.host_ms else "-",
                    number(1e3 * r.device_ms) if r.device_ms else "-",
                    "" if r.system == "fused" else times(r.ratio),
                    r.status,
                ]
                for r in rows
            ]
            columns = [
                "tensors",
                "gradients",
                "system",
                "us per step",
                "us per tensor",
                "in kernels",
                "ours is",
                "status",
            ]
            title = run_.heading(f"Host time of {case.cls}, tensors of one element, {run_.device.type}")
            show_table(title, columns, cells)
    return run_.exit_code
