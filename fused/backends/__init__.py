"""The only place that asks which device and what is available."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ..state import local

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..plan import Batch

extension: Any = None
EXTENSION_ERROR = ""
try:
    extension = importlib.import_module("fused._C")
except ImportError as error:  # built without a compiler, or for another platform
    EXTENSION_ERROR = str(error)


def status() -> dict[str, tuple[bool, str]]:
    """Whether each backend is available, and why not."""
    return {
        "cuda": _cuda_status(),
        "triton": _triton_status(),
        "cpu": (True, "") if extension else (False, f"the compiled extension does not import: {EXTENSION_ERROR}"),
        "reference": (True, ""),
    }


def _cuda_status() -> tuple[bool, str]:
    return False, "the CUDA kernels are not part of this build"


def _triton_status() -> tuple[bool, str]:
    return False, "the Triton kernels are not part of this version"


def choose(device: torch.device, requested: str | None, kernels: str = "") -> str:
    """Name of the backend for tensors on ``device``.

    Args:
        device: of the tensors.
        requested: the backend that was asked for; None: the best.
        kernels: which kernels it has to have; "": the elementwise ones.

    Raises:
        RuntimeError: ``requested`` is not available, or not made for that device.
    """
    serves = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ())
    known = status()
    if requested is not None:
        available, reason = known[requested]
        if not available:
            raise RuntimeError(f"backend={requested!r} is not available: {reason}")
        if not _has_kernels(requested, kernels):
            raise RuntimeError(f"backend={requested!r} has no kernels for {kernels.capitalize()} in this version")
        if requested != "reference" and requested not in serves:
            raise RuntimeError(f"backend={requested!r} does not serve parameters on device {device}")
        return requested
    return next((name for name in serves if known[name][0] and _has_kernels(name, kernels)), "reference")


@cache
def _has_kernels(name: str, kernels: str) -> bool:
    return find_spec(_module(name, kernels), __package__) is not None


def _module(name: str, kernels: str) -> str:
    return f".{name}_{kernels}" if kernels else f".{name}"


def make_batches(optimizer: FusedOptimizer) -> list[Batch]:
    """Divides the optimizer's parameters into batches by backend and device."""
    requested = optimizer._options["backend"]
    places: dict[tuple[str, torch.device], list[int]] = {}
    for index, (group, _, param) in enumerate(optimizer._parameters()):
        device = local(param).device
        by_autograd = optimizer.param_groups[group].get("differentiable") or torch.compiler.is_compiling()
        name = "reference" if by_autograd else choose(device, requested, optimizer._kernels)
        places.setdefault((name, device), []).append(index)
    return [
        _batch_class(name, optimizer._kernels)(optimizer, device, indices)
        for (name, device), indices in places.items()
    ]


def _batch_class(name: str, kernels: str) -> Any:
    module = importlib.import_module(_module(name, kernels), __package__)
    return module.Batch
