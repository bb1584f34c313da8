"""Every optimizer once: the rows that drive the tests.

Adding an optimizer means adding a :class:`Case` here and its float64 reference in ``references.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import references
import torch
from torch import Tensor

import fused
from fused.rules import RULES, Rule


@dataclass(frozen=True)
class Variant:
    """Hyperparameters that lead to one path through a rule.

    Attributes:
        name: for test ids.
        kwargs: of the constructor.
        rule: name of the rule these lead to.
        ulps: how many units (see ``references.bounded``) results may be off. The default of 4 is for roundings of
            intermediate results that no input accounts for (1 - beta, bias corrections, products).
        reason: why ``ulps`` is another number.
    """

    name: str
    kwargs: dict[str, Any]
    rule: str
    ulps: float = 4.0
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One optimizer class.

    Attributes:
        optimizer: the class under test.
        counterpart: the class of torch.optim it stands in for; None: there is none.
        reference: its float64 reference.
        variants: at least one for every rule of the class.
        defaults: arguments that every variant needs.
    """

    optimizer: type[fused.FusedOptimizer]
    counterpart: type[torch.optim.Optimizer] | None
    reference: references.Reference
    variants: tuple[Variant, ...]
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    def make(self, params: Iterable[Any], variant: Variant | None = None, **options: Any) -> fused.FusedOptimizer:
        """The optimizer under test."""
        kwargs = (variant or self.variants[0]).kwargs
        return self.optimizer(params, **{**self.defaults, **kwargs, **options})

    def make_counterpart(
        self, params: Iterable[Any], variant: Variant | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """torch.optim's, with the same hyperparameters."""
        assert self.counterpart is not None
        kwargs = (variant or self.variants[0]).kwargs
        return self.counterpart(params, **{**self.defaults, **kwargs, **options})

    def first_state(self, variant: Variant, param: Tensor) -> dict[str, Tensor]:
        """What the state holds before the first step."""
        first = float({**self.defaults, **variant.kwargs}.get("initial_accumulator_value", 0.0))
        return {name: torch.full_like(param, first if name == "sum" else 0.0) for name in RULES[variant.rule].states}


_PENALTY = "the penalty is rounded twice before it nearly cancels the gradient"
_ADADELTA = "the square of a quotient of two roots, which hardly depends on the inputs: their roundings explain nothing"

CASES: tuple[Case, ...] = (
    Case(
        fused.Adam,
        torch.optim.Adam,
        references.adam,
        (
            Variant("default", {}, "adam"),
            Variant("l2", {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}, "adam"),
            Variant("maximize", {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True}, "adam"),
            Variant("amsgrad", {"lr": 1e-2, "amsgrad": True}, "adam_amsgrad"),
            Variant("amsgrad-l2", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}, "adam_amsgrad"),
            Variant("decoupled", {"weight_decay": 0.1, "decoupled_weight_decay": True}, "adam"),
            Variant("lr0", {"lr": 0.0}, "adam"),
            Variant("beta1-0", {"betas": (0.0, 0.9)}, "adam"),
        ),
    ),
    Case(
        fused.AdamW,
        torch.optim.AdamW,
        references.adam,
        (
            Variant("default", {}, "adam"),
            Variant("decay", {"lr": 1e-2, "weight_decay": 0.5, "betas": (0.3, 0.99)}, "adam"),
            Variant("nodecay", {"lr": 1e-2, "weight_decay": 0.0}, "adam"),
            Variant("maximize", {"lr": 1e-2, "maximize": True}, "adam"),
            Variant("amsgrad", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "maximize": True}, "adam_amsgrad"),
            Variant("tensors", {"lr": torch.tensor(1e-2), "betas": (torch.tensor(0.9), torch.tensor(0.99))}, "adam"),
        ),
    ),
    Case(
        fused.Lion,
        None,
        references.lion,
        (
            Variant("default", {}, "lion"),
            Variant("decay", {"lr": 1e-2, "weight_decay": 0.5}, "lion"),
            Variant("maximize", {"lr": 1e-2, "betas": (0.95, 0.98), "weight_decay": 0.1, "maximize": True}, "lion"),
        ),
    ),
    Case(
        fused.SGD,
        torch.optim.SGD,
        references.sgd,
        (
            Variant("default", {}, "sgd"),
            Variant("l2", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, "sgd"),
            Variant("momentum", {"lr": 0.1, "momentum": 0.9}, "sgd_momentum"),
            Variant("dampening", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}, "sgd_momentum"),
            Variant("nesterov", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, "sgd_momentum"),
            Variant("maximize", {"lr": 0.1, "momentum": 0.5, "maximize": True}, "sgd_momentum"),
        ),
    ),
    Case(
        fused.RMSprop,
        torch.optim.RMSprop,
        references.rmsprop,
        (
            Variant("default", {}, "rmsprop"),
            Variant("l2", {"weight_decay": 0.1, "alpha": 0.9, "maximize": True}, "rmsprop"),
            Variant("momentum", {"momentum": 0.9, "weight_decay": 0.1}, "rmsprop_momentum", 6, _PENALTY),
            Variant("centered", {"centered": True, "maximize": True}, "rmsprop_centered"),
            Variant("centered-momentum", {"centered": True, "momentum": 0.5, "eps": 1e-6}, "rmsprop_centered_momentum"),
        ),
    ),
    Case(
        fused.Adagrad,
        torch.optim.Adagrad,
        references.adagrad,
        (
            Variant("default", {}, "adagrad"),
            Variant("lr-decay", {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}, "adagrad"),
            Variant("accumulator", {"lr": 0.1, "initial_accumulator_value": 0.25, "maximize": True}, "adagrad"),
        ),
    ),
    Case(
        fused.Adadelta,
        torch.optim.Adadelta,
        references.adadelta,
        (
            Variant("default", {}, "adadelta", 12, _ADADELTA),
            Variant(
                "l2",
                {"lr": 0.5, "rho": 0.95, "eps": 1e-4, "weight_decay": 0.1, "maximize": True},
                "adadelta",
                12,
                _ADADELTA,
            ),
        ),
    ),
)

CASE = {case.name: case for case in CASES}

VARIANTS = [(case, variant) for case in CASES for variant in case.variants]
"""For ``pytest.mark.parametrize("case, variant", VARIANTS, ids=IDS)``."""

IDS = [f"{case.name}-{variant.name}" for case, variant in VARIANTS]

WITH_COUNTERPART = [(case, variant) for case, variant in VARIANTS if case.counterpart is not None]
COUNTERPART_IDS = [f"{case.name}-{variant.name}" for case, variant in WITH_COUNTERPART]


def rule_of(variant: Variant) -> Rule:
    """The rule a variant leads to."""
    return RULES[variant.rule]
