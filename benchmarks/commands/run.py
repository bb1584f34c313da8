"""A subcommand's run: its device, the watch for noise, company, the time limit, the result and its file."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bandwidth import Bandwidth, measure_bandwidth
from ..limit import TimeUpError, disarm
from ..load import Busy, company
from ..machine import Watch, describe, last_level_cache, title
from ..measure import Session, settings
from ..report import Result, Row, say, warn
from ..systems import Options
from ..timing import Budget


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
            if issubclass(kind, Exception) and (self.rows or self.records):
                self.session.warnings.append(f"broken off by {kind.__name__}")
                self.save()
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
