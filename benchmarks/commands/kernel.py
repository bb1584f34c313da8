"""`kernel`: every kernel by itself, beside the measured copy of this machine.

update   one tensor, every optimizer in every storage format: what the memory system lets through
size     AdamW from a few thousand elements to many millions
gradient the norm and clipping functions over whole gradient lists, beside torch's
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cases import MAIN, Case, Precision, get_cases
from ..gradients import FUNCTIONS, gradient_cells
from ..measure import measure_cell
from ..problem import LEFT_OUT, Problem
from ..report import Progress, Row, number, percent, show_table, times, warn
from ..shapes import Profile, format_count, get_profile
from ..systems import get_systems
from .arguments import add_beside, add_run_arguments
from .run import Run

HELP = "time every kernel by itself: update by storage format, bandwidth by size, norm and clipping"
PRECISIONS = (
    Precision(),
    Precision("fp32", None, "bf16"),
    Precision("fp32", None, "int8"),
    Precision("bf16"),
    Precision("bf16", stochastic=True),
    Precision("bf16", "fp32"),
    Precision("bf16", "split"),
    Precision("bf16", "split", "bf16"),
    Precision("bf16", "split8", "int8"),
)
CPU_GRADIENTS = ("1x1", "10x1K", "1x4M", "100x32K", "1000x32K", "4000x256", "1x32M", "gpt2/4", "resnet50", "tiny")
CPU_QUICK_GRADIENTS = ("1x1", "10x1K", "1x4M", "100x32K", "1000x256")
GPU_GRADIENTS = ("1x1", "10x1K", "4000x256", "1000x32K", "gpt2", "resnet50", "tiny", "huge")
GPU_QUICK_GRADIENTS = ("1x1", "gpt2", "tiny", "1x256M")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_beside(parser)
    parser.add_argument("--opt", default="main", help="comma list of optimizers, 'main' or 'all'")
    parser.add_argument("--what", default="update,size,gradient", help="comma list of: update, size, gradient")
    parser.add_argument("--n", help="elements of the tensor in `update` (default: 32M on a CPU, 256M on a GPU)")


def _one(case: Case, n: int) -> Profile:
    """One tensor of n elements; a matrix where the optimizer wants one."""
    return Profile(f"1x{format_count(n)}", ((n // 1024, 1024),) if not case.elementwise and n >= 1024 else ((n,),))


def updates(run: Run, cases: Sequence[Case], n: int, precisions: Sequence[Precision] = PRECISIONS) -> list[Row]:
    rows = []
    with Progress("kernel: update", len(cases) * len(precisions)) as progress:
        for case in cases:
            for precision in precisions:
                progress(f"{case} {precision.name}")
                problem = Problem(_one(case, n), precision, run.device)
                rows += run.keep(measure_cell(run.session, case, problem, [], "kernel"))
    return rows


def size_exponents(gpu: bool, quick: bool) -> range:
    return range(12, (28 if gpu else 25) - (3 if quick else 0) + 1, 2 if quick else 1)


def sizes(run: Run, exponents: Sequence[int]) -> list[Row]:
    (case,) = get_cases("adamw")
    rows = []
    with Progress("kernel: size", len(exponents)) as progress:
        for exponent in exponents:
            progress(format_count(1 << exponent))
            problem = Problem(_one(case, 1 << exponent), Precision(), run.device)
            rows += run.keep(measure_cell(run.session, case, problem, get_systems("torch.fused,torch.foreach"), "size"))
    return rows


def gradients(run: Run, profiles: Sequence[Profile]) -> list[Row]:
    rows = []
    with Progress("kernel: gradient", len(profiles)) as progress:
        for profile in profiles:
            progress(profile.name)
            rows += run.keep(gradient_cells(run.session, profile))
    return sorted(rows, key=lambda r: list(FUNCTIONS).index(r.bench))


def show(title: str, rows: Sequence[Row], caption: str = "") -> None:
    columns = [
        "kernel",
        "storage",
        "shape",
        "system",
        "ms",
        "B/elem",
        "GB/s",
        "of copy",
        "of peak",
        "ours is",
        "status",
    ]
    cells = [
        [
            r.optimizer if r.optimizer != "-" else r.bench,
            r.precision,
            r.profile,
            r.label,
            number(r.device_ms),
            number(r.model_bytes),
            number(r.gbs),
            percent(r.copy_fraction),
            percent(r.peak_fraction),
            "" if r.system == "fused" else times(r.ratio),
            r.status,
        ]
        for r in rows
    ]
    show_table(title, columns, cells, caption)


def gradient_profiles(gpu: bool, quick: bool) -> list[Profile]:
    full, few = (GPU_GRADIENTS, GPU_QUICK_GRADIENTS) if gpu else (CPU_GRADIENTS, CPU_QUICK_GRADIENTS)
    return [get_profile(name) for name in (few if quick else full)]


def run(args: argparse.Namespace) -> int:
    gpu = args.device != "cpu"
    cases = get_cases(args.opt if args.opt != "main" else ",".join(MAIN))
    n = get_profile(f"1x{args.n}").elements if args.n else (1 << 28 if gpu else 1 << 25) >> (3 if args.quick else 0)
    what = {w.strip() for w in args.what.split(",")}
    exponents = size_exponents(gpu, args.quick)
    profiles = gradient_profiles(gpu, args.quick)
    cells = {"update": len(cases) * len(PRECISIONS), "size": len(exponents), "gradient": len(profiles) * len(FUNCTIONS)}
    if unknown := what - set(cells):
        raise ValueError(f"no kernels {', '.join(sorted(unknown))}: some of {', '.join(cells)}")
    run_ = Run("kernel", args)
    run_.session.planned = sum(cells[w] for w in what)
    with run_:
        if "gradient" in what:
            try:
                rows = gradients(run_, profiles)
                caption = "clip_grad_norm_: read for the norm, then read and write"
                show(run_.heading("Gradient functions, fp32"), rows, caption)
            except (*LEFT_OUT, ImportError) as error:
                warn(f"gradient functions: {error}")
        if "size" in what:
            rows = sizes(run_, exponents)
            show(run_.heading("AdamW by size, fp32"), rows)
        if "update" in what:
            rows = updates(run_, cases, n)
            heading = f"Update kernels, one tensor of {format_count(n)}, {run_.device.type}"
            show(run_.heading(heading), rows, "B/elem: the least that must move")
    return run_.exit_code
