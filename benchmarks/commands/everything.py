"""`all`: every benchmark in one go, with JSON, CSV and plots in a folder; --publish also into benchmarks/results."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..report import say, warn
from ..store import MachineResults

HELP = "run everything, write JSON, CSV and plots; --publish: results and README tables too"
QUICK_SECONDS = 0.12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .common import add_common

    add_common(parser)
    parser.add_argument("--skip", default="", help="comma list of commands to leave out")
    parser.add_argument("--publish", action="store_true", help="then write benchmarks/results and the README's tables")


def plan(quick: bool, gpu: bool) -> list[list[str]]:
    """The command lines, the most telling first."""
    if quick:
        return [
            ["env"],
            ["step"],
            ["pipeline"],
            ["host"],
            ["kernel", "--opt", "adamw,lion,sgd", "--n", "16M" if gpu else "1M"],
            ["memory", "--opt", "adamw,lion,sgd", "--profile", "2x1024x1024"],
            ["compare", "--opt", "adamw,lion,adafactor", "--profile", "gpt2/32"],
            ["converge"],
        ]
    return [
        ["env"],
        ["step"],
        ["step", "--dtype", "bf16", "--opt", "adamw,lion,sgd"],
        ["pipeline"],
        ["host"],
        ["kernel"],
        ["memory"],
        ["compare"],
        ["compare", "--precision", "low", "--opt", "adamw,lion,sgd", "--profile", "gpt2"],
        ["targets"],
        ["converge"],
    ]


def run(args: argparse.Namespace) -> int:
    from ..__main__ import main

    out: Path = args.out or Path("benchmark-results")
    gpu = args.device != "cpu"
    skip = set(filter(None, args.skip.split(",")))
    common = ["--device", args.device, "--out", str(out)]
    common += ["--quick"] if args.quick else []
    common += ["--threads", str(args.threads)] if args.threads else []
    common += ["--backend", args.backend] if args.backend else []
    seconds = args.seconds or (QUICK_SECONDS if args.quick else None)
    common += ["--seconds", str(seconds)] if seconds else []
    worst, start = 0, time.perf_counter()
    for line in plan(args.quick, gpu):
        if line[0] in skip:
            continue
        say(f"\n=== {' '.join(line)} (after {time.perf_counter() - start:.0f} s)")
        try:
            code = main([*line, *common])
        except (RuntimeError, ImportError, MemoryError) as error:  # one benchmark's failure must not take the others
            warn(f"{line[0]} failed: {type(error).__name__}: {error}")
            code = 1
        worst = max(worst, code)
    results = MachineResults.collect(out)
    say(f"wrote {results.save(out / 'machine')}")
    main(["plot", str(out)])
    if args.publish:
        worst = max(worst, main(["publish", str(out)]))
    say(f"everything took {time.perf_counter() - start:.0f} s")
    return worst
