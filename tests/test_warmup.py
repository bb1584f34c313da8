"""``fused.warmup`` where nothing is compiled at run time; what it compiles for Triton is tested in the interpreter."""

from __future__ import annotations

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
