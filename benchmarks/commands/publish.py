"""`publish`: take the results in a folder into benchmarks/results (JSON and plots) and bring the README up to date.

What was published of the same machine and is not in the folder stays, with its own commit and date: a convergence run
need not be repeated with every timing, and what a time limit leaves out is not lost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..plots import draw
from ..report import say, warn
from ..store import RESULTS, MachineResults
from . import readme

HELP = "copy a folder's results into benchmarks/results, with plots, and update the README"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="a folder with JSON files of the commands")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    results = MachineResults.collect(args.directory)
    earlier = args.results / f"{results.slug}.json"
    if earlier.exists():
        results = results.with_earlier(MachineResults.load(earlier))
    if any(s.settings.get("quick") for s in results.sections.values()):
        warn("these results come from --quick runs: a look, not something to publish")
    say(f"wrote {results.save(args.results)}")
    for path in draw(results, args.results / results.slug):
        say(f"wrote {path}")
    return readme.run(argparse.Namespace(check=False, files=[]))
