"""`list`: the optimizers, profiles, storage formats and systems, and which of them are here."""

from __future__ import annotations

import argparse

from ..cases import CASES, MAIN, Precision, held_bytes, step_bytes
from ..report import number, show_table
from ..shapes import PROFILES, get_profile
from ..systems import SYSTEMS, get_systems

HELP = "list optimizers, profiles and systems"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(_args: argparse.Namespace) -> int:
    get_systems("all")  # registers the third parties
    fp32, small = Precision(), Precision("bf16", "split8", "int8")
    optimizers = [
        [
            case.key,
            case.cls,
            "yes" if case.key in MAIN else "",
            number(held_bytes(case, fp32)),
            number(step_bytes(case, fp32)),
            number(held_bytes(case, small)),
            ", ".join(f"{k}={v}" for k, v in case.kwargs.items()),
        ]
        for case in CASES.values()
    ]
    show_table(
        "Optimizers (--opt)",
        ["key", "class", "main", "held B", "moved B", "held B, bf16+split8+int8", "hyperparameters"],
        optimizers,
        "bytes per element by the model; Adafactor's factored states count as nothing",
    )
    rows = []
    for name, (title, _) in PROFILES.items():
        profile = get_profile(name)
        rows.append([name, title, f"{profile.tensors:,}", f"{profile.elements / 1e6:,.1f}"])
    notation = "also name/8 (the 1/8 shard of every tensor) and shapes: 1000x32K, 1000x64x64"
    show_table("Profiles (--profile)", ["name", "model", "tensors", "M elements"], rows, notation)
    systems = [[s.key, s.title, s.version() if s.installed() else "not installed"] for s in SYSTEMS.values()]
    show_table("Systems (--vs)", ["name", "what", "version"], systems)
    return 0
