"""Sharded parameters (DTensor, as FSDP2 makes them) step like whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import CASES
from two_processes import WORLD, in_two_processes

import fused

SHAPES = [(5, 3), (8,), (1, 4)]  # shards of unequal sizes, and an empty one


def _compare(_: Path) -> list[str]:
    """Steps whole and sharded parameters; what differs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    wrong = []
    for case in CASES:
        for backend in ("cpu", "reference"):
            torch.manual_seed(0)
            whole = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
            sharded = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
            optimizers = case.make(whole, backend=backend), case.make(sharded, backend=backend)
            for _ in range(3):
                for p, q in zip(whole, sharded, strict=True):
                    p.grad = torch.randn(p.shape)
                    q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
                for optimizer in optimizers:
                    optimizer.step()
            for p, q in zip(whole, sharded, strict=True):
                same = torch.equal(q.full_tensor(), p)
                for name, value in optimizers[1].state[q].items():
                    full = value.full_tensor() if isinstance(value, DTensor) else value
                    same = same and torch.equal(full, optimizers[0].state[p][name])
                    same = same and (name == "step" or isinstance(value, DTensor))
                if not same:
                    wrong.append(f"{case.name} {backend} {tuple(p.shape)}")
    return wrong


def _train(_: Path) -> list[int]:
    """FSDP2 beside the same model in one piece: the parameters that differ."""
    from torch.distributed.fsdp import fully_shard

    results = []
    for shard in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        if shard:
            fully_shard(net, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,)))
        optimizer = fused.AdamW(net.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            net(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.full_tensor() if shard else p for p in net.parameters()])
    return [i for i, (p, q) in enumerate(zip(*results, strict=True)) if not torch.allclose(p, q, atol=1e-5)]


@pytest.mark.slow
def test_sharded_steps_are_those_of_whole_parameters(tmp_path: Path) -> None:
    assert in_two_processes(_compare, tmp_path) == [[], []]


@pytest.mark.slow
def test_fsdp2_training(tmp_path: Path) -> None:
    assert in_two_processes(_train, tmp_path) == [[], []]
