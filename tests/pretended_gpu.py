"""A machine with one GPU, pretended: CUDA tensors are made on the CPU, ``cuda_on_cpu`` plays the kernels.

For a process of its own, as ``pytest -p pretended_gpu`` or after ``install()``: tests and benchmarks that need a GPU
run from the first line to the last, so that a wrong name, a wrong argument or a tensor on the wrong device shows
without one. What they measure means nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_on_cpu.backend import CudaOnCpu
from cuda_on_cpu.build import build
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 << 30


def here(value: Any) -> Any:
    """The CPU in place of a GPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


PLACE = "_pretended_place"
MOVES = {"copy_", "to", "cpu", "__setitem__", "_foreach_copy_", "tolist", "item"}
"""Functions that may take tensors of several devices, or take them to another."""


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


class OnCpu(TorchFunctionMode):
    """Tensors for a GPU are made on the CPU, and must not meet those that no device was named for.

    Where the device of another tensor is named, which is the CPU here, nobody can tell.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        name = getattr(func, "__name__", "")
        places = [(getattr(t, PLACE, None), not is_lazy(t) and t.dim() > 0) for t in tensors_in(list(given))]
        found = {place for place, _ in places}
        if name not in MOVES and "gpu" in found and ("nowhere", True) in places:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, cuda:0 and cpu")
        result = func(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})
        if any(here(value) is not value for value in given):
            place = "gpu"
        elif name == "cpu" or any(isinstance(v, torch.device) or (isinstance(v, str) and v == "cpu") for v in given):
            place = None
        elif name in MOVES:
            place = places[0][0] if places else None
        else:
            place = "gpu" if "gpu" in found else None if places else "nowhere"
        for tensor in tensors_in(result):
            if place is not None:
                setattr(tensor, PLACE, place)
        return result


class Stream:
    cuda_stream = 0
    device_index = 0

    def wait_stream(self, other: Stream) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    """Notes the time at which it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        assert self.at is not None and other.at is not None
        return 1e3 * (other.at - self.at) + 1e-6


def generator_class() -> Any:
    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, here(device))

    return Generator


def graphs(kernels: CudaOnCpu) -> dict[str, Any]:
    """What torch.cuda has for graphs."""
    capturing = [False]

    class CUDAGraph:
        def replay(self) -> None:
            kernels.replay()

    @contextlib.contextmanager
    def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
        capturing[0] = True
        kernels.begin_capture()
        try:
            yield
        finally:
            assert kernels.end_capture() > 0
            capturing[0] = False

    return {"CUDAGraph": CUDAGraph, "graph": graph, "is_current_stream_capturing": lambda: capturing[0]}


def install() -> CudaOnCpu:
    """Has this process see a GPU, until it ends."""
    kernels = CudaOnCpu(build())
    patch = pytest.MonkeyPatch()
    stream = Stream()
    properties = SimpleNamespace(
        name=NAME, total_memory=MEMORY, multi_processor_count=132, major=9, minor=0, L2_cache_size=1 << 20
    )
    mode = ["default"]
    pretended = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: NAME, "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties, "mem_get_info": lambda device=None: (4 << 30, MEMORY),
        "synchronize": lambda device=None: None, "empty_cache": lambda: None, "_sleep": lambda cycles: None,
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None, "manual_seed_all": lambda seed: None,
        "Stream": lambda *_, **__: stream, "current_stream": lambda device=None: stream,
        "stream": lambda _: contextlib.nullcontext(), "Event": Event, "is_initialized": lambda: False,
        "get_sync_debug_mode": lambda: mode[0], "set_sync_debug_mode": lambda name: mode.__setitem__(0, name),
        **graphs(kernels),
    }  # fmt: skip
    for name, value in pretended.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch, "Generator", generator_class())
    patch.setattr(torch.version, "cuda", "13.0")
    OnCpu().__enter__()
    kernels.serve(patch)
    return kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    """As a plugin: before conftest.py looks for backends."""
    install()
