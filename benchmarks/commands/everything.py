"""`all`: every benchmark in one go, with JSON, CSV and plots in a folder; --publish also into benchmarks/results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import ROOT
from ..limit import TimeUpError, broken_off_after
from ..report import say, warn
from ..store import MachineResults
from .arguments import add_run_arguments

HELP = "run everything, write JSON, CSV and plots; --publish: results and README tables too"
QUICK_SECONDS, QUICK_LIMIT = 0.1, 240.0
OVERRUN = 20.0  # seconds that a line may go on after the limit, before it is broken off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
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
            Line(30, f"kernel --opt adamw,lion,sgd --n {'16M' if gpu else '4M'}"),
            Line(15, "memory --opt adamw,lion --profile 1x1024x1024"),
            Line(30, "compare --opt adamw,lion,adafactor --profile gpt2/32"),
            Line(50, "converge"),
        ]
    return (_gpu_plan if gpu else _cpu_plan)(beside)


def _cpu_plan(beside: int) -> list[Line]:
    return [
        Line(5, "env"),
        Line(420, "compare --profile gpt2/4,resnet50,lora/2,1000x32K,4000x256,1x32M"),
        Line(30, "pipeline"),
        Line(55, "host"),
        Line(105, "kernel --opt adamw,lion,sgd,adafactor --n 8M"),
        Line(60, "memory --profile 1x1024x1024"),
        Line(330 if beside else 170, f"targets --beside {beside}"),
        Line(60, "step --profile tiny"),  # for whose many tensors some competitors take seconds
        Line(50, "step --dtype bf16 --opt adamw,lion,sgd --profile gpt2/4,1000x32K"),
        Line(60, "compare --precision low --opt adamw,lion,sgd --profile gpt2/8"),
        Line(1500, "converge"),
    ]


def _gpu_plan(beside: int) -> list[Line]:
    return [
        Line(5, "env"),
        Line(370 if beside else 150, f"targets --beside {beside}"),
        Line(250, "step"),
        Line(180, "compare --profile gpt2,resnet50,tiny"),
        Line(20, "pipeline"),
        Line(30, "host"),
        Line(60, "kernel"),
        Line(40, "memory --profile 1x1024x1024"),
        Line(60, "step --dtype bf16 --opt adamw,lion,sgd --profile gpt2,huge,tiny,1000x32K"),
        Line(70, "compare --precision low --opt adamw,lion,sgd --profile gpt2"),
        Line(100, "converge"),
        Line(40, "step --backend triton --opt adamw,lion,adafactor --name step-triton"),
        Line(40, "targets --backend triton --name targets-triton"),
        Line(20, "step --opt adamw --profile gpt2 --vs torch.fused,torch.compile --name step-compile"),
    ]


def share_of(limit: float, lines: Sequence[Line]) -> float:
    """Seconds for the first of the lines that are left: its part, and a quarter more, for others may need less."""
    return max(1.0, 1.25 * limit * lines[0].weight / sum(line.weight for line in lines))


def run_line(line: Line, arguments: Sequence[str], share: float | None, end: float) -> int:
    """One line of the plan, for `share` seconds; broken off where it takes twice as long, or goes on after `end`."""
    from ..__main__ import main

    share_arguments = [] if share is None else ["--limit", f"{share:.0f}"]
    left = end - time.perf_counter()
    try:
        if share is None:
            return main([*line.words, *arguments])
        with broken_off_after(min(2 * share + OVERRUN, left)):
            return main([*line.words, *arguments, *share_arguments])
    except TimeUpError:
        warn(f"{line.text}: broken off by the time limit")
        return 0
    except (RuntimeError, ImportError, MemoryError) as error:  # one benchmark's failure must not take the others
        warn(f"{line.words[0]} failed: {type(error).__name__}: {error}")
        return 1


def run(args: argparse.Namespace) -> int:
    from ..__main__ import main

    out: Path = args.out or ROOT / "benchmarks" / "out"
    skip = set(filter(None, args.skip.split(",")))
    arguments = ["--device", args.device, "--out", str(out)]
    for flag in ("threads", "backend"):
        if value := getattr(args, flag):
            arguments += [f"--{flag}", str(value)]
    if args.quick:
        arguments.append("--quick")
    if seconds := args.seconds or (QUICK_SECONDS if args.quick else None):
        arguments += ["--seconds", str(seconds)]
    limit = args.limit or (QUICK_LIMIT if args.quick else None)
    lines = [x for x in plan(args.quick, args.device != "cpu", args.beside) if x.words[0] not in skip]
    worst, start = 0, time.perf_counter()
    for i, line in enumerate(lines):
        spent = time.perf_counter() - start
        if limit and spent > limit:
            warn(f"time limit of {limit:g} s: left out: {'; '.join(x.text for x in lines[i:])}")
            break
        say(f"\n=== {line.text} (after {spent:.0f} s)")
        share = share_of(limit - spent, lines[i:]) if limit else None
        worst = max(worst, run_line(line, arguments, share, start + (limit or 0.0) + OVERRUN))
    say(f"wrote {MachineResults.collect(out).save(out / 'machine')}")
    try:
        main(["plot", str(out)])
        if args.publish:
            worst = max(worst, main(["publish", str(out)]))
    except ImportError as error:  # what was measured is written; it can be drawn and published elsewhere
        warn(f"no plots, and nothing is published: {error}")
    say(f"everything took {time.perf_counter() - start:.0f} s")
    return worst
