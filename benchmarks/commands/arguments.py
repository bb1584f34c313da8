"""Arguments that several subcommands take, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cases import Precision
from ..report import say
from ..shapes import Profile, get_profile, parse_count, shrink
from ..systems import System, get_systems


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON, CSV and plots here")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller problems: a look, not a result")
    parser.add_argument("--seconds", type=float, help="time to spend on each system of a cell")
    parser.add_argument("--limit", type=float, help="seconds after which no further cell is started")
    parser.add_argument("--name", help="name of the files in --out (default: the command's)")
    parser.add_argument("--backend", help="force a backend of this package: cuda, triton, cpu, reference")


def add_beside(parser: argparse.ArgumentParser) -> None:
    """For commands that time something."""
    text = "busy processes to run beside the measurement, as data loading would (default: 0)"
    parser.add_argument("--beside", type=int, default=0, metavar="N", help=text)


def add_case_arguments(parser: argparse.ArgumentParser, opt: str = "main") -> None:
    parser.add_argument("--opt", default=opt, help="comma list of optimizers, 'main' or 'all' (see `list`)")
    parser.add_argument("--dtype", default="fp32", help="dtype of the parameters: fp32, bf16, fp16, fp64")
    parser.add_argument("--master", choices=["fp32", "split", "split8"], help="master_weights=")
    parser.add_argument("--state", choices=["fp32", "bf16", "fp16", "int8"], help="state_dtype=")
    parser.add_argument("--sr", action="store_true", help="stochastic_rounding=True")
    parser.add_argument("--profile", help="comma list of profiles (see `list`), name/parts for a shard")
    parser.add_argument("--shape", help="comma list of shapes, COUNTxDIMS: 1000x32K, 4000x256, 1000x64x64")
    parser.add_argument("--n", help="shrink each profile to about this many elements: 32M")


def precision_of(args: argparse.Namespace) -> Precision:
    return Precision(args.dtype, args.master, args.state, args.sr)


def profiles_of(args: argparse.Namespace, default: Sequence[str], quick: Sequence[str]) -> list[Profile]:
    """Profiles and shapes asked for, else the defaults; shrunk by --n."""
    names = [n for text in (args.profile, args.shape) if text for n in text.split(",")]
    profiles = [get_profile(n) for n in names or (quick if args.quick else default)]
    return [shrink(p, parse_count(args.n)) for p in profiles] if args.n else profiles


def systems_of(args: argparse.Namespace) -> list[System]:
    """Those of --vs; a quick run has no time for those of 'all' that compile first."""
    systems = get_systems(args.vs)
    late = [s.key for s in systems if s.compiles and s.installed() and s.key not in args.vs.split(",")]
    if not args.quick or not late:
        return systems
    say(f"left out of a quick run, for they compile at their first step: {', '.join(late)} (--vs names systems)")
    return [s for s in systems if s.key not in late]
