"""`step`: one optimizer step over whole models, beside what one would use instead."""

from __future__ import annotations

import argparse

from ..cases import MASTER_BYTES, Case, Precision, get_cases, held_bytes, step_bytes
from ..measure import measure_cell
from ..problem import LEFT_OUT, Problem
from ..report import Progress, number, warn
from .arguments import add_beside, add_case_arguments, add_run_arguments, precision_of, profiles_of, systems_of
from .rows import show_rows
from .run import Run

HELP = "time optimizer steps over real models' parameter lists or any shapes"
CPU_PROFILES = ("gpt2", "resnet50", "lora", "tiny", "1000x32K", "4000x256", "1x32M")
CPU_QUICK = ("gpt2/16", "4000x256", "1000x4K")
GPU_PROFILES = ("gpt2", "gpt2-xl", "llama3-8b/8", "resnet50", "vit-l", "lora", "tiny", "huge")
GPU_QUICK = ("gpt2", "tiny", "1x256M")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_beside(parser)
    add_case_arguments(parser)
    parser.add_argument(
        "--vs", default="torch", help="comma list of systems to run beside (see `list`), torch, all, none"
    )
    parser.add_argument("--groups", type=int, default=1, help="parameter groups to split the parameters into")
    parser.add_argument("--cold", action="store_true", help="CPU: evict the caches before each step")
    parser.add_argument(
        "--targets", action="store_true", help="instead: check the package's speed goals (see `targets`)"
    )


def bytes_line(case: Case, precision: Precision) -> str:
    """The bytes model in one line."""
    master = MASTER_BYTES[precision.master]
    parts = [f"parameter {precision.dtype.itemsize}"]
    if master:
        parts.append(f"master {number(master)}")
    if case.moments:
        parts.append(f"{len(case.moments)} x state {number(precision.state_bytes)}")
    held = number(held_bytes(case, precision))
    total = number(step_bytes(case, precision))
    return (
        f"bytes per element: held {held} ({' + '.join(parts)}); a step moves at least {total} "
        f"(held, read and written, + gradient {precision.dtype.itemsize})"
    )


def default_profiles(device: str, quick: bool) -> tuple[str, ...]:
    if device == "cpu":
        return CPU_QUICK if quick else CPU_PROFILES
    return GPU_QUICK if quick else GPU_PROFILES


def run(args: argparse.Namespace) -> int:
    if args.targets:
        from . import targets

        return targets.run(args)
    cases = get_cases(args.opt)
    precision = precision_of(args)
    profiles = profiles_of(args, default_profiles(args.device, False), default_profiles(args.device, True))
    systems = systems_of(args)
    groups = f"-{args.groups}-groups" if args.groups > 1 else ""
    name = "step" + ("" if precision == Precision() else f"-{precision.file_name}") + groups
    run_ = Run("step", args, name=name)
    run_.session.planned = len(cases) * len(profiles)
    with run_, Progress("step", run_.session.planned) as progress:
        for case in cases:
            rows = []
            for profile in profiles:
                progress(f"{case} {profile.name}")
                try:
                    problem = Problem(profile, precision, run_.device)
                    rows += run_.keep(measure_cell(run_.session, case, problem, systems))
                except LEFT_OUT as reason:
                    warn(f"{case} {profile.name}: {reason}")
            note = f", {args.groups} groups" if args.groups > 1 else ""
            heading = f"{case.cls} ({case}), {precision.name}{note}, {run_.device.type}"
            show_rows(run_.heading(heading), rows, bytes_line(case, precision))
    return run_.exit_code
