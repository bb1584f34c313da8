"""Trains a small byte-level GPT on the source of Python's standard library, with torch.optim and with fused, from the
same weights on the same batches; shows the losses and the time each spends in the optimizer, and writes both down."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fused
from fused import info
from fused.demo import optimizers, report, text
from fused.demo.model import GPT, GPTConfig
from fused.demo.optimizers import RECIPES, Recipe, UnavailableError
from fused.demo.training import Run, evaluate, train_together, warmup_cosine

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Size:
    """A model, and a batch small enough that the optimizer is a visible part of the work."""

    model: GPTConfig
    batch: int
    steps: int


SIZES = {
    "tiny": Size(GPTConfig(layers=2, heads=2, width=64, context=64), batch=8, steps=500),
    "small": Size(GPTConfig(layers=6, heads=4, width=128, context=64), batch=8, steps=400),
    "medium": Size(GPTConfig(layers=8, heads=6, width=384, context=256), batch=8, steps=1000),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": "int8"}
SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "cosine": warmup_cosine,
    "constant": lambda _steps: lambda _step: 1.0,
}
VALIDATION_BATCHES = 32
_REPORTED = ("size", "optimizer", "schedule", "seed", "clip", "precision", "master", "state", "inject_overflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=_positive(int), help="training steps (default: 500 tiny, 400 small, 1000 medium)")
    add("--size", choices=SIZES, default="small", help="of the model (default: small; medium is for a GPU)")
    add("--optimizer", choices=RECIPES, default="adamw", help="(default: adamw)")
    add("--against", choices=("default", "foreach", "fused", "all"), default="all",
        help="torch's form of it: what its constructor chooses, foreach=True or fused=True (default: all, which is"
             " 'default' and, where torch has it, 'fused')")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto, a GPU if there is one)")
    add("--out", type=Path, default=Path("fused-demo"), metavar="DIR",
        help="folder for demo.png and demo.json (default: fused-demo)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    add("--lr", type=_positive(float), help="highest learning rate (default: one that suits the optimizer)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate (default: cosine, with warm-up)")
    add("--clip", type=_positive(float), metavar="NORM", help="clip gradients to this global norm")
    precise = parser.add_argument_group("precision", "of fused's run; torch's stays float32, to compare with")
    add = precise.add_argument
    add("--precision", choices=PRECISIONS, default="fp32",
        help="of the parameters (default: fp32; fp16 trains with loss scaling)")  # fmt: skip
    add("--master", choices=("none", "fp32", "split", "split8"),
        help="master weights of bf16 and fp16 parameters (default: split)")  # fmt: skip
    add("--state", choices=STATES, help="storage of the optimizer's state (default: the optimizer's choice)")
    add("--inject-overflow", type=_positive(int), metavar="EVERY",
        help="put an infinity into the gradients every so many steps; those steps must be skipped;"
             " torch's runs, which get none, sit them out, so that all make the same number of updates")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if missing := [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]:
        return _fail(
            f"the demo needs {' and '.join(missing)}: pip install 'fused-optim[demo]'"
            " (from a checkout: pip install '.[demo]')"
        )
    try:
        result = demo(arguments)
    except (UnavailableError, text.CorpusError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    _show(result, arguments.out)
    return 0


def demo(arguments: argparse.Namespace) -> report.Result:
    """Set up the runs, train them together, and measure."""
    size: Size = SIZES[arguments.size]
    recipe = RECIPES[arguments.optimizer]
    steps: int = arguments.steps or size.steps
    lr: float = arguments.lr or recipe.lr
    device = _device(arguments.device)
    runs = _runs(arguments, recipe, size, steps, lr, device)
    corpus = text.standard_library()
    arguments.out.mkdir(parents=True, exist_ok=True)

    machine = info.machine()  # now: its load is that of others
    console = _console()
    model = runs[0].model
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{recipe.name} on {device}: GPT with {parameters:,} parameters; {corpus.files} files of the {corpus.source},"
        f" {corpus.train.numel() / 1e6:.1f} MB to train on, {corpus.validation.numel() / 1e6:.1f} MB held out"
    )
    batches = text.random_batches(corpus.train, size.batch, size.model.context, arguments.seed)
    with _progress(console, runs, steps) as on_step:
        train_together(runs, batches, steps, on_step)
    with console.status("validating"):
        results = [_result(run, corpus, size) for run in runs]

    return report.Result(
        config={
            **{name: getattr(arguments, name) for name in _REPORTED},
            "steps": steps,
            "lr": lr,
            "weight_decay": recipe.weight_decay,
            "options": dict(recipe.options),
            "batch": size.batch,
            "context": size.model.context,
            "device": device.type,
        },
        versions=info.versions(),
        machine=machine,
        corpus={
            "source": corpus.source,
            "files": corpus.files,
            "sha256": corpus.sha256,
            "train_bytes": corpus.train.numel(),
            "validation_bytes": corpus.validation.numel(),
        },
        parameters=parameters,
        parameter_tensors=len(list(model.parameters())),
        runs=results,
    )


def _runs(
    arguments: argparse.Namespace, recipe: Recipe, size: Size, steps: int, lr: float, device: torch.device
) -> list[Run]:
    """Torch's form or forms of the optimizer, then fused's, each with its own copy of the same model."""
    dtype = PRECISIONS[arguments.precision]
    torch.manual_seed(arguments.seed)
    weights = GPT(size.model).to(dtype).float()  # values that the low precision can hold: the same start for all

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[arguments.schedule](steps))

    runs = []
    for form in ("default", "fused") if arguments.against == "all" else (arguments.against,):
        model = copy.deepcopy(weights).to(device)
        if found := optimizers.torch_optimizer(recipe, model, lr, form):
            label, optimizer = found
            runs.append(
                Run(
                    label,
                    model,
                    optimizer,
                    schedule(optimizer),
                    clip_separately=arguments.clip,
                    sit_out_every=arguments.inject_overflow,
                )
            )
    if not runs:
        raise UnavailableError(f"torch has no {arguments.against}=True form of {recipe.name} on {device}")

    model = copy.deepcopy(weights).to(device, dtype)
    optimizer = optimizers.fused_optimizer(recipe, model, lr, _fused_options(arguments))
    runs.append(
        Run(
            f"fused.{recipe.name}",
            model,
            optimizer,
            schedule(optimizer),
            scaler=fused.GradScaler(device.type) if arguments.precision == "fp16" else None,
            inject_overflow_every=arguments.inject_overflow,
        )
    )
    return runs


def _fused_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The package's own options, none where torch's behaviour was asked for."""
    options: dict[str, Any] = {}
    default = "none" if arguments.precision == "fp32" else "split"
    if (master := arguments.master or default) != "none":
        options["master_weights"] = master
    if arguments.state is not None:
        options["state_dtype"] = STATES[arguments.state]
    if arguments.clip is not None:
        options["max_grad_norm"] = arguments.clip
    if arguments.inject_overflow and arguments.precision != "fp16":
        options["skip_nonfinite"] = True  # with fp16 the scaler skips
    return options


