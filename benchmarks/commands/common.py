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
from ..limit import TimeUpError, disarm
from ..load import Busy, company
from ..machine import Watch, describe, last_level_cache, title
from ..measure import Session, settings
from ..report import Result, Row, number, percent, say, show_table, times, warn
from ..shapes import Profile, get_profile, parse_count, shrink
from ..systems import Options, System, get_systems
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


def add_beside(parser: argparse.ArgumentParser) -> None:
    """For commands that time something."""
    text = "busy processes to run beside the measurement, as data loading would (default: 0)"
    parser.add_argument("--beside", type=int, default=0, metavar="N", help=text)


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


def systems_of(args: argparse.Namespace) -> list[System]:
    """Those of --vs; a quick run has no time for those of 'all' that compile first."""
    systems = get_systems(args.vs)
    late = [s.key for s in systems if s.compiles and s.installed() and s.key not in args.vs.split(",")]
    if not args.quick or not late:
        return systems
    say(f"left out of a quick run, for they compile at their first step: {', '.join(late)} (--vs names systems)")
    return [s for s in systems if s.key not in late]


class Run:
    """Set-up and finish of a subcommand: device, watch for noise, company (--beside), bandwidth, result file.

    with Run("step", args) as run:
        run.rows += measure_cell(run.session, ...)
    return run.exit_code
    """

    def __init__(
        self, command: str, args: argparse.Namespace, timed: bool = True, name: str | None = None, both: bool = False
    ) -> None:
        """`timed`: whether speed is measured; `both`: alone and in company, as the command says with `keep_company`."""
        self.command = command
        self._both = both
        self.timed = timed
        self.beside = getattr(args, "beside", 0)
        load = f"-beside-{self.beside}" if self.beside and not both else ""
        self.name = args.name or (name or command) + load  # of the files
        self.out: Path | None = args.out
        self.device = torch.device(args.device)
        self.rows: list[Row] = []
        untimed = {} if timed else {"threads": torch.get_num_threads()}  # --threads makes no other machine of it then
        if args.threads:
            torch.set_num_threads(args.threads)
        self.machine = describe(self.device) | untimed
        self.watch = Watch(self.device)
        measured = measure_bandwidth(self.device, args.quick) if timed else Bandwidth(0.0, 0.0, None, 0)
        budget = Budget.quick() if args.quick else Budget()
        if args.seconds:
            budget = replace(budget, seconds=args.seconds)
        if self.device.type == "cuda":
            budget = replace(budget, max_rounds=60)  # each round there steps twice
        cold = 2 * last_level_cache() if getattr(args, "cold", False) else 0
        options = Options(backend=args.backend, groups=getattr(args, "groups", 1))
        self.session = Session(self.device, budget, measured, options, cold, args.quick)
        self._busy = Busy(self.beside)
        self.session.deadline = time.perf_counter() + (args.limit or float("inf"))
        self.result: Result | None = None
        self.exit_code = 0
        self.records: list[dict[str, Any]] = []  # rows that are no timings
        say(f"{title(self.machine)} · commit {self.machine['commit'] or 'unknown'}")
        if timed:
            peak = f", data sheet {measured.theoretical:,.0f} GB/s" if measured.theoretical else ""
            alone = " (alone)" if self.beside else ""
            say(f"memory measured now: copy {measured.copy:.1f} GB/s, read {measured.read:.1f} GB/s{peak}{alone}")

    def __enter__(self) -> Run:
        self.watch.__enter__()
        if not self._both:
            self.keep_company()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """Says and saves what was measured, also where the time was up in the middle of it."""
        broken_off = kind is not None and issubclass(kind, TimeUpError)
        if broken_off:
            disarm()
        self.alone()
        self.watch.__exit__()
        if kind is not None and not broken_off:
            return False
        if broken_off:
            self.session.warnings.append("broken off by the time limit")
        for text in self._warnings():
            warn(text)
        for text in self.session.wrong:
            warn(f"WRONG RESULT, not timed: {text}")
        if self.session.wrong:
            self.exit_code = 1
        self.save()
        if self.result and self.out:
            say(f"wrote {self.out / self.name}.json")
        return broken_off

    def keep(self, rows: list[Row]) -> list[Row]:
        """The rows, from now on part of the result."""
        self.rows += rows
        return rows

    def keep_company(self) -> None:
        """From here on --beside's processes run, and rows say so."""
        self._busy.__enter__()
        self.session.beside = self.beside

    def alone(self) -> None:
        self._busy.__exit__()
        self.session.beside = 0

    def heading(self, text: str) -> str:
        """With the load it was measured under, if any."""
        return ", ".join(filter(None, [text, company(self.beside)]))

    def _warnings(self) -> list[str]:
        warnings = list(dict.fromkeys([*(self.watch.warnings if self.timed else []), *self.session.warnings]))
        if noisy := self.session.noisy:
            some = "; ".join(noisy[:3]) + (" ..." if len(noisy) > 3 else "")
            warnings.append(f"noisy (p20 to p80 wider than 30 %): {len(noisy)} of {self.session.cells} timings: {some}")
        if left_out := self.session.left_out:
            some = ", ".join(left_out[:6]) + (", ..." if len(left_out) > 6 else "")
            warnings.append(f"time limit: {len(left_out)} cells left out: {some}")
        return warnings

    def save(self) -> None:
        """What there is so far as a result, written where --out asks for it."""
        rows = [*map(vars, self.rows), *self.records]
        session = self.session
        conditions = settings(session) | {
            "beside": self.beside, "threads": torch.get_num_threads(), "commit": self.machine["commit"]
        }  # fmt: skip
        if session.left_out:
            conditions["left_out"] = session.left_out
        self.result = Result(
            self.command, self.machine, session.bandwidth.as_dict(), rows, self._warnings(), conditions, session.goals
        )
        if self.out:
            self.result.save(self.out, self.name)


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
