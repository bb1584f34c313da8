"""`converge`: what low-precision storage does to training, against float32 AdamW.

loss    a small GPT on real text (the demo's), every storage format and seed on the same batches from the same weights;
        validation loss of the stored parameters, computed in float32
decay   1000 steps of nothing but weight decay at lr * weight_decay = 1e-4: what is left of it in bfloat16
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, Precision
from ..problem import NotAvailable, Problem
from ..report import Progress, number, show_table, warn
from ..shapes import get_profile
from ..systems import SYSTEMS, Options, get_systems
from .common import Run, add_common

HELP = "train a small GPT in every storage format, several seeds, against float32; pure weight decay in bfloat16"
FORMATS: tuple[tuple[str, str, Precision], ...] = (
    ("torch float32", "torch", Precision()),
    ("fused float32", "fused", Precision()),
    ("bf16 split", "fused", Precision("bf16", "split")),
    ("bf16 split, bf16 states", "fused", Precision("bf16", "split", "bf16")),
    ("bf16 split8, int8 states", "fused", Precision("bf16", "split8", "int8")),
    ("bf16 stochastic", "fused", Precision("bf16", None, "fp32", True)),
    ("torch bf16", "torch", Precision("bf16")),
)
HYPERPARAMETERS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
DECAY = 1e-4
DECAY_STEPS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--steps", type=int, help="training steps (default: 1000, --quick: 60)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3, --quick: 2)")
    parser.add_argument("--size", choices=["tiny", "small", "medium"], default="tiny", help="of the demo's model")
    parser.add_argument("--what", default="loss,decay", help="comma list of: loss, decay")


def _optimizer(model: torch.nn.Module, system: str, precision: Precision) -> torch.optim.Optimizer:
    import fused

    params = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() >= 2]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    if system == "torch":
        return torch.optim.AdamW(groups, **HYPERPARAMETERS)
    return fused.AdamW(groups, **HYPERPARAMETERS, **precision.options())


def train(run: Run, size_name: str, steps: int, seed: int, on_step: Callable[[int], None]) -> list[dict[str, Any]]:
    """Every format on the same batches from the same weights; one record each."""
    from fused.demo import text
    from fused.demo.command import SIZES, VALIDATION_BATCHES
    from fused.demo.model import GPT
    from fused.demo.training import Run as Training
    from fused.demo.training import evaluate, train_together, warmup_cosine

    size = SIZES[size_name]
    torch.manual_seed(seed)
    weights = GPT(size.model).bfloat16().float().to(run.device)  # a start that every format can hold
    runs, labels = [], []
    for label, system, precision in FORMATS:
        model = copy.deepcopy(weights).to(precision.dtype)
        try:
            optimizer = _optimizer(model, system, precision)
        except (TypeError, NotImplementedError, ValueError) as reason:
            warn(f"{label}: not available: {reason}")
            continue
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
        runs.append(Training(label, model, optimizer, schedule))
        labels.append((label, system, precision))
    corpus = text.standard_library()
    batches = text.random_batches(corpus.train, size.batch, size.model.context, seed)
    train_together(runs, batches, steps, on_step)
    records = []
    for training, (label, system, precision) in zip(runs, labels, strict=True):
        validation = text.even_batches(corpus.validation, size.batch, size.model.context, VALIDATION_BATCHES)
        records.append(
            {
                "bench": "converge",
                "format": label,
                "system": system,
                "precision": precision.name,
                "seed": seed,
                "steps": steps,
                "size": size_name,
                "validation_loss": evaluate(copy.deepcopy(training.model).float(), validation),
                "losses": _thin(training.losses),
            }
        )
    return records


def _thin(losses: Sequence[float], points: int = 100) -> list[float]:
    """Means of up to `points` equal stretches: a curve that can be drawn."""
    width = max(1, len(losses) // points)
    return [round(statistics.fmean(losses[i : i + width]), 4) for i in range(0, len(losses), width)]


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per format: mean loss, difference from float32 seed by seed, and the spread of float32 over the seeds."""
    reference = {r["seed"]: r["validation_loss"] for r in records if r["format"] == "torch float32"}
    spread = max(reference.values()) - min(reference.values()) if reference else 0.0
    out = []
    for label in dict.fromkeys(r["format"] for r in records):
        mine = {r["seed"]: r["validation_loss"] for r in records if r["format"] == label}
        differences = [loss - reference[seed] for seed, loss in mine.items() if seed in reference]
        mean = statistics.fmean(differences) if differences else 0.0
        worst = max(map(abs, differences), default=0.0)
        loss = statistics.fmean(mine.values())
        out.append({"format": label, "loss": loss, "difference": mean, "worst": worst, "spread": spread})
    return out


