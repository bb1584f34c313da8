"""`all`: every benchmark in one go, with JSON, CSV and plots in a folder; --publish also into benchmarks/results."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .. import ROOT
from ..report import say, warn
from ..store import MachineResults
from .common import add_common

HELP = "run everything, write JSON, CSV and plots; --publish: results and README tables too"
QUICK_SECONDS, QUICK_LIMIT = 0.12, 240.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--skip", default="", help="comma list of commands to leave out")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="`targets` also beside N busy processes")
    parser.add_argument("--publish", action="store_true", help="then write benchmarks/results and the README's tables")


def plan(quick: bool, gpu: bool, beside: int = 0) -> list[str]:
    """The command lines, the most telling first."""
    if quick:
        return [
            "env",
            "step",
            "pipeline",
            "host",
            f"kernel --opt adamw,lion,sgd --n {'16M' if gpu else '1M'}",
            "memory --opt adamw,lion --profile 1x1024x1024",
            "compare --opt adamw,lion,adafactor --profile gpt2/32",
            "converge",
        ]
    lines = [
        "env",
        "step",
        f"targets --beside {beside}",
        "step --dtype bf16 --opt adamw,lion,sgd",
        "pipeline",
        "host",
        "kernel",
        "memory",
        "compare",
        "compare --precision low --opt adamw,lion,sgd --profile gpt2",
        "converge",
    ]
    if gpu:
        lines += [
            "step --backend triton --opt adamw,lion,adafactor --name step-triton",
            "targets --backend triton --name targets-triton",
            "step --opt adamw --profile gpt2 --vs torch.fused,torch.compile --name step-compile",
        ]
    return lines


def run(args: argparse.Namespace) -> int:
    from ..__main__ import main

    out: Path = args.out or ROOT / "benchmarks" / "out"
    skip = set(filter(None, args.skip.split(",")))
    common = ["--device", args.device, "--out", str(out)]
    for flag in ("threads", "backend"):
        if value := getattr(args, flag):
            common += [f"--{flag}", str(value)]
    if args.quick:
        common.append("--quick")
    if seconds := args.seconds or (QUICK_SECONDS if args.quick else None):
        common += ["--seconds", str(seconds)]
    limit = args.limit or (QUICK_LIMIT if args.quick else None)
    lines = [line.split() for line in plan(args.quick, args.device != "cpu", args.beside)]
    lines = [line for line in lines if line[0] not in skip]
    worst, start = 0, time.perf_counter()
    for i, line in enumerate(lines):
        spent = time.perf_counter() - start
        say(f"\n=== {' '.join(line)} (after {spent:.0f} s)")
        share = ["--limit", f"{max(1.0, (limit - spent) / (len(lines) - i) * 1.5):.0f}"] if limit else []
        try:
            code = main([*line, *common, *share])
        except (RuntimeError, ImportError, MemoryError) as error:  # one benchmark's failure must not take the others
            warn(f"{line[0]} failed: {type(error).__name__}: {error}")
            code = 1
        worst = max(worst, code)
    say(f"wrote {MachineResults.collect(out).save(out / 'machine')}")
    main(["plot", str(out)])
    if args.publish:
        worst = max(worst, main(["publish", str(out)]))
    say(f"everything took {time.perf_counter() - start:.0f} s")
    return worst
