"""Starting compiled kernels without Triton's look-up, which costs more than everything else that a step does in Python.

Triton finds the compiled kernel by the types and alignments of all arguments, anew at every launch. A launcher does so
once. After that it hands the driver's launcher the kernel and the arguments' addresses, as long as no argument has
changed its type or alignment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

_ALIGNMENT = 16
"""Triton compiles for addresses that are multiples of it, or for any."""


class Launcher:
    """One kernel with its constants, on one device."""

    def __init__(self, kernel: Any, device: torch.device, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {**constants, **options}
        self.device = device
        names = [param.name for param in kernel.params] if hasattr(kernel, "params") else []
        self.constants = tuple(constants[name] for name in names if name in constants)
        self.any_alignment = [param.do_not_specialize for param in kernel.params] if names else []
        self.args: tuple[Any, ...] = ()
        self.values: list[int] = []
        self.run: Any = None
        self.function: Any = None
        self.metadata: Any = None

    def compile(self, *args: Any) -> None:
        """Compiles what the call would launch."""
        self.kernel.warmup(*args, grid=(1,), **self.options)

    def __call__(self, programs: int, *args: Any) -> None:
        """Launches ``programs`` of the kernel on the device's current stream; the device must be the current one."""
        if self.run is None or _watched() or not self._take(args):
            compiled = self.kernel[(programs,)](*args, **self.options)
            self._keep(compiled, args)
            return
        stream = triton.runtime.driver.active.get_current_stream(self.device.index)
        self.run(
            programs, 1, 1, stream, self.function, self.metadata, None, None, None, *self.values, *self.constants
        )  # fmt: skip

    def _keep(self, compiled: Any, args: tuple[Any, ...]) -> None:
        """Remembers a kernel and what it was compiled for; the interpreter has none."""
        if not hasattr(compiled, "packed_metadata"):
            return
        self.args = args
        self.values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata

    def _take(self, args: tuple[Any, ...]) -> bool:
        """Whether the kernel at hand was compiled for such arguments; notes them if so."""
        for k, (new, old) in enumerate(zip(args, self.args, strict=True)):
            if new is old:
                continue
            if isinstance(new, Tensor):
                address = new.data_ptr()
                if new.dtype != old.dtype:
                    return False
                if (address - self.values[k]) % _ALIGNMENT and not self.any_alignment[k]:
                    return False
                self.values[k] = address
            else:
                if _width(new) != _width(old) or not (self.any_alignment[k] or new == old):
                    return False
                self.values[k] = new
        self.args = args
        return True


def _width(number: int) -> int:
    """Bits of the type that Triton gives a whole number."""
    return 32 if -(1 << 31) <= number < 1 << 31 else 64


def _watched() -> bool:
    """Whether somebody asked Triton to be told of every launch, as profilers do."""
    knobs = getattr(triton, "knobs", None)
    hooks: Any = CompiledKernel if knobs is None else knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return any(hook is not None and bool(getattr(hook, "calls", True)) for hook in (enter, leave))
