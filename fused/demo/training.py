"""Training several copies of one model side by side, on the same batches, and timing their optimizers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused.demo.model import GPT

Batch = tuple[Tensor, Tensor]

# Steps left out of the times: the state is made, and kernels are compiled, in the first ones.
WARM_UP_STEPS = 3


@dataclass
class Run:
    """One model and the optimizer that trains it, with what they did so far."""

    label: str
    model: GPT
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: Any = None  # a torch.amp.GradScaler or fused.GradScaler
    clip_separately: float | None = None  # for an optimizer that does not clip by itself
    inject_overflow_every: int | None = None
    sit_out_every: int | None = None  # makes no step where another run meets an injected overflow: as many updates
    losses: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)

    def train_step(self, batch: Batch) -> float:
        """One step on one batch; returns the loss. Timed: everything between backward and the next forward."""
        scale = None if self.scaler is None else self.scaler.get_scale()
        started = _now(batch[0].device)
        loss = self.model.loss(*batch)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self._is_turn(self.inject_overflow_every):
            _overflow(self.model)

        backward_done = _now(batch[0].device)
        if self.clip_separately is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_separately)
        if self.scaler is None:
            if not self._is_turn(self.sit_out_every):
                self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        finished = _now(batch[0].device)

        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.optimizer_seconds.append(finished - backward_done)
        self.step_seconds.append(finished - started)
        if self._skipped(scale):
            self.skipped_steps.append(len(self.losses))
        return self.losses[-1]

    def _is_turn(self, every: int | None) -> bool:
        return every is not None and (len(self.losses) + 1) % every == 0

    def _skipped(self, scale_before: float | None) -> bool:
        """Whether the last step met gradients that were not finite. Waits for the device: not while timing."""
        if self.scaler is not None and self.scaler.get_scale() < scale_before:
            return True
        return bool(getattr(self.optimizer, "found_inf", False))


def train_together(
    runs: Sequence[Run], batches: Iterator[Batch], steps: int, on_step: Callable[[int], None] = lambda _step: None
) -> None:
    """Every run takes every step on the same batch, and each goes first in its turn: noise hits all alike."""
    device = next(runs[0].model.parameters()).device
    for step in range(steps):
        tokens, targets = next(batches)
        batch = tokens.to(device), targets.to(device)
        first = step % len(runs)
        for run in (*runs[first:], *runs[:first]):
            run.train_step(batch)
        on_step(step + 1)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Batch]) -> float:
    """Mean loss over the batches, in nats per byte."""
    device = next(model.parameters()).device
    losses = [model.loss(tokens.to(device), targets.to(device)).item() for tokens, targets in batches]
    return sum(losses) / len(losses)


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up over the first tenth (at most 100 steps), then along a cosine to one tenth."""
    warmup = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _overflow(model: GPT) -> None:
    """What a float16 overflow leaves behind: one infinite element in one gradient."""
    gradient = next(p.grad for p in model.parameters() if p.grad is not None)
    gradient.view(-1)[0] = math.inf


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
