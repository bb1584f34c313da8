"""python -m benchmarks COMMAND ..."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings

COMMANDS = (
    "list", "env", "step", "pipeline", "kernel", "host", "memory", "converge", "compare", "targets", "plot", "all",
    "publish", "readme",
)  # fmt: skip
_MODULES = {"list": "listing", "all": "everything"}


def module(command: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f".commands.{_MODULES.get(command, command)}", __package__)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Benchmarks of the fused optimizers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        loaded = module(name)
        loaded.add_arguments(commands.add_parser(name, help=loaded.HELP, description=loaded.__doc__))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        return int(module(args.command).run(args))
    except ValueError as error:  # a name or number that does not exist
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
