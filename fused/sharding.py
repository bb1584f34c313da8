"""Tensors divided between processes: which process groups hold the other parts, and sums over them."""

from __future__ import annotations

import math
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


def parts(tensor: Tensor) -> tuple[int, ...]:
    """Into how many parts a DTensor is divided along each dimension of its mesh; () for any other tensor."""
    if not hasattr(tensor, "_local_tensor"):
        return ()
    sharded: Any = tensor
    mesh = sharded.device_mesh
    return tuple(1 if place.is_replicate() else mesh.size(dim) for dim, place in enumerate(sharded.placements))


def largest_part(tensor: Tensor) -> int:
    """Elements of a DTensor's largest part, the same number on every process; of any other tensor: its elements."""
    sizes = list(tensor.shape)
    placements: Any = getattr(tensor, "placements", ())
    for count, place in zip(parts(tensor), placements, strict=False):
        if not place.is_replicate():
            sizes[place.dim] = -(-sizes[place.dim] // count)
    return math.prod(sizes)


def beside(tensor: Tensor, row: Tensor) -> Tensor:
    """What belongs to this process's part of a DTensor, as part of a DTensor itself: ``parts(tensor)`` such rows.

    So a checkpoint keeps every process's. ``row`` has the same length on all of them; beside a plain tensor it is
    returned as it is.
    """
    counts = parts(tensor)
    if not counts:
        return row
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sharded: Any = tensor
    placements = [Replicate() if place.is_replicate() else Shard(dim) for dim, place in enumerate(sharded.placements)]
    return DTensor.from_local(row.view(*[1] * len(counts), -1), sharded.device_mesh, placements, run_check=False)


def with_part(tensor: Tensor, part: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A DTensor divided as ``tensor`` is, of ``shape`` and ``stride``, whose part here is ``part``.

    Beside a plain tensor it is ``part`` itself.
    """
    if not hasattr(tensor, "_local_tensor"):
        return part
    from torch.distributed.tensor import DTensor

    like: Any = tensor
    size = torch.Size(shape)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=size, stride=tuple(stride)
    )


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
        index = torch.tensor(self.indices, device="cpu").to(rows.device, non_blocking=True)
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
