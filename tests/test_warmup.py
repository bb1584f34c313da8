"""``fused.warmup`` where nothing is compiled at run time; what it compiles for Triton is tested in the interpreter."""

from __future__ import annotations

import pytest
import torch

import fused


def test_changes_nothing(backend):
    p = torch.nn.Parameter(torch.randn(7, device=backend.device))
    before = p.detach().clone()
    optimizer = fused.AdamW([p], max_grad_norm=1.0, backend=backend.name)
    fused.warmup(optimizer)
    assert torch.equal(p, before)
    assert p.grad is None
    assert not optimizer.state


def test_another_optimizer_is_named():
    with pytest.raises(TypeError, match="not SGD"):
        fused.warmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))  # type: ignore[arg-type]
