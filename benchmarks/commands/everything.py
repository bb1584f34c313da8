"""`all`: every benchmark in one go, with JSON, CSV and plots in a folder; --publish also into benchmarks/results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Line:
    """One command line of the plan, and its part of the time beside the others'."""

    weight: float
    text: str

    @property
    def words(self) -> list[str]:
        return self.text.split()


def plan(quick: bool, gpu: bool, beside: int = 0) -> list[Line]:
    """The most telling first; weights are about the seconds each takes on two cores at --seconds 0.15."""
    if quick:
        return [
            Line(5, "env"),
            Line(40, "step"),
            Line(15, "pipeline"),
            Line(15, "host"),
            Line(30, f"kernel --opt adamw,lion,sgd --n {'16M' if gpu else '1M'}"),
            Line(10, "memory --opt adamw,lion --profile 1x1024x1024 --vs torch"),
            Line(40, "compare --opt adamw,lion,adafactor --profile gpt2/32"),
            Line(80, "converge"),
        ]
    small = "gpt2/8,tiny,1000x8K,4000x256,1x8M"  # some competitors take tens of times as long as a copy
    lines = [
        Line(5, "env"),
        Line(250, "step" if gpu else "step --profile gpt2/4,resnet50,lora,tiny,1000x32K,4000x256,1x32M"),
        Line(370 if beside else 150, f"targets --beside {beside}"),
        Line(180, f"compare --profile {'gpt2,resnet50,tiny' if gpu else small}"),
        Line(20, "pipeline"),
        Line(30, "host"),
        Line(60, "kernel" if gpu else "kernel --n 8M"),
        Line(40, "memory --profile 1x1024x1024"),
        Line(60, f"step --dtype bf16 --opt adamw,lion,sgd --profile {'gpt2,huge' if gpu else 'gpt2/4'},tiny,1000x32K"),
        Line(70, f"compare --precision low --opt adamw,lion,sgd --profile {'gpt2' if gpu else 'gpt2/8'}"),
        Line(100 if gpu else 1500, "converge"),
    ]
    if gpu:
        lines += [
            Line(40, "step --backend triton --opt adamw,lion,adafactor --name step-triton"),
            Line(40, "targets --backend triton --name targets-triton"),
            Line(20, "step --opt adamw --profile gpt2 --vs torch.fused,torch.compile --name step-compile"),
        ]
    return lines


def share_of(limit: float, lines: Sequence[Line]) -> float:
    """Seconds for the first of the lines that are left: its part, and a quarter more, for others may need less."""
    return max(1.0, 1.25 * limit * lines[0].weight / sum(line.weight for line in lines))


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
    lines = [x for x in plan(args.quick, args.device != "cpu", args.beside) if x.words[0] not in skip]
    worst, start = 0, time.perf_counter()
    for i, line in enumerate(lines):
        spent = time.perf_counter() - start
        say(f"\n=== {line.text} (after {spent:.0f} s)")
        share = ["--limit", f"{share_of(limit - spent, lines[i:]):.0f}"] if limit else []
        try:
            code = main([*line.words, *common, *share])
        except (RuntimeError, ImportError, MemoryError) as error:  # one benchmark's failure must not take the others
            warn(f"{line.words[0]} failed: {type(error).__name__}: {error}")
            code = 1
        worst = max(worst, code)
    say(f"wrote {MachineResults.collect(out).save(out / 'machine')}")
    main(["plot", str(out)])
    if args.publish:
        worst = max(worst, main(["publish", str(out)]))
    say(f"everything took {time.perf_counter() - start:.0f} s")
    return worst
