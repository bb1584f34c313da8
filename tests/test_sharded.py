"""Sharded parameters (DTensor, as FSDP2 makes them) step like whole ones."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from cases import CASES

import fused

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

WORLD = 2
SHAPES = [(5, 3), (8,), (1, 4)]  # shards of unequal sizes, and an empty one


def _compare(rank: int, port: int, out: str) -> None:
    """Steps whole and sharded parameters in one of two processes; writes what differs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
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
    (Path(out) / str(rank)).write_text("\n".join(wrong))
    dist.destroy_process_group()


def _train(rank: int, port: int, out: str) -> None:
    """FSDP2 beside the same model in one piece."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
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
    wrong = [str(i) for i, (p, q) in enumerate(zip(*results, strict=True)) if not torch.allclose(p, q, atol=1e-5)]
    (Path(out) / str(rank)).write_text("\n".join(wrong))
    dist.destroy_process_group()


def _run(worker: object, out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, str(out)), nprocs=WORLD)  # type: ignore[no-untyped-call]
    assert [(out / str(rank)).read_text() for rank in range(WORLD)] == ["", ""]


@pytest.mark.slow
def test_sharded_steps_are_those_of_whole_parameters(tmp_path: Path) -> None:
    _run(_compare, tmp_path)


@pytest.mark.slow
def test_fsdp2_training(tmp_path: Path) -> None:
    _run(_train, tmp_path)
