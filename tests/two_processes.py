"""Work done by two processes of one Gloo group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

dist = pytest.importorskip("torch.distributed")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without Gloo", allow_module_level=True)

WORLD = 2


def in_two_processes(work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What ``work(folder)``, a module's function, returned in each; its exceptions are raised here."""
    mp.spawn(_member, (work, folder), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _member(rank: int, work: Callable[[Path], Any], folder: Path) -> None:
    # A file and not a port: another process could take a port between its choice and its use.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    torch.save(work(folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Sharded modules keep Gloo's threads alive, which may still hold tensors; one that drops them while Python shuts
    # down ends the process with SIGABRT. The work is done and written: leave without that shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
