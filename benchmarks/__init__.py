"""Benchmarks of the package: how fast every kernel is here, how near the limit, against what one would use instead.

Run from a checkout: `python -m benchmarks --help`. Nothing here is installed with the package.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _prefer_installed() -> None:
    """A checkout that was installed but not built in place has no extension in it: look for `fused` elsewhere first."""
    built = [p for p in (ROOT / "fused").glob("_C*") if p.suffix in (".so", ".pyd")]
    here = [p for p in sys.path if Path(p or ".").resolve() == ROOT]
    if here and not built:
        sys.path[:] = [p for p in sys.path if p not in here] + here


_prefer_installed()
