"""Real text that every machine has: the source code of Python's own standard library.

The files are chosen and split by name alone, so every machine with the same Python version gets the same bytes, and
no file is in both splits. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256  # bytes

# Directories that are not the library's own code, that only some installations have, or that are generated tables.
_SKIPPED_DIRECTORIES = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip
_SMALLEST_USEFUL_CORPUS = 200_000  # bytes


class CorpusError(RuntimeError):
    """This Python installation does not carry enough of its own source."""


@dataclass(frozen=True)
class Corpus:
    """Two one-dimensional uint8 tensors, and where they came from."""

    train: Tensor
    validation: Tensor
    files: int
    sha256: str
    source: str


def standard_library(root: Path | None = None) -> Corpus:
    """Read the standard library's ``.py`` files; about one in ten, chosen by name, is held out for validation."""
    root = root or Path(sysconfig.get_path("stdlib"))
    splits: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in _source_files(root):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes() + b"\n"
        held_out = hashlib.sha256(name.encode()).digest()[0] < 26  # 26 of 256
        splits[held_out].append(content)
        digest.update(name.encode() + b"\0" + content)
    train, validation = b"".join(splits[False]), b"".join(splits[True])
    if min(len(train), 10 * len(validation)) < _SMALLEST_USEFUL_CORPUS:
        raise CorpusError(f"found only {len(train) + len(validation):,} bytes of Python source under {root}")
    return Corpus(
        train=torch.frombuffer(bytearray(train), dtype=torch.uint8),
        validation=torch.frombuffer(bytearray(validation), dtype=torch.uint8),
        files=len(splits[True]) + len(splits[False]),
        sha256=digest.hexdigest(),
        source=f"Python {sysconfig.get_python_version()} standard library",
    )


def _source_files(root: Path) -> list[Path]:
    """Every usable ``.py`` file below ``root``, in an order that does not depend on the file system."""

    def wanted(path: Path) -> bool:
        directories = path.relative_to(root).parts[:-1]
        generated = path.name.startswith("_sysconfigdata")
        return not generated and _SKIPPED_DIRECTORIES.isdisjoint(directories)

    return sorted(filter(wanted, root.rglob("*.py")), key=lambda path: path.relative_to(root).as_posix())


def random_batches(data: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets) pairs of shape (batch, context): the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(data.numel() - context, (batch,), generator=generator)
        yield _windows(data, starts, context)


def even_batches(data: Tensor, batch: int, context: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A fixed number of (inputs, targets) pairs, spread evenly over the data: for validation."""
    starts = torch.linspace(0, data.numel() - context - 1, batch * batches, dtype=torch.float64).long()
    for chunk in starts.split(batch):
        yield _windows(data, chunk, context)


def _windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = data[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
