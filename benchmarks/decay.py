"""Pure weight decay in bfloat16: gradients of zero, lr * weight_decay = 1e-4, a thousand steps.

Each step takes a ten-thousandth off a weight, and bfloat16 numbers lie a hundred and more of those apart: rounded to
nearest, a weight never moves, whatever the moments are kept in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cases import CASES, Precision
from .problem import NotAvailable, Problem, Side
from .report import show_table
from .shapes import get_profile
from .systems import SYSTEMS, Options, get_systems

DECAY = 1e-4
STEPS = 1000
CASE = replace(CASES["adamw"], kwargs={**CASES["adamw"].kwargs, "lr": 1e-3, "weight_decay": DECAY / 1e-3})
SMALLEST, LARGEST = 0.75, 1.5  # of the weights: on both sides of a power of two


@dataclass(frozen=True)
class Variant:
    label: str
    system: str
    precision: Precision


VARIANTS = (
    Variant("fused float32", "fused", Precision()),
    Variant("fused, split", "fused", Precision("bf16", "split")),
    Variant("fused, split8", "fused", Precision("bf16", "split8")),
    Variant("fused, stochastic", "fused", Precision("bf16", stochastic=True)),
    Variant("fused, nothing", "fused", Precision("bf16")),
    Variant("torch", "torch.loop", Precision("bf16")),
    Variant("optimi, Kahan sum", "optimi", Precision("bf16")),
    Variant("bitsandbytes", "bitsandbytes", Precision("bf16")),
    Variant("torchao", "torchao", Precision("bf16")),
    Variant("torchao, stochastic", "torchao", Precision("bf16", stochastic=True)),
    Variant("FlashOptim, 32 bits", "flashoptim", Precision("bf16", "split")),
)


def weights(side: Side) -> Tensor:
    """What training goes on from: the parameter, joined with what this package keeps beside it."""
    (param,) = side.params
    if side.system != "fused":
        return param.detach().double()
    from fused import master_state_dict

    model = torch.nn.Module()
    model.register_parameter("weight", param)  # type: ignore[arg-type]
    return master_state_dict(model, side.optimizer)["weight"].double()  # type: ignore[no-any-return]


def measure(variant: Variant, device: torch.device) -> dict[str, Any]:
    record: dict[str, Any] = {
        "bench": "decay", "label": variant.label, "system": variant.system, "precision": variant.precision.name,
        "version": SYSTEMS[variant.system].version(), "status": "ok",
    }  # fmt: skip
    problem = Problem(get_profile("1x4096"), variant.precision, device)
    problem.initial[0].copy_(torch.linspace(SMALLEST, LARGEST, 4096))
    problem.set_factor(0.0)
    start = problem.initial[0].double()
    try:
        side = SYSTEMS[variant.system].make(CASE, problem, Options())
        for _ in range(STEPS):
            side.step()
    except (NotAvailable, RuntimeError) as reason:
        return record | {"status": f"not available: {reason}" if str(reason) != "not installed" else "not installed"}
    end, right = weights(side), start * (1 - DECAY) ** STEPS
    return record | {
        "share_of_decay": float((start - end).sum() / (start - right).sum()),
        "mean_error": float((end.mean() / right.mean() - 1).abs()),
        "worst_error": float((end / right - 1).abs().max()),
    }


def measure_decay(device: torch.device, quick: bool = False) -> list[dict[str, Any]]:
    """`quick`: without those that compile first."""
    get_systems("all")  # registers the third parties
    return [measure(variant, device) for variant in VARIANTS if not (quick and SYSTEMS[variant.system].compiles)]


COLUMNS = ("", "storage", "of float32's decay", "mean off by", "worst weight off by", "within 1 %")


def cells_of(record: dict[str, Any]) -> list[str]:
    name, comma, rest = record["label"].partition(",")
    version = "" if record["system"] == "fused" else " " + str(record.get("version", "")).partition("+")[0]
    shown = [name + version + comma + rest, record["precision"]]
    if record["status"] != "ok":
        return [*shown, record["status"], "", "", ""]
    mean = record["mean_error"]
    errors = [f"{100 * value:.2f} %" for value in (mean, record["worst_error"])]
    return [*shown, f"{record['share_of_decay']:.1%}", *errors, "yes" if mean <= 0.01 else "no"]


def show_decay(records: Sequence[dict[str, Any]]) -> None:
    title = f"Pure weight decay, lr x weight decay = {DECAY:g}, {STEPS} steps"
    caption = "weights as training goes on from them; the mean decides"
    show_table(title, COLUMNS, [cells_of(r) for r in records], caption)
