"""`readme`: generate the README's benchmark tables from benchmarks/results; --check: exit code 1 if they disagree.

In the README: `<!-- benchmarks: cpu-speed -->` ... `<!-- /benchmarks -->`. Names: speed, pipeline, compare, memory,
host, goals, quality, each for all machines or with cpu- or gpu- before it; plot-speedup-fp32 and so on for a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import ROOT
from ..report import say, warn
from ..store import RESULTS, published
from ..tables import MARKERS, fill

HELP = "generate the README's benchmark tables from benchmarks/results"
README = ROOT / "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where they disagree")
    parser.add_argument("--file", type=Path, default=README, help="another file with markers")


def run(args: argparse.Namespace) -> int:
    if not args.file.exists():
        warn(f"{args.file} does not exist")
        return 1
    text = args.file.read_text(encoding="utf-8")
    if not MARKERS.search(text):
        warn(f"{args.file.name} has no benchmark markers (see `python -m benchmarks readme --help`)")
        return 0
    machines = published()
    filled = fill(text, machines, RESULTS)
    if filled == text:
        say(f"{args.file.name} agrees with the results of {len(machines)} machine(s)")
        return 0
    if args.check:
        warn(f"{args.file.name} disagrees with benchmarks/results: python -m benchmarks readme")
        return 1
    args.file.write_text(filled, encoding="utf-8")
    say(f"wrote {args.file}")
    return 0
