"""Which sources the compiled kernels were made from. ``setup.py`` runs this file too: it needs nothing but Python."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def digest(root: Path) -> str:
    """Identifies the sources under ``root/csrc``, by names and contents."""
    found = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in SUFFIXES:
            found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def is_stale(built_from: str, package: Path) -> bool | None:
    """Whether the sources beside a package are other ones than it was built from; None: there are none beside it.

    Args:
        built_from: the digest that the build wrote down.
        package: the folder that was imported, in a checkout next to ``csrc``.
    """
    if not (package.parent / "csrc" / "bindings.cpp").exists():
        return None
    return digest(package.parent) != built_from
