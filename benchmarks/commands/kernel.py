"""`kernel`: every kernel by itself, beside the measured copy of this machine.

update   one tensor, every optimizer in every storage format: what the memory system lets through
size     AdamW from a few thousand elements to many millions
gradient the global norm, clipping and accumulation over whole gradient lists
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cases import MAIN, Case, Precision, get_cases
from ..measure import measure_cell
from ..problem import NotAvailable, Problem, Side, total_norm
from ..report import Progress, Row, number, percent, show_table, times, warn
from ..shapes import Profile, format_count, get_profile
from ..systems import get_systems
from ..timing import interleave, make_clock, paired_ratio
from .common import Run, add_beside, add_common

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
CLIP = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
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
                rows += measure_cell(run.session, case, Problem(_one(case, n), precision, run.device), [], "kernel")
    return rows


def sizes(run: Run, quick: bool) -> list[Row]:
    (case,) = get_cases("adamw")
    top = 28 if run.device.type == "cuda" else 25
    rows = []
    exponents = range(12, top - (3 if quick else 0) + 1, 2 if quick else 1)
    with Progress("kernel: size", len(exponents)) as progress:
        for exponent in exponents:
            progress(format_count(1 << exponent))
            problem = Problem(_one(case, 1 << exponent), Precision(), run.device)
            rows += measure_cell(run.session, case, problem, get_systems("torch.fused,torch.foreach"), "size")
    return rows


Gradient = Callable[[list[Tensor], list[Tensor]], object]


def gradient_work(name: str) -> tuple[Gradient | None, Gradient, float]:
    """This package's function, torch's, and the least times a gradient element is read or written."""
    import fused

    def ours(attribute: str) -> Callable[..., object] | None:
        return getattr(fused, attribute, None)

    if name == "total norm":
        norm = ours("get_total_norm")
        return (lambda _p, g: norm(g)) if norm else None, lambda _p, g: torch.nn.utils.get_total_norm(g), 1
    clip = ours("clip_grad_norm_")
    return (lambda p, _g: clip(p, CLIP)) if clip else None, lambda p, _g: torch.nn.utils.clip_grad_norm_(p, CLIP), 3


def gradient(run: Run, profiles: Sequence[Profile], dtype: str = "fp32") -> list[Row]:
    """The norm and the clipping alone. Both sides: private gradients, restored before each call, checked once."""
    rows = []
    with Progress("kernel: gradient", 2 * len(profiles)) as progress:
        for name in ("total norm", "clip_grad_norm_"):
            for profile in profiles:
                progress(f"{name} {profile.name}")
                rows += gradient_cell(run, name, profile, Precision(dtype))
    return rows


def gradient_cell(run: Run, name: str, profile: Profile, precision: Precision) -> list[Row]:
    if time.perf_counter() > run.session.deadline:
        run.session.left_out += 1
        return []
    problem = Problem(profile, precision, run.device)
    want = total_norm(problem.gradients())
    ours, torchs, passes = gradient_work(name)
    rows: dict[str, Row] = {}
    sides = []
    for key, label, work in (("fused", "fused", ours), ("torch.foreach", "torch", torchs)):
        row = Row(name, "-", precision.name, profile.name, profile.tensors, profile.elements, key, label)
        row.beside = run.session.beside or None
        rows[key] = row
        if work is None:
            row.status = "not available: not there yet"
            continue
        side = gradient_side(key, label, problem, work, copies=name != "total norm")
        if side.prepare:
            side.prepare()
        got = float(side.step())
        row.error = abs(got - want) / want if want else abs(got)
        if name != "total norm":
            clipped = total_norm([p.grad for p in side.params if p.grad is not None])
            row.error = max(row.error, abs(clipped - min(CLIP, want)) / CLIP)
        allowed = 1e-5 if key == "fused" else 1e-2  # torch sums in the gradients' dtype
        if not row.error < allowed:
            row.status = f"wrong result: relative error {row.error:.2g}"
            if key == "fused":
                run.session.wrong.append(f"{name} {precision.name} {profile.name}: relative error {row.error:.2g}")
            continue
        sides.append(side)
    results = interleave(sides, make_clock(run.device), run.session.budget) if sides else {}
    for side in sides:
        row, timed = rows[side.system], results[side.system]
        wall = timed.wall
        row.rounds, row.median_ms, row.p20_ms, row.p80_ms = (
            wall.rounds,
            1e3 * wall.median,
            1e3 * wall.p20,
            1e3 * wall.p80,
        )
        row.host_ms, row.device_ms = 1e3 * timed.host.median, 1e3 * timed.device.median
        row.model_bytes = passes * problem.grad_dtype.itemsize
        row.gbs = row.model_bytes * profile.elements / timed.device.median / 1e9
        row.copy_fraction = row.gbs / run.session.bandwidth.copy if run.session.bandwidth.copy else None
        if "fused" in results:
            row.ratio = paired_ratio(timed.walls, results["fused"].walls).median
    return list(rows.values())


def gradient_side(key: str, label: str, problem: Problem, work: Gradient, copies: bool) -> Side:
    params = problem.parameters()
    grads: list[Tensor] = []
    side = Side(key, label, params, lambda: work(params, grads))
    if copies:
        side.take_private_gradients()
    grads += [p.grad for p in params if p.grad is not None]
    return side


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


def run(args: argparse.Namespace) -> int:
    gpu = args.device != "cpu"
    cases = get_cases(args.opt if args.opt != "main" else ",".join(MAIN))
    n = get_profile(f"1x{args.n}").elements if args.n else (1 << 28 if gpu else 1 << 25) >> (3 if args.quick else 0)
    what = {w.strip() for w in args.what.split(",")}
    run_ = Run("kernel", args)
    with run_:
        if "update" in what:
            rows = updates(run_, cases, n)
            run_.rows += rows
            show(
                run_.heading(f"Update kernels, one tensor of {format_count(n)}, {run_.device.type}"),
                rows,
                "B/elem: the least that must move",
            )
        if "size" in what:
            rows = sizes(run_, args.quick)
            run_.rows += rows
            show(run_.heading("AdamW by size, fp32"), rows)
        if "gradient" in what:
            names = ("huge", "gpt2", "tiny") if gpu else ("1x32M", "1000x32K", "4000x256")
            small = ("1x256M", "gpt2", "tiny") if gpu else ("1x4M", "100x32K", "1000x256")
            try:
                rows = gradient(run_, [get_profile(p) for p in (small if args.quick else names)])
                run_.rows += rows
                show(run_.heading("Gradient kernels, fp32"), rows, "clip: read for the norm, then read and write")
            except (ImportError, NotAvailable, MemoryError) as error:
                warn(f"gradient kernels: {error}")
    return run_.exit_code
