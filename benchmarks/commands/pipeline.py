"""`pipeline`: what a training loop does after backward: unscale, check for inf and NaN, clip by the global norm, step.

torch: GradScaler.unscale_, clip_grad_norm_, GradScaler.step, GradScaler.update. This package: its GradScaler and an
optimizer with max_grad_norm, which read the gradients once for all of it. torch's way changes the gradients in place,
so every system works on its own copy, restored before each step, untimed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from ..cases import Case, get_cases
from ..measure import measure_cell
from ..problem import LEFT_OUT, NotAvailable, Problem, Side
from ..report import Progress, Row, warn
from ..systems import SYSTEMS, Options, System, torch_optimizer
from .arguments import add_beside, add_case_arguments, add_run_arguments, precision_of, profiles_of
from .rows import show_rows
from .run import Run

HELP = "time unscale + inf check + clip + step against torch's GradScaler, clip_grad_norm_ and fused step"
SCALE = 1024.0
CLIP = 1.0
PASSES, TORCH_PASSES = 2, 6  # times that an element of the gradients is read or written
CAPTION = (
    "B/elem: what the step moves, and one more read of the gradient (norm, inf check and unscale together); "
    "torch: unscale reads and writes it, the norm reads it, the clip reads and writes it"
)
CPU_SHAPES = ("1x32M", "1000x32K", "4000x256")
GPU_SHAPES = ("huge", "gpt2-xl", "gpt2", "tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_beside(parser)
    add_case_arguments(parser, opt="adamw")


def _started(scaler: Any, device: torch.device) -> Any:
    scaler.scale(torch.ones((), device=device))  # creates the scale tensor, as the first backward would
    return scaler


def torch_pipeline(form: str) -> Callable[[Case, Problem, Options], Side]:
    def build(case: Case, problem: Problem, _options: Options) -> Side:
        if form not in case.torch_forms:
            raise NotAvailable(f"no {form} {case.cls}")
        if problem.precision.param == "fp16":
            raise NotAvailable("torch's unscale_ refuses float16 gradients")
        if problem.precision.master:
            raise NotAvailable("measured without masters")
        params = problem.parameters()
        optimizer = torch_optimizer(case, params, form)
        scaler = _started(
            torch.amp.GradScaler(problem.device.type, init_scale=SCALE, growth_interval=1 << 30), problem.device
        )

        def step() -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            scaler.step(optimizer)
            scaler.update()

        side = Side(f"torch.{form}", f"torch {form}", params, step, optimizer)
        side.take_private_gradients()
        side.gradient_passes = TORCH_PASSES
        return side

    return build


def fused_pipeline(case: Case, problem: Problem, options: Options) -> Side:
    import fused

    cls = getattr(fused, case.cls, None)
    if cls is None or not hasattr(fused, "GradScaler"):
        raise NotAvailable(f"no {case.cls if cls is None else 'GradScaler'} yet")
    backend = {"backend": options.backend} if options.backend else {}
    params = problem.parameters()
    try:
        optimizer = cls(params, max_grad_norm=CLIP, **case.kwargs, **problem.precision.options(), **backend)
        scaler = _started(
            fused.GradScaler(problem.device.type, init_scale=SCALE, growth_interval=1 << 30), problem.device
        )
    except (TypeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise NotAvailable(f"{type(error).__name__}: {error}") from None

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    side = Side("fused", "fused", params, step, optimizer)
    side.take_private_gradients()
    side.gradient_passes = PASSES
    return side


PIPELINE = {"fused": fused_pipeline, **{f"torch.{form}": torch_pipeline(form) for form in ("fused", "foreach", "loop")}}


def measure_pipeline(
    run: Run, case: Case, problem: Problem, forms: tuple[str, ...] = ("fused", "foreach")
) -> list[Row]:
    problem.set_factor(SCALE)

    def build(system: System) -> Side:
        if not system.installed():
            raise NotAvailable("not installed")
        return PIPELINE[system.key](case, problem, run.session.options)

    systems = [SYSTEMS[f"torch.{form}"] for form in forms]
    return measure_cell(run.session, case, problem, systems, "pipeline", build, clip=CLIP, scale=SCALE)


def run(args: argparse.Namespace) -> int:
    cases = get_cases(args.opt)
    default = CPU_SHAPES if args.device == "cpu" else GPU_SHAPES
    quick = ("1x4M", "100x32K", "1000x256") if args.device == "cpu" else ("1x256M", "gpt2", "tiny")
    profiles = profiles_of(args, default, quick)
    precision = precision_of(args)
    run_ = Run("pipeline", args)
    run_.session.planned = len(cases) * len(profiles)
    with run_, Progress("pipeline", run_.session.planned) as progress:
        for case in cases:
            rows: list[Row] = []
            for profile in profiles:
                progress(f"{case} {profile.name}")
                try:
                    rows += run_.keep(measure_pipeline(run_, case, Problem(profile, precision, run_.device)))
                except LEFT_OUT as reason:
                    warn(f"{case} {profile.name}: {reason}")
            show_rows(run_.heading(f"unscale + clip + {case.cls}, {precision.name}"), rows, CAPTION)
    return run_.exit_code
