"""`targets`: the package's speed and memory goals, measured here; exit code 1 when one is missed."""

from __future__ import annotations

import argparse

from ..problem import NotAvailable
from ..report import Progress, number, say, show_table
from .common import Run, add_common

HELP = "measure the package's speed and memory goals; exit code 1 when one is missed"
PARTS = ("step", "host", "precision", "pipeline", "adafactor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma list of parts: {', '.join(PARTS)}")
    parser.add_argument("--match", default="", help="only goals whose text holds this")


def run(args: argparse.Namespace) -> int:
    from ..goals import cpu_goals, gpu_goals

    parts = set(getattr(args, "only", ",".join(PARTS)).split(","))
    match = getattr(args, "match", "").lower()
    goals = cpu_goals() if args.device == "cpu" else gpu_goals(args.backend)
    goals = [g for g in goals if g.part in parts and match in g.text.lower()]
    run_ = Run("targets", args)
    cells, records, missed = [], [], 0
    with run_:
        with Progress("targets", len(goals)) as progress:
            for goal in goals:
                progress(goal.text)
                wrong = len(run_.session.wrong)
                value: float | None = None
                try:
                    value, how = goal.measure(run_)
                    verdict = "met" if goal.met(value) else "MISSED"
                except (NotAvailable, MemoryError, ImportError) as reason:
                    verdict, how = "not available", str(reason)
                if len(run_.session.wrong) > wrong:
                    verdict = "WRONG"
                missed += verdict in ("MISSED", "WRONG")
                sign = "<=" if goal.at_most else ">="
                measured = "-" if value is None else f"{number(value)} {goal.unit}"
                cells.append([goal.text, f"{sign} {number(goal.bound)} {goal.unit}", measured, verdict, how])
                records.append(
                    {"goal": goal.text, "part": goal.part, "at_most": goal.at_most, "bound": goal.bound,
                     "unit": goal.unit, "value": value, "verdict": verdict, "how": how}
                )  # fmt: skip
        show_table("Goals", ["goal", "bound", "measured", "", "how"], cells)
        run_.session.goals = records
        met = sum(r["verdict"] == "met" for r in records)
        say(f"{met} met, {missed} missed, {len(records) - met - missed} not available")
    return 1 if missed else run_.exit_code
