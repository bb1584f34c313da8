"""`readme`: generate the benchmark tables in README.md and benchmarks/README.md from benchmarks/results; --check: exit
code 1 if they disagree.

In a file: `<!-- benchmarks: cpu-speed -->` ... `<!-- /benchmarks -->`. Names: speed, pipeline, clip, compare,
memory, host, goals, quality, decay, each for all machines or with cpu- or gpu- before it; plot-speedup-fp32 and so on
for a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import ROOT
from ..report import say, warn
from ..store import RESULTS, published
from ..tables import MARKERS, fill

HELP = "generate the tables in README.md and benchmarks/README.md from benchmarks/results"
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where they disagree")
    parser.add_argument("files", type=Path, nargs="*", help="other files with markers")


def update(path: Path, check: bool) -> bool:
    """Whether the file agreed, or agrees now."""
    text = path.read_text(encoding="utf-8")
    filled = fill(text, published(), RESULTS, path.resolve().parent)
    if not MARKERS.search(text):
        say(f"{path.name}: no benchmark markers")
    elif filled == text:
        say(f"{path.name}: agrees with the results")
    elif check:
        warn(f"{path} disagrees with benchmarks/results: python -m benchmarks readme")
        return False
    else:
        path.write_text(filled, encoding="utf-8")
        say(f"wrote {path}")
    return True


def run(args: argparse.Namespace) -> int:
    agreed = [update(path, args.check) for path in args.files or FILES if path.exists()]
    return 0 if all(agreed) else 1
