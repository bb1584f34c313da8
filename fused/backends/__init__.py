"""The only place that asks which device and what is available."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state import local
from .turns import has_memory, span_of, turns_of

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..plan import Batch

extension: Any = None
EXTENSION_ERROR = ""
try:
    extension = importlib.import_module("fused._C")
except ImportError as error:  # built without a compiler, or for another platform
    EXTENSION_ERROR = str(error)


def _warn_of_ignored_switches() -> None:
    """Of environment variables that ask for what is not there: without a word a comparison would compare nothing."""
    wanted = os.environ.get("FUSED_ISA", "")
    if wanted and extension is not None and wanted != extension.isa():
        built = ", ".join(extension.built_isas())
        warnings.warn(
            f"FUSED_ISA={wanted} is not built ({built} are) or not supported here: using {extension.isa()}",
            RuntimeWarning,
            stacklevel=2,
        )
    wanted = os.environ.get("FUSED_TENSOR_INTERFACE", "")
    if wanted not in ("", "stable", "dlpack"):
        warnings.warn(f"FUSED_TENSOR_INTERFACE={wanted} is ignored: use stable or dlpack", RuntimeWarning, stacklevel=2)


_warn_of_ignored_switches()


def build_note(name: str) -> Any:
    """What the build wrote down under ``name``; None where it wrote nothing."""
    try:
        return getattr(importlib.import_module("fused._build_info"), name, None)
    except ModuleNotFoundError:
        return None


def _extension_problem() -> str:
    """Why the compiled extension is missing; the build knows more than the failed import does."""
    return f"the compiled extension is missing: {build_note('extension_error') or EXTENSION_ERROR}"


def status() -> dict[str, tuple[bool, str]]:
    """Whether each backend is available, and why not."""
    return {name: available(name) for name in ("cuda", "triton", "cpu", "reference")}


def available(name: str, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether one backend is available, on ``device`` where one is given, and why not."""
    reason = _PROBLEMS[name](device)
    return not reason, reason


def _cuda_problem(device: torch.device | None) -> str:
    if extension is None:
        return _cpu_problem(device)
    cuda = importlib.import_module(".cuda", __package__)
    return str(cuda.problem() if device is None else cuda.device_problem(device))


def _triton_problem(_: torch.device | None) -> str:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if extension is None:
        return f"it needs the extension's tables, but {_extension_problem()}"
    return "" if triton_interpreted() or torch.cuda.is_available() else "torch finds no CUDA or ROCm device"


def triton_interpreted() -> bool:
    """Whether Triton's interpreter plays the kernels on the CPU, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _cpu_problem(_: torch.device | None) -> str:
    return "" if extension is not None else _extension_problem()


def _no_problem(_: torch.device | None) -> str:
    return ""


_PROBLEMS: dict[str, Callable[[torch.device | None], str]] = {
    "cuda": _cuda_problem,
    "triton": _triton_problem,
    "cpu": _cpu_problem,
    "reference": _no_problem,
}
"""Says why a backend cannot be used, on a device where one is given; nothing if it can."""

_SERVES = {"cpu": ("cpu", "triton") if triton_interpreted() else ("cpu",), "cuda": ("cuda", "triton")}
"""Backends for tensors on a type of device, best first; any other is served by the reference."""


def choose(device: torch.device, requested: str | None, kernels: str = "") -> str:
    """Name of the backend for tensors on ``device``.

    Args:
        device: of the tensors.
        requested: the backend that was asked for; None: the best.
        kernels: which kernels it has to have; "": the elementwise ones.

    Raises:
        RuntimeError: ``requested`` is not available, or not made for that device.
    """
    serves = _SERVES.get(device.type, ())
    if requested is None:
        return _best([name for name in serves if _has_kernels(name, kernels)], device)
    served = requested == "reference" or requested in serves
    usable, reason = available(requested, device if served else None)
    if not usable:
        raise RuntimeError(f"backend={requested!r} is not available: {reason}")
    if not _has_kernels(requested, kernels):
        raise RuntimeError(f"backend={requested!r} has no kernels for {kernels.capitalize()} in this version")
    if not served:
        raise RuntimeError(f"backend={requested!r} does not serve parameters on device {device}")
    return requested


def _best(names: list[str], device: torch.device) -> str:
    """The first of ``names`` that is available on ``device``, or the reference; says why it is not a faster one."""
    reasons: dict[str, str] = {}
    for name in [*names, "reference"]:
        usable, reason = available(name, device)
        if usable:
            break
        reasons[name] = reason
    if reasons and (name == "reference" or ("cuda" in reasons and _cuda_is_built())):
        why = "; ".join(f"{unusable}: {reason}" for unusable, reason in reasons.items())
        _warn_once(f"fused: parameters on {device} are updated by the {name} backend ({why})")
    return name


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _cuda_is_built() -> bool:
    """Whether CUDA kernels are to be expected: a build without them, or a torch for another vendor, is a choice."""
    return extension is not None and bool(extension.with_cuda) and torch.version.cuda is not None


@cache
def _has_kernels(name: str, kernels: str) -> bool:
    return find_spec(_module(name, kernels), __package__) is not None


def _module(name: str, kernels: str) -> str:
    return f".{name}_{kernels}" if kernels else f".{name}"


def make_batches(optimizer: FusedOptimizer) -> list[Batch]:
    """Divides the optimizer's parameters into batches by backend and device.

    A parameter that stands in a group more than once (torch warns of it) is stepped as often, one time after the other
    as by torch.optim's loop, and so are parameters that lie in each other's memory: every turn has batches of its own.
    """
    compiling = torch.compiler.is_compiling()  # one after the other anyway
    requested = optimizer._options["backend"]
    places: dict[tuple[int, str, torch.device], list[int]] = {}
    times: dict[Tensor, int] = {}
    turns = [] if compiling else turns_of([span_of(param) for _, _, param in optimizer._parameters()])
    for index, (group, _, param) in enumerate(optimizer._parameters()):
        device = local(param).device
        in_torch = (
            optimizer.param_groups[group].get("differentiable")
            or compiling
            or not has_memory(local(param))
        )
        name = "reference" if in_torch else choose(device, requested, optimizer._kernels)
        time = times[param] = max(times.get(param, -1) + 1, 0 if compiling else turns[index])
        places.setdefault((time, name, device), []).append(index)
    batches: list[Batch] = []
    for (time, name, device), indices in sorted(places.items(), key=lambda item: item[0][0]):
        batches.append(_batch_class(name, optimizer._kernels)(optimizer, device, indices))
        batches[-1].again = time > 0
    return batches


def _batch_class(name: str, kernels: str) -> Any:
    if name == "reference":  # torch.compile follows statements only
        from . import reference, reference_adafactor

        return reference_adafactor.Batch if kernels == "adafactor" else reference.Batch
    return importlib.import_module(_module(name, kernels), __package__).Batch
