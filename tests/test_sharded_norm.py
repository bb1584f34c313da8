"""The global norm over DTensor shards, in two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import dist, in_two_processes

import fused

pytestmark = pytest.mark.slow

SHAPES = ((8, 3), (5, 4), (6,), (1, 2))  # 5 and 1 rows do not divide evenly


def full_values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def measure(_: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    placements = [Shard(0), Shard(0), Replicate(), Shard(0)]

    def make() -> list[torch.nn.Parameter]:
        params = [
            torch.nn.Parameter(distribute_tensor(value, mesh, [placement]))
            for value, placement in zip(full_values(0), placements, strict=True)
        ]
        for param, grad, placement in zip(params, full_values(1), placements, strict=True):
            param.grad = distribute_tensor(grad, mesh, [placement])
        plain = torch.nn.Parameter(torch.ones(3))  # the same in every process
        plain.grad = torch.full((3,), 2.0)
        return [*params, plain]

    results: dict[str, Any] = {}
    for name, norm_type in (("2", 2.0), ("inf", math.inf)):
        params = make()
        optimizer = fused.AdamW(params, lr=0.1, max_grad_norm=0.5, norm_type=norm_type)
        optimizer.step()
        results[name] = {
            "norm": optimizer.grad_norm,
            "norms": list(optimizer.grad_norms().values()),
            "params": [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in params],
        }
        params = make()
        results[name]["clipped_norm"] = fused.clip_grad_norm_(params, 0.5, norm_type)
        results[name]["clipped"] = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in params]

    params = make()
    if dist.get_rank() == 1:
        params[0].grad.to_local()[0, 0] = math.inf  # one process alone sees it
    for unscale in (False, True):
        optimizer = fused.AdamW(params, lr=0.1)
        scaler = fused.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        before = params[1].to_local().clone()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        unchanged = torch.equal(before, params[1].to_local())
        results[f"skipped {unscale}"] = (optimizer.found_inf, scaler.get_scale(), unchanged)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(measure, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name, norm_type", [("2", 2.0), ("inf", math.inf)])
def test_norm_over_shards(results: list[dict[str, Any]], name: str, norm_type: float) -> None:
    grads = [*full_values(1), torch.full((3,), 2.0)]
    params = [torch.nn.Parameter(value) for value in [*full_values(0), torch.ones(3)]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, 0.5, norm_type)
    torch.optim.AdamW(params, lr=0.1).step()
    for found in (result[name] for result in results):
        torch.testing.assert_close(found["norm"], norm)
        torch.testing.assert_close(found["clipped_norm"], norm)
        expected = [torch.linalg.vector_norm(grad, norm_type) for grad in grads]
        torch.testing.assert_close(found["norms"], expected)
        torch.testing.assert_close(found["clipped"], [p.grad for p in params])
        torch.testing.assert_close(found["params"], [p.detach() for p in params], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][name]["norm"], results[1][name]["norm"])


@pytest.mark.parametrize("unscale", [False, True])
def test_all_processes_skip_together(results: list[dict[str, Any]], unscale: bool) -> None:
    for result in results:
        found_inf, scale, unchanged = result[f"skipped {unscale}"]
        assert float(found_inf) == 1.0 and scale == 2.0 and unchanged
