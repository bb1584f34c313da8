"""Tensors divided between processes: which process groups hold the other parts, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups between which the elements of a DTensor are divided; () for any other tensor.

    Raises:
        RuntimeError: the parts are summands of the tensor (``Partial``), whose norm no part knows anything of.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None or not hasattr(tensor, "_local_tensor"):
        return ()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    for placement in placements:
        if placement.is_partial():
            raise RuntimeError(f"a DTensor with placements {tuple(placements)} has no norm: redistribute() it first")
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def all_reduce(values: Tensor, groups: Sequence[Any], maximum: bool) -> None:
    """Sums, or takes the largest of, ``values`` over all the groups, in place."""
    from torch import distributed

    op = distributed.ReduceOp.MAX if maximum else distributed.ReduceOp.SUM
    for group in groups:
        distributed.all_reduce(values, op=op, group=group)


@dataclass
class Shards:
    """Parameters that are divided between the same processes.

    Attributes:
        groups: the process groups.
        indices: the parameters, by position.
    """

    groups: tuple[Any, ...]
    indices: list[int]

    def all_reduce(self, rows: Tensor, maximum: bool) -> None:
        """Makes the parts' values in ``rows`` those of the whole tensors, in one collective call per group."""
        index = torch.tensor(self.indices).to(rows.device, non_blocking=True)
        values = rows.index_select(0, index)
        all_reduce(values, self.groups, maximum)
        rows.index_copy_(0, index, values)


def shards_of(params: Sequence[Tensor]) -> list[Shards]:
    """The divided ones among ``params``, by the processes that share them, in an order all processes agree on."""
    found: dict[tuple[Any, ...], Shards] = {}
    for index, param in enumerate(params):
        groups = shard_groups(param)
        if groups:
            found.setdefault(groups, Shards(groups, [])).indices.append(index)
    return list(found.values())
