"""Compiling ahead of the first step what it needs."""

from __future__ import annotations

from . import backends
from .optimizer import FusedOptimizer


def warmup(optimizer: FusedOptimizer) -> None:
    """Compiles ahead what the first step of an optimizer would compile.

    Only the Triton kernels compile at run time; with any other backend this returns at once. Nothing is launched, and
    parameters, gradients and state stay as they are. What was compiled is cached on disk for the next run.

    Args:
        optimizer: any optimizer of this package, with its parameters where they will be updated and its options as they
            will be used. Gradients that are not there yet are taken to have the dtype of their parameters.

    Raises:
        TypeError: ``optimizer`` is not one of this package's.
        RuntimeError: the optimizer's ``backend`` is not available for a parameter.

    Example:
        >>> optimizer = fused.AdamW(model.parameters(), max_grad_norm=1.0)
        >>> fused.warmup(optimizer)
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"needs an optimizer of this package, not {type(optimizer).__name__}")
    for batch in backends.make_batches(optimizer):
        batch.compile_ahead()
