"""The optimizer rules by name: their states and hyperparameters, in the order every backend uses.

The arithmetic itself is written once per language: ``csrc/rules.h`` and ``fused/backends/reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

Hyper = tuple[str, int]
"""Key in the parameter group, and the index into its value where that is a pair (-1: the value itself)."""

MAY_BE_OFF: frozenset[Hyper] = frozenset({("eps", 0), ("d", -1), ("beta1", -1)})
"""Hyperparameters, all of Adafactor's, whose value may be None."""


@dataclass(frozen=True)
class Rule:
    """One elementwise optimizer rule.

    Attributes:
        name: as in ``csrc/rules.h``.
        states: state keys (torch.optim's), in table order.
        hypers: hyperparameters, in table order.
        nonnegative: the states that hold squares, stored without a sign in 8 bits.
        counts_steps: whether the arithmetic needs the number of steps.
    """

    name: str
    states: tuple[str, ...]
    hypers: tuple[Hyper, ...]
    nonnegative: frozenset[str] = frozenset()
    counts_steps: bool = True

    @property
    def index(self) -> int:
        """Position in the table of rules, the number by which kernels know it."""
        return _INDEX[self.name]


_BETAS: tuple[Hyper, ...] = (("betas", 0), ("betas", 1))
_ADAM = (("lr", -1), *_BETAS, ("eps", -1), ("weight_decay", -1), ("decoupled_weight_decay", -1))
_SGD = (("lr", -1), ("momentum", -1), ("dampening", -1), ("weight_decay", -1), ("nesterov", -1))
_RMSPROP = (("lr", -1), ("alpha", -1), ("eps", -1), ("weight_decay", -1), ("momentum", -1))

_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})


def _rule(name: str, states: tuple[str, ...], hypers: tuple[Hyper, ...], counts_steps: bool = True) -> Rule:
    return Rule(name, states, hypers, _SQUARES & frozenset(states), counts_steps)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        _rule("adam", ("exp_avg", "exp_avg_sq"), _ADAM),
        _rule("adam_amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _ADAM),
        _rule("lion", ("exp_avg",), (("lr", -1), *_BETAS, ("weight_decay", -1)), counts_steps=False),
        _rule("sgd", (), _SGD, counts_steps=False),
        _rule("sgd_momentum", ("momentum_buffer",), _SGD, counts_steps=False),
        _rule("rmsprop", ("square_avg",), _RMSPROP),
        _rule("rmsprop_momentum", ("square_avg", "momentum_buffer"), _RMSPROP),
        _rule("rmsprop_centered", ("square_avg", "grad_avg"), _RMSPROP),
        _rule("rmsprop_centered_momentum", ("square_avg", "grad_avg", "momentum_buffer"), _RMSPROP),
        _rule("adagrad", ("sum",), (("lr", -1), ("lr_decay", -1), ("weight_decay", -1), ("eps", -1))),
        _rule("adadelta", ("square_avg", "acc_delta"), (("lr", -1), ("rho", -1), ("eps", -1), ("weight_decay", -1))),
    )
}

_INDEX = {name: index for index, name in enumerate(RULES)}
