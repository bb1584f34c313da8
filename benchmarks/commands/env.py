"""`env`: the machine, the versions and the memory bandwidth that results will carry."""

from __future__ import annotations

import argparse

from ..machine import slug
from ..report import show_table
from .arguments import add_run_arguments
from .run import Run

HELP = "show machine, versions and measured bandwidth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    run_ = Run("env", args)
    with run_:
        machine = dict(run_.machine)
        versions = machine.pop("versions")
        if machine.get("last_level_cache"):
            machine["last_level_cache"] = f"{machine['last_level_cache'] / 2**20:g} MiB"
        rows = [[k.replace("_", " "), str(v)] for k, v in machine.items()]
        rows += [["result file", f"{slug(run_.machine)}.json"]]
        show_table("Machine", ["", "value"], rows)
        show_table("Versions", ["distribution", "version"], [[k, v] for k, v in versions.items()])
    return run_.exit_code
