"""Arguments and set-up that the subcommands share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bandwidth import Bandwidth, measure_bandwidth
from ..cases import Precision
from ..machine import Watch, describe, last_level_cache, title
from ..measure import Session, settings
from ..report import Result, Row, number, percent, say, show_table, times, warn
from ..shapes import Profile, get_profile, parse_count, shrink
from ..systems import Options
from ..timing import Budget


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON, CSV and plots here")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller problems: a look, not a result")
    parser.add_argument("--seconds", type=float, help="time to spend on each system of a cell")
    parser.add_argument("--limit", type=float, help="seconds after which no further cell is started")
    parser.add_argument("--name", help="name of the files in --out (default: the command's)")
    parser.add_argument("--backend", help="force a backend of this package: cuda, triton, cpu, reference")


def add_case_arguments(parser: argparse.ArgumentParser, opt: str = "main") -> None:
    parser.add_argument("--opt", default=opt, help="comma list of optimizers, 'main' or 'all' (see `list`)")
    parser.add_argument("--dtype", default="fp32", help="dtype of the parameters: fp32, bf16, fp16, fp64")
    parser.add_argument("--master", choices=["fp32", "split", "split8"], help="master_weights=")
    parser.add_argument("--state", choices=["fp32", "bf16", "fp16", "int8"], help="state_dtype=")
    parser.add_argument("--sr", action="store_true", help="stochastic_rounding=True")
    parser.add_argument("--profile", help="comma list of profiles (see `list`), name/parts for a shard")
    parser.add_argument("--shape", help="comma list of shapes, COUNTxDIMS: 1000x32K, 4000x256, 1000x64x64")
    parser.add_argument("--n", help="shrink each profile to about this many elements: 32M")


def precision_of(args: argparse.Namespace) -> Precision:
    return Precision(args.dtype, args.master, args.state, args.sr)


def profiles_of(args: argparse.Namespace, default: Sequence[str], quick: Sequence[str]) -> list[Profile]:
    """Profiles and shapes asked for, else the defaults; shrunk by --n."""
    names = [n for text in (args.profile, args.shape) if text for n in text.split(",")]
    profiles = [get_profile(n) for n in names or (quick if args.quick else default)]
    return [shrink(p, parse_count(args.n)) for p in profiles] if args.n else profiles


class Run:
    """Set-up and finish of a subcommand: device, watch for noise, bandwidth, result file.

    with Run("step", args) as run:
        run.rows += measure_cell(run.session, ...)
    return run.exit_code
    """

    def __init__(self, command: str, args: argparse.Namespace, bandwidth: bool = True, name: str | None = None) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        self.command = command
        self.name = args.name or name or command  # of the files
        self.out: Path | None = args.out
        self.device = torch.device(args.device)
        self.rows: list[Row] = []
        self.machine = describe(self.device)
        self.watch = Watch(self.device)
        measured = measure_bandwidth(self.device, args.quick) if bandwidth else Bandwidth(0.0, 0.0, None, 0)
        budget = Budget.quick() if args.quick else Budget()
        if args.seconds:
            budget = replace(budget, seconds=args.seconds)
        if self.device.type == "cuda":
            budget = replace(budget, max_rounds=60)  # each round there steps twice
        cold = 2 * last_level_cache() if getattr(args, "cold", False) else 0
        options = Options(backend=args.backend, groups=getattr(args, "groups", 1))
        self.session = Session(self.device, budget, measured, options, cold, args.quick)
        self.session.deadline = time.perf_counter() + (args.limit or float("inf"))
        self.result: Result | None = None
        self.exit_code = 0
        self.records: list[dict[str, Any]] = []  # rows that are no timings
        say(f"{title(self.machine)} · commit {self.machine['commit'] or 'unknown'}")
        if bandwidth:
            peak = f", data sheet {measured.theoretical:,.0f} GB/s" if measured.theoretical else ""
            say(f"memory measured now: copy {measured.copy:.1f} GB/s, read {measured.read:.1f} GB/s{peak}")

    def __enter__(self) -> Run:
        self.watch.__enter__()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.watch.__exit__()
        if kind is not None:
            return
        warnings = list(dict.fromkeys([*self.watch.warnings, *self.session.warnings]))
        if noisy := self.session.noisy:
            some = "; ".join(noisy[:3]) + (" ..." if len(noisy) > 3 else "")
            warnings.append(f"noisy (p20 to p80 wider than 30 %): {len(noisy)} of {self.session.cells} timings: {some}")
        if left_out := self.session.left_out:
            warnings.append(f"time limit: {left_out} cells left out")
        for text in warnings:
            warn(text)
        for text in self.session.wrong:
            warn(f"WRONG RESULT, not timed: {text}")
        if self.session.wrong:
            self.exit_code = 1
        rows = [*map(vars, self.rows), *self.records]
        self.result = Result(
            self.command, self.machine, self.session.bandwidth.as_dict(), rows, warnings, settings(self.session),
            self.session.goals,
        )  # fmt: skip
        if self.out:
            say(f"wrote {self.result.save(self.out, self.name)}")


STEP_COLUMNS = (
    "profile",
    "system",
    "median ms",
    "p20-p80",
    "host ms",
    "B/elem",
    "GB/s",
    "of copy",
    "ours is",
    "status",
)


def step_cells(row: Row) -> list[str]:
    if not row.ok:
        return [row.profile, row.label, "-", "-", "-", "-", "-", "-", "-", row.status]
    return [
        row.profile,
        row.label,
        number(row.median_ms),
        f"{number(row.p20_ms)}-{number(row.p80_ms)}",
        number(row.host_ms),
        number(row.model_bytes),
        number(row.gbs),
        percent(row.copy_fraction),
        "" if row.system == "fused" else times(row.ratio),
        row.note or "ok",
    ]


def show_rows(title_: str, rows: Sequence[Row], caption: str = "") -> None:
    show_table(title_, STEP_COLUMNS, [step_cells(r) for r in rows], caption)
