"""`targets`: the package's speed and memory goals, measured here; exit code 1 when one is missed.

With --beside N the ratios (but Adafactor's) are measured twice: alone, which decides, and beside N busy processes, as
in training with a data loader.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..goals import Goal
from ..load import company
from ..problem import LEFT_OUT, NotAvailable
from ..report import Progress, number, say, show_table, warn
from .arguments import add_beside, add_run_arguments
from .run import Run

HELP = "measure the package's speed and memory goals; exit code 1 when one is missed"
PARTS = ("step", "host", "precision", "pipeline", "adafactor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_beside(parser)
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma list of parts: {', '.join(PARTS)}")
    parser.add_argument("--match", default="", help="only goals whose text holds this")


def measure(goal: Goal, run_: Run) -> tuple[float | None, str, str]:
    """Value, verdict and how it came about."""
    wrong = len(run_.session.wrong)
    value: float | None = None
    try:
        if time.perf_counter() > run_.session.deadline:
            raise NotAvailable("time limit")
        value, how = goal.measure(run_)
        verdict = "met" if goal.met(value) else "MISSED"
    except (*LEFT_OUT, ImportError) as reason:
        verdict, how = "not available", str(reason).partition("\n")[0]
    except RuntimeError as error:  # one goal's failure must not take the others
        verdict, how = "FAILED", f"{type(error).__name__}: {error}".partition("\n")[0]
        warn(f"{goal.text}: {how}")
    if len(run_.session.wrong) > wrong:
        verdict = "WRONG"
    return value, verdict, how


def measure_beside(goal: Goal, run_: Run) -> dict[str, Any]:
    """The same in company."""
    run_.keep_company()
    try:
        value, verdict, how = measure(goal, run_)
    finally:
        run_.alone()
    return {"beside": run_.beside, "beside_value": value, "beside_verdict": verdict, "beside_how": how}


def cells_of(record: dict[str, Any], beside: int) -> list[str]:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{number(value)} {record['unit']}"

    sign = "<=" if record["at_most"] else ">="
    cells = [record["goal"], f"{sign} {number(record['bound'])} {record['unit']}"]
    cells += [shown(record["value"]), record["verdict"], record["how"]]
    if beside:
        cells += [shown(record.get("beside_value")), record.get("beside_verdict", ""), record.get("beside_how", "")]
    return cells


def run(args: argparse.Namespace) -> int:
    from ..goals import cpu_goals, gpu_goals

    parts = set(getattr(args, "only", ",".join(PARTS)).split(","))
    match = getattr(args, "match", "").lower()
    goals = cpu_goals() if args.device == "cpu" else gpu_goals(args.backend)
    goals = [g for g in goals if g.part in parts and match in g.text.lower()]
    run_ = Run("targets", args, both=True)
    run_.session.planned = sum(g.cells * (2 if run_.beside and g.in_company else 1) for g in goals)
    records: list[dict[str, Any]] = run_.session.goals
    with run_:
        with Progress("targets", len(goals)) as progress:
            for goal in goals:
                progress(goal.text)
                value, verdict, how = measure(goal, run_)
                record = {
                    "goal": goal.text, "part": goal.part, "at_most": goal.at_most, "bound": goal.bound,
                    "unit": goal.unit, "value": value, "verdict": verdict, "how": how,
                }  # fmt: skip
                if run_.beside and goal.in_company:
                    record |= measure_beside(goal, run_)
                records.append(record)
        columns = ["goal", "bound", "alone" if run_.beside else "measured", "", "how"]
        if run_.beside:
            columns += [company(run_.beside), "", "how"]
        show_table("Goals", columns, [cells_of(r, run_.beside) for r in records])
        missed = sum(r["verdict"] in ("MISSED", "WRONG", "FAILED") for r in records)
        met = sum(r["verdict"] == "met" for r in records)
        say(f"{met} met, {missed} missed, {len(records) - met - missed} not available")
    return 1 if missed else run_.exit_code
