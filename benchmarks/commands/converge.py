"""`converge`: what low-precision storage does to training, against float32 AdamW.

loss    a small GPT on real text (the demo's), every storage format and seed on the same batches from the same weights;
        validation loss of the stored parameters, computed in float32
decay   1000 steps of nothing but weight decay at lr * weight_decay = 1e-4: what is left of it in bfloat16
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..cases import Precision
from ..decay import measure_decay, show_decay
from ..report import Progress, Result, show_table, warn
from .arguments import add_run_arguments
from .run import Run

HELP = "train a small GPT in every storage format, several seeds, against float32; pure weight decay in bfloat16"


@dataclass(frozen=True)
class Format:
    """One way to store parameters and states, under its name on the command line and in tables."""

    key: str
    label: str
    system: str
    precision: Precision


REFERENCE = "torch float32"
FORMATS = (
    Format("torch-fp32", REFERENCE, "torch", Precision()),
    Format("fp32", "fused float32", "fused", Precision()),
    Format("split", "bf16 split", "fused", Precision("bf16", "split")),
    Format("split-bf16", "bf16 split, bf16 states", "fused", Precision("bf16", "split", "bf16")),
    Format("split8-int8", "bf16 split8, int8 states", "fused", Precision("bf16", "split8", "int8")),
    Format("stochastic", "bf16 stochastic", "fused", Precision("bf16", None, "fp32", True)),
    Format("torch-bf16", "torch bf16", "torch", Precision("bf16")),
)
HYPERPARAMETERS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--steps", type=int, help="training steps (default: 1000, --quick: 30)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3, --quick: 2)")
    parser.add_argument("--size", choices=["tiny", "small", "medium"], default="tiny", help="of the demo's model")
    parser.add_argument("--what", default="loss,decay", help="comma list of: loss, decay")
    keys = ",".join(f.key for f in FORMATS)
    parser.add_argument("--formats", default=keys, help=f"comma list of storage formats to train in (default: {keys})")
    parser.add_argument(
        "--resume", action="store_true", help="keep the trainings that --out holds, of as many steps and the same size"
    )


def get_formats(names: str) -> list[Format]:
    """In the order of the table: float32, which the others are compared with, comes first."""
    wanted = {name.strip() for name in names.split(",")}
    if unknown := wanted - {f.key for f in FORMATS}:
        raise ValueError(f"no format {', '.join(sorted(unknown))}: one of {', '.join(f.key for f in FORMATS)}")
    return [f for f in FORMATS if f.key in wanted]


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


@functools.cache
def _corpus() -> Any:
    from fused.demo import text

    return text.standard_library()


def train(
    run: Run, form: Format, size_name: str, steps: int, seed: int, on_step: Callable[[int], None]
) -> dict[str, Any] | None:
    """One training: the seed alone decides on weights and batches, whatever the format. None: not available here."""
    from fused.demo import text
    from fused.demo.command import SIZES, VALIDATION_BATCHES
    from fused.demo.model import GPT
    from fused.demo.training import Run as Training
    from fused.demo.training import evaluate, train_together, warmup_cosine

    size = SIZES[size_name]
    torch.manual_seed(seed)
    # a start that every format can hold
    model = GPT(size.model).bfloat16().to(device=run.device, dtype=form.precision.dtype)
    try:
        optimizer = _optimizer(model, form.system, form.precision)
    except (TypeError, NotImplementedError, ValueError) as reason:
        warn(f"{form.label}: not available: {reason}")
        return None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    training = Training(form.label, model, optimizer, schedule)
    corpus = _corpus()
    train_together([training], text.random_batches(corpus.train, size.batch, size.model.context, seed), steps, on_step)
    validation = text.even_batches(corpus.validation, size.batch, size.model.context, VALIDATION_BATCHES)
    return {
        "bench": "converge",
        "format": form.label,
        "system": form.system,
        "precision": form.precision.name,
        "seed": seed,
        "steps": steps,
        "size": size_name,
        "corpus": corpus.source,
        "commit": run.machine["commit"],
        "validation_loss": evaluate(model.float(), validation),
        "losses": _thin(training.losses),
    }


def _thin(losses: Sequence[float], points: int = 100) -> list[float]:
    """Means of up to `points` equal stretches: a curve that can be drawn."""
    width = max(1, len(losses) // points)
    return [round(statistics.fmean(losses[i : i + width]), 4) for i in range(0, len(losses), width)]


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per format: mean loss, difference from float32 seed by seed, and the spread of float32 over the seeds."""
    reference = {r["seed"]: r["validation_loss"] for r in records if r["format"] == REFERENCE}
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


class LimitError(RuntimeError):
    """The run's time limit came before the end of a training."""


def _tell(progress: Progress, deadline: float, what: str, step: int) -> None:
    if time.perf_counter() > deadline:
        raise LimitError
    progress(f"{what}, step {step}")


def kept_records(run: Run, size: str, steps: int) -> list[dict[str, Any]]:
    """Trainings that the result file holds already; ValueError where they are of another kind."""
    path = run.out / f"{run.name}.json" if run.out else None
    if path is None:
        raise ValueError("--resume needs --out, the folder with the earlier results")
    if not path.exists():
        return []
    records = [r for r in Result.load(path).rows if r["bench"] == "converge"]
    if other := next((r for r in records if (r["size"], r["steps"]) != (size, steps)), None):
        raise ValueError(f"{path} holds trainings of {other['steps']} steps, size {other['size']}: not to be mixed")
    return records


def train_missing(run: Run, args: argparse.Namespace, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Every format and seed that is not there yet; the result file is written after each, so that nothing is lost."""
    formats = get_formats(args.formats)
    records = kept_records(run, args.size, steps) if args.resume else []
    done = {(r["format"], r["seed"]) for r in records}
    missing = [(seed, form) for seed in range(seeds) for form in formats if (form.label, seed) not in done]
    with Progress("converge", len(missing) * steps) as progress:
        for i, (seed, form) in enumerate(missing):
            if run.session.is_over():
                run.session.leave_out(*(f"{form.label}, seed {seed}" for seed, form in missing[i:]))
                break
            on_step = partial(_tell, progress, run.session.deadline, f"{form.label}, seed {seed}")
            try:
                record = train(run, form, args.size, steps, seed, on_step)
            except LimitError:
                run.session.leave_out(f"{form.label}, seed {seed}")
                continue
            if record:
                records.append(record)
                run.records = in_order(records)
                run.save()
    return in_order(records)


def in_order(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    labels = [f.label for f in FORMATS]
    return sorted(records, key=lambda r: (r["seed"], labels.index(r["format"])))


def run(args: argparse.Namespace) -> int:
    steps = args.steps or (30 if args.quick else 1000)
    seeds = args.seeds or (2 if args.quick else 3)
    run_ = Run("converge", args, timed=False)
    what = args.what.split(",")
    with run_:
        losses = train_missing(run_, args, steps, seeds) if "loss" in what else []
        if losses:
            show_loss(losses)
        decays = measure_decay(run_.device, args.quick) if "decay" in what else []
        if decays:
            show_decay(decays)
        run_.records = [*losses, *decays]
    return run_.exit_code