def decay(run: Run) -> list[dict[str, Any]]:
    """Parameters around 1, gradients zero, 1000 steps: how far from float32's result each ends up."""
    case = copy.copy(CASES["adamw"])
    object.__setattr__(case, "kwargs", {**case.kwargs, "lr": 1e-3, "weight_decay": DECAY / 1e-3})
    wanted = [
        ("fused", Precision("bf16", "split")),
        ("fused", Precision("bf16", "split8")),
        ("fused", Precision("bf16", stochastic=True)),
        ("fused", Precision("bf16")),
        ("torch.loop", Precision("bf16")),
        *((s.key, Precision("bf16")) for s in get_systems("bitsandbytes,optimi,torchao,flashoptim")),
    ]
    records = []
    for key, precision in wanted:
        problem = Problem(get_profile("1x4096"), precision, run.device)
        problem.initial[0].copy_(torch.linspace(0.75, 1.5, 4096))
        problem.set_factor(0.0)
        start = problem.initial[0].double()
        record: dict[str, Any] = {"bench": "decay", "system": key, "precision": precision.name, "status": "ok"}
        records.append(record)
        try:
            side = SYSTEMS[key].make(case, problem, Options())
            for _ in range(DECAY_STEPS):
                side.step()
        except (NotAvailable, RuntimeError) as reason:
            record["status"] = f"not available: {reason}" if str(reason) != "not installed" else "not installed"
            continue
        end = side.params[0].detach().double()
        lost = float((start - end).sum() / (start * (1 - (1 - DECAY) ** DECAY_STEPS)).sum())
        off = (end / (start * (1 - DECAY) ** DECAY_STEPS) - 1).abs()
        record |= {"share_of_decay": lost, "mean_error": float(_bias(end, start)), "worst_error": float(off.max())}
    return records


def _bias(end: Tensor, start: Tensor) -> Tensor:
    return (end.mean() / (start.mean() * (1 - DECAY) ** DECAY_STEPS) - 1).abs()


def show_loss(records: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in summary(records):
        inside = "" if row["format"].startswith("torch") else ("yes" if row["worst"] <= row["spread"] else "no")
        cells.append([row["format"], f"{row['loss']:.4f}", f"{row['difference']:+.4f}", f"{row['worst']:.4f}", inside])
    seeds = len({r["seed"] for r in records})
    spread = summary(records)[0]["spread"] if records else 0.0
    show_table(
        f"Validation loss after {records[0]['steps']} steps, {seeds} seeds",
        ["storage", "mean loss", "mean difference", "largest", "within seeds' spread"],
        cells,
        f"differences from torch float32 with the same seed, nats per byte; float32's spread over seeds {spread:.4f}",
    )


def show_decay(records: Sequence[dict[str, Any]]) -> None:
    cells = [
        [
            r["system"],
            r["precision"],
            f"{r['share_of_decay']:.1%}" if "share_of_decay" in r else "-",
            f"{r['mean_error']:.2%}" if "mean_error" in r else "-",
            number(r.get("worst_error")),
            r["status"],
        ]
        for r in records
    ]
    title = f"Pure weight decay, lr x weight decay = {DECAY:g}, {DECAY_STEPS} steps"
    columns = ["system", "storage", "of float32's decay", "mean off by", "worst element off by", "status"]
    show_table(title, columns, cells)


class TimeUpError(RuntimeError):
    """The run's time limit came before the end of a training."""


def _tell(progress: Progress, deadline: float, seed: int, step: int) -> None:
    if time.perf_counter() > deadline:
        raise TimeUpError
    progress(f"seed {seed}, step {step}")


def run(args: argparse.Namespace) -> int:
    steps = args.steps or (60 if args.quick else 1000)
    seeds = args.seeds or (2 if args.quick else 3)
    run_ = Run("converge", args, bandwidth=False)
    what = args.what.split(",")
    with run_:
        if "loss" in what:
            records: list[dict[str, Any]] = []
            with Progress("converge", seeds * steps) as progress:
                for seed in range(seeds):
                    on_step = partial(_tell, progress, run_.session.deadline, seed)
                    try:
                        records += train(run_, args.size, steps, seed, on_step)
                    except TimeUpError:
                        run_.session.left_out += 1
            if records:
                show_loss(records)
            run_.records += records
        if "decay" in what:
            records = decay(run_)
            show_decay(records)
            run_.records += records
    return run_.exit_code
