"""``python -m fused``: look at the installation, or watch it train something."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fused
from fused import info
from fused.demo import command as demo


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused", description="Fused optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fused-optim {fused.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="{info,demo}")

    info_parser = commands.add_parser(
        "info",
        help="versions, devices, and which backends are available here",
        description="Says what is installed, what it can use on this machine, and what it cannot and why.",
    )
    info.add_arguments(info_parser)
    info_parser.set_defaults(run=info.run)

    demo_parser = commands.add_parser(
        "demo",
        help="train a small GPT with torch.optim and with fused, side by side",
        description=demo.__doc__,
    )
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)

    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
