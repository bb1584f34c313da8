"""`compare`: every optimizer that this package shares with another system, on every profile, beside every system that
is importable here; ends with where this package is not first, and by how much."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cases import Precision, get_cases
from ..measure import measure_cell
from ..problem import LEFT_OUT, Problem
from ..report import Progress, Row, number, say, show_table, times, warn
from .arguments import add_beside, add_run_arguments, profiles_of, systems_of
from .rows import show_rows
from .run import Run
from .step import default_profiles

HELP = "every optimizer both have, against every competitor importable here"
PRECISIONS = (Precision(), Precision("bf16"), Precision("bf16", "split", "bf16"), Precision("bf16", "split8", "int8"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_beside(parser)
    parser.add_argument("--opt", default="main", help="comma list of optimizers, 'main' or 'all'")
    parser.add_argument("--vs", default="all", help="systems to compare with")
    parser.add_argument("--profile", help="comma list of profiles")
    parser.add_argument("--shape", help="comma list of shapes")
    parser.add_argument("--n", help="shrink each profile to about this many elements")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "low", "all"], help="which storage formats")


def losses(rows: Sequence[Row], margin: float = 0.97) -> list[Row]:
    """Rows where the other system took less than `margin` of our time."""
    return [r for r in rows if r.ok and r.system != "fused" and r.ratio is not None and r.ratio < margin]


def summarize(rows: Sequence[Row]) -> None:
    """Per system and storage: how many cells, the typical and the worst ratio, and where."""
    cells = []
    for key in dict.fromkeys((r.system, r.precision) for r in rows if r.system != "fused"):
        mine = [r for r in rows if (r.system, r.precision) == key]
        timed = sorted((r for r in mine if r.ok and r.ratio), key=lambda r: r.ratio or 0)
        if timed:
            worst, middle = timed[0], timed[len(timed) // 2]
            where = f"{worst.optimizer} {worst.profile}"
            first = f"{sum((r.ratio or 0) >= 0.97 for r in timed)}/{len(timed)}"
            cells.append([key[0], key[1], timed[0].version, first, times(middle.ratio), times(worst.ratio), where])
        elif all(r.status == "not installed" for r in mine):
            cells.append([key[0], key[1], "not installed", "-", "-", "-", ""])
    columns = ["system", "storage", "version", "ours first", "median", "worst", "worst at"]
    show_table("Ours against each (time of the other / ours)", columns, cells)
    for line in verdict(rows):
        say(line)


def verdict(rows: Sequence[Row]) -> list[str]:
    """In words: where ours is first, and each place where it is not, by how much."""
    timed = [r for r in rows if r.ok and r.system != "fused" and r.ratio]
    slower = losses(timed)
    if not timed:
        return []
    if not slower:
        return [f"ours is first, within 3 %, in each of {len(timed)} comparisons"]
    lines = [f"ours is first, within 3 %, in {len(timed) - len(slower)} of {len(timed)} comparisons; not first:"]
    for row in sorted(slower, key=lambda r: r.ratio or 0):
        ours = next((r for r in rows if r.system == "fused" and r.ok and same_cell(r, row)), None)
        note = f" ({row.note})" if row.note else ""
        own = number(ours.median_ms if ours else None)
        lines.append(
            f"  {row.optimizer} {row.precision} {row.profile}: {row.label}{note} takes {number(row.median_ms)} ms, "
            f"{1 - (row.ratio or 0):.0%} less than our {own} ms"
        )
    return lines


def absent(rows: Sequence[Row]) -> str:
    """Who is not in the table and why, in one line."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.ok and row.system != "fused" and not row.status.startswith("wrong"):
            names = reasons.setdefault(row.status.removeprefix("not available: "), [])
            if row.system not in names:
                names.append(row.system)
    return "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons.items())


def same_cell(a: Row, b: Row) -> bool:
    return (a.bench, a.optimizer, a.precision, a.profile) == (b.bench, b.optimizer, b.precision, b.profile)


def run(args: argparse.Namespace) -> int:
    cases = get_cases(args.opt)
    profiles = profiles_of(args, default_profiles(args.device, False), default_profiles(args.device, True))
    systems = systems_of(args)
    precisions = {"fp32": PRECISIONS[:1], "low": PRECISIONS[1:], "all": PRECISIONS}[args.precision]
    name = "compare" if args.precision == "fp32" else f"compare-{args.precision}"
    run_ = Run("compare", args, name=name)
    run_.session.planned = len(cases) * len(profiles) * len(precisions)
    with run_, Progress("compare", run_.session.planned) as progress:
        for precision in precisions:
            for case in cases:
                rows = []
                for profile in profiles:
                    progress(f"{case} {precision.name} {profile.name}")
                    try:
                        problem = Problem(profile, precision, run_.device)
                        rows += run_.keep(measure_cell(run_.session, case, problem, systems, "compare"))
                    except LEFT_OUT as reason:
                        warn(f"{case} {profile.name}: {reason}")
                shown = [r for r in rows if r.ok or r.system == "fused" or r.status.startswith("wrong")]
                heading = run_.heading(f"{case.cls}, {precision.name}, {run_.device.type}")
                show_rows(heading, shown, absent(rows))
        summarize(run_.rows)
    return run_.exit_code