def _result(run: Run, corpus: text.Corpus, size: Size) -> report.RunResult:
    batches = text.even_batches(corpus.validation, size.batch, size.model.context, VALIDATION_BATCHES)
    parameters = sum(p.numel() for p in run.model.parameters())
    return report.RunResult(
        label=run.label,
        losses=run.losses,
        optimizer_seconds=run.optimizer_seconds,
        step_seconds=run.step_seconds,
        validation_loss=evaluate(run.model, batches),
        bytes_per_parameter=optimizers.stored_bytes(run.model, run.optimizer) / parameters,
        skipped_steps=run.skipped_steps,
    )


def _show(result: report.Result, out: Path) -> None:
    console = _console()
    console.print(report.table(result))
    for line in report.verdict(result):
        console.print(line, highlight=False)
    report.write_json(result, out / "demo.json")
    report.plot(result, out / "demo.png")
    console.print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}", highlight=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)


@contextmanager
def _progress(console: Console, runs: list[Run], steps: int) -> Iterator[Callable[[int], None]]:
    """A live bar above the latest losses and step times; ten lines where the output is not a terminal."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    if not console.is_terminal:

        def print_sometimes(step: int) -> None:
            if step == steps or step % math.ceil(steps / 10) == 0:
                latest = (f"{run.label} {run.losses[-1]:.3f} {1e3 * run.optimizer_seconds[-1]:.1f} ms" for run in runs)
                console.print(f"step {step}/{steps}   {'   '.join(latest)}", highlight=False)

        yield print_sometimes
        return

    bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(30), TimeRemainingColumn())
    task = bar.add_task("", total=steps)

    def view() -> Group:
        latest = Table.grid(padding=(0, 3, 0, 0))
        for run in runs:
            loss, time = run.losses[-1:], run.optimizer_seconds[-1:]
            latest.add_row(
                run.label, *(f"loss {value:.3f}" for value in loss), *(f"{1e3 * value:.2f} ms" for value in time)
            )
        return Group(bar, latest)

    # No refresh thread: it would run in the middle of what is being timed.
    with Live(view(), console=console, auto_refresh=False) as live:

        def advance(step: int) -> None:
            bar.update(task, completed=step)
            live.update(view(), refresh=True)

        yield advance


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device cuda: torch finds no CUDA device here (python -m fused info says more)")
    return torch.device(name)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = kind(value)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{value} is not positive")
        return number

    parse.__name__ = kind.__name__  # argparse's messages name it
    return parse


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
