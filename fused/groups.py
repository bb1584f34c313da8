"""The usual parameter groups of a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from .arguments import check_number

_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|resblocks|encoder_layers)\.(\d+)\.")
_STEM = re.compile(
    r"(?:^|\.)(?:wte|wpe|embed\w*|\w*_embed(?:ding|dings|_tokens|_positions)?|tok_embeddings|cls_token|pos_emb\w*|mask_token)(?:\.|$)"
)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    *,
    layer_decay: float | None = None,
    layer_of: Callable[[str], int | None] | None = None,
) -> list[dict[str, Any]]:
    r"""Groups a model's parameters as recipes do: no decay for norms and biases, smaller steps for early layers.

    A parameter decays if it has two dimensions or more, is no module's ``bias``, and belongs to no normalization. With
    ``layer_decay`` :math:`d`, layer :math:`l` of :math:`L` learns at :math:`\eta \, d^{\,L - l}`: embeddings are layer
    0, block :math:`i` is layer :math:`i + 1`, what comes after the blocks keeps the full rate. Hundreds of groups cost
    a fused step nothing.

    Args:
        model: the module; parameters that need no gradient are left out, shared ones taken once. A method
            ``no_weight_decay()`` that returns names is obeyed.
        lr: learning rate :math:`\eta` of the last layer.
        weight_decay: of the groups that decay.
        layer_decay: factor per layer in (0, 1]; None: one learning rate.
        layer_of: layer number of a parameter name, None for what comes after the last; by default found from names such
            as ``blocks.3.``, ``layers.3.``, ``h.3.`` and the usual names of embeddings.

    Returns:
        Groups of ``(name, parameter)`` pairs with ``lr`` and ``weight_decay``, early layers first.

    Raises:
        ValueError: ``layer_decay`` is out of range, or no layers are found in the names.

    Example:
        >>> optimizer = fused.AdamW(fused.param_groups(model, lr=3e-4, weight_decay=0.1, layer_decay=0.9))

    Reference:
        Layer-wise decay: Howard and Ruder, arXiv:1801.06146, section 3.2; Bao et al., arXiv:2106.08254, appendix.
    """
    check_number("lr", lr)
    check_number("weight_decay", weight_decay)
    if layer_decay is not None:
        check_number("layer_decay", layer_decay)
        if not 0.0 < layer_decay <= 1.0:
            raise ValueError(f"Invalid layer_decay value: {layer_decay}. Use one in (0, 1]")
    named_exempt: Any = getattr(model, "no_weight_decay", None)
    exempt = set(named_exempt()) if callable(named_exempt) else set()
    normalized = {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    layers: dict[str, int] = {}
    last = 0
    if layer_decay is not None:
        layers, last = _layers([name for name, _ in named], layer_of or _layer_from_name)

    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, param in named:
        decays = param.ndim >= 2 and not name.endswith("bias") and name not in normalized and name not in exempt
        layer = layers.get(name, last)
        scale = 1.0 if layer_decay is None else layer_decay ** (last - layer)
        group = groups.setdefault(
            (layer, decays), {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0}
        )
        group["params"].append((name, param))
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def _layer_from_name(name: str) -> int | None:
    block = _BLOCK.search(name)
    if block:
        return int(block.group(1)) + 1
    return 0 if _STEM.search(name) else None


def _layers(names: list[str], layer_of: Callable[[str], int | None]) -> tuple[dict[str, int], int]:
    """Layer of each name, and the number of the last one, to which all without a number belong."""
    found = {name: layer for name in names if (layer := layer_of(name)) is not None}
    if not any(found.values()):
        raise ValueError(
            f"layer_decay finds no numbered layers in the parameter names (the first is {names[:1]}); pass layer_of"
        )
    return found, max(found.values()) + 1
