"""Float64 references for the correctness gate, apart from the package: it cannot be its own judge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case


class Lion64(torch.optim.Optimizer):
    """Lion, straight from the paper (arXiv:2302.06675, Algorithm 2)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (b1 * m + (1 - b1) * p.grad).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


def reference(case: Case, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of `case` over float64 parameters: torch.optim's for-loop, or ours above where torch has none."""
    if case.cls == "Lion":
        return Lion64(params, **case.kwargs)
    return getattr(torch.optim, case.cls)(params, foreach=False, **case.kwargs)  # type: ignore[no-any-return]
