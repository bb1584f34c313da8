"""Turning a live torch.optim optimizer into ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import state as state_storage
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .optimizer import FusedOptimizer
from .rmsprop import RMSprop
from .sgd import SGD

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .optimizer import EngineOptions

COUNTERPARTS: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.Adadelta: Adadelta,
    torch.optim.Adafactor: Adafactor,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
    torch.optim.SGD: SGD,
}


def from_torch(optimizer: torch.optim.Optimizer, **options: Unpack[EngineOptions]) -> Any:
    """Turns a torch.optim optimizer into its counterpart here, in the middle of a run.

    Parameters, groups with their hyperparameters, names and state are taken over; state tensors are moved, not copied,
    so that no second set of moments is ever in memory. Training goes on as if nothing had happened.

    Args:
        optimizer: a torch.optim Adadelta, Adafactor, Adagrad, Adam, AdamW, RMSprop or SGD (these classes themselves:
            a subclass may change the rule). Do not step it any more; learning-rate schedulers hold on to it and are to
            be made anew (``scheduler.load_state_dict`` continues them).
        **options: master weights, state formats, clipping and more: see :class:`fused.optimizer.FusedOptimizer`.

    Returns:
        The optimizer of this package.

    Raises:
        TypeError: there is no counterpart; the message names the class.

    Example:
        >>> optimizer = fused.from_torch(optimizer, max_grad_norm=1.0)
    """
    cls = COUNTERPARTS.get(type(optimizer))
    if cls is None:
        known = ", ".join(sorted(kind.__name__ for kind in COUNTERPARTS))
        kind = type(optimizer)
        raise TypeError(f"no counterpart for {kind.__module__}.{kind.__name__}; there is one for {known}")
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        names = group.get("param_names")
        params = group["params"] if names is None else list(zip(names, group["params"], strict=True))
        groups.append({**{key: value for key, value in group.items() if key != "param_names"}, "params": params})
    # AdamW's own constructor fixes this one
    hidden = {"decoupled_weight_decay"} if cls is AdamW else set()
    defaults = {key: value for key, value in optimizer.defaults.items() if key not in hidden}
    converted = cls(groups, **defaults, **options)
    saved = {param: state_storage.Saved(dict(state), copy=False) for param, state in optimizer.state.items()}
    converted.state.update(state_storage.restore(converted, saved, converted.param_groups, {}))
    return converted
