"""What the demo knows of each optimizer: settings that train the demo's model well, and what to compare it with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fused


class UnavailableError(RuntimeError):
    """The package, torch or the hardware lacks something that was asked for."""


@dataclass(frozen=True)
class Recipe:
    """One optimizer of the demo; ``name`` is the class's name in fused and, but for Lion, in torch.optim."""

    name: str
    lr: float
    weight_decay: float
    options: Mapping[str, Any] = field(default_factory=dict)


RECIPES = {
    "adamw": Recipe("AdamW", lr=1e-3, weight_decay=0.1, options={"betas": (0.9, 0.95)}),
    "adam": Recipe("Adam", lr=1e-3, weight_decay=0.0, options={"betas": (0.9, 0.95)}),
    "sgd": Recipe("SGD", lr=0.03, weight_decay=1e-4, options={"momentum": 0.9, "nesterov": True}),
    "lion": Recipe("Lion", lr=4e-4, weight_decay=0.5, options={"betas": (0.9, 0.99)}),
    "rmsprop": Recipe("RMSprop", lr=5e-4, weight_decay=0.0, options={"alpha": 0.95}),
    "adagrad": Recipe("Adagrad", lr=3e-3, weight_decay=0.0),
    "adadelta": Recipe("Adadelta", lr=0.5, weight_decay=0.0),
    "adafactor": Recipe("Adafactor", lr=1e-2, weight_decay=0.0),
}


class PlainLion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675) as its paper writes it, one parameter at a time: torch.optim has none to compare with."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, state["exp_avg"], beta1).sign_(), alpha=lr)
                state["exp_avg"].lerp_(p.grad, 1 - beta2)
        return loss


def parameter_groups(recipe: Recipe, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The usual two groups: matrices decay, norms and biases do not. torch's optimizers take them as well."""
    return fused.param_groups(model, lr=lr, weight_decay=recipe.weight_decay)


def fused_optimizer(recipe: Recipe, model: nn.Module, lr: float, extra: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The package's optimizer for ``model``; ``extra`` holds its own options, such as ``master_weights``."""
    optimizer_class: Callable[..., torch.optim.Optimizer] = getattr(fused, recipe.name)
    groups = parameter_groups(recipe, model, lr)
    try:
        return optimizer_class(groups, lr=lr, **recipe.options, **extra)
    except ValueError as error:  # formats that do not go together
        asked_for = ", ".join(f"{name}={value}" for name, value in extra.items())
        raise UnavailableError(f"fused.{recipe.name} with {asked_for or 'its defaults'}: {error}") from error


def torch_optimizer(recipe: Recipe, model: nn.Module, lr: float, form: str) -> tuple[str, torch.optim.Optimizer] | None:
    """What to compare with, and its label; None if torch lacks that form of it.

    ``form`` is "default" (what the constructor chooses), "foreach" or "fused". Lion has no form but ours above.
    """
    groups = parameter_groups(recipe, model, lr)
    if recipe.name == "Lion":
        return ("Lion, for-loop", PlainLion(groups, lr=lr, **recipe.options)) if form == "default" else None
    optimizer_class: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, recipe.name)
    label = f"torch.optim.{recipe.name}"
    if form == "default":
        return label, optimizer_class(groups, lr=lr, **recipe.options)
    if form not in inspect.signature(optimizer_class).parameters:
        return None
    try:
        return f"{label}({form}=True)", optimizer_class(groups, lr=lr, **recipe.options, **{form: True})
    except RuntimeError:  # torch has the form, but not on this device
        return None


def stored_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters and of everything the optimizer keeps for them."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(optimizer.state)
    return sum(storages.values())
