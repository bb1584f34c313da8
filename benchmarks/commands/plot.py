"""`plot`: draw every picture that the result files in a folder have data for."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..plots import draw
from ..report import say
from ..store import MachineResults

HELP = "draw PNGs from the JSON files in a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, nargs="?", help="a folder with JSON files of the commands")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to draw (default: the same folder)")


def run(args: argparse.Namespace) -> int:
    directory: Path | None = args.directory or args.out
    if directory is None:
        raise ValueError("which folder? python -m benchmarks plot DIR")
    for path in draw(MachineResults.collect(directory), args.out or directory):
        say(f"wrote {path}")
    return 0
