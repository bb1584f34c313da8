"""``python -m fused info``: what is installed, what it can use on this machine, and what it cannot and why."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fused
from fused import backends, sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(facts)
    else:
        _print_plain(facts)
    return 0


def versions() -> dict[str, str | None]:
    """Versions of the package and of what it stands on; None for what is not installed."""
    return {
        "fused": fused.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _installed_version("triton") or _installed_version("pytorch-triton"),
        "torch_cuda": torch.version.cuda,
    }


def machine() -> dict[str, Any]:
    """The hardware, and how much of it PyTorch was told to use."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "FUSED_ISA": os.environ.get("FUSED_ISA"),
        "tensor_interface": tensor_interface(),
        "gpus": _gpus(),
    }


def collect() -> dict[str, Any]:
    """Everything ``info`` shows, ready for JSON."""
    return {
        "versions": versions(),
        "location": str(Path(str(fused.__file__)).parent),
        "build": build_facts(),
        "machine": machine(),
        "backends": {
            name: {"available": bool(available), "reason": str(reason)}
            for name, (available, reason) in backends.status().items()
        },
    }


def build_facts() -> dict[str, Any] | None:
    """What the build wrote down (compilers, architectures), and whether it is ``stale``; None if nothing was built."""
    try:
        module = importlib.import_module("fused._build_info")
    except ModuleNotFoundError:
        return None
    facts = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    plain = {name: _plain(value) for name, value in facts.items() if isinstance(value, _PLAIN_TYPES)}
    package = Path(str(fused.__file__)).parent
    return {**plain, "stale": sources.is_stale(str(plain.get("source_hash")), package)}


def instruction_set() -> str | None:
    """The instruction set that the compiled CPU kernels run with; None without them."""
    return None if backends.extension is None else str(backends.extension.isa())


def tensor_interface() -> str | None:
    """How the extension reads tensors: torch's objects, its stable ABI, or DLPack; None without the extension."""
    return None if backends.extension is None else str(backends.extension.tensor_interface())


_PLAIN_TYPES = (str, int, float, bool, type(None), list, tuple, dict)


def _plain(value: Any) -> Any:
    """``value`` as JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in properties
    ]


def _sections(facts: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The facts as text, for both forms of output."""
    versions, machine, build = facts["versions"], facts["machine"], facts["build"] or {"extension": False}
    override = machine["FUSED_ISA"]
    isa = machine["instruction_set"] or "no compiled CPU kernels"
    return {
        "Versions": {
            "fused": f"{versions['fused']} in {facts['location']}",
            "torch": versions["torch"],
            "python": versions["python"],
            "triton": versions["triton"] or "not installed",
        },
        "Build": {name: _text(value) for name, value in build.items() if value not in (None, [])}
        | ({"stale": "yes: csrc/ has changed since, build again (pip install)"} if build.get("stale") else {}),
        "Machine": {
            "system": machine["system"],
            "CPU": f"{machine['cpu']}, {machine['cores']} cores",
            "threads": f"{machine['threads']} (torch.set_num_threads, OMP_NUM_THREADS)",
            "instruction set": f"{isa}, FUSED_ISA={override}" if override else f"{isa} (FUSED_ISA overrides)",
            "tensors": f"{machine['tensor_interface'] or 'no extension'} (FUSED_TENSOR_INTERFACE: stable, dlpack)",
            "GPU": "; ".join(_gpu_text(gpu) for gpu in machine["gpus"]) or _why_no_gpu(versions["torch_cuda"]),
        },
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _gpu_text(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"


def _why_no_gpu(torch_cuda: str | None) -> str:
    return "none that torch can use" if torch_cuda else "none (this torch is built without CUDA)"


def _print_plain(facts: dict[str, Any]) -> None:
    for title, rows in _sections(facts).items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<16} {value}".rstrip())
    print("Backends")
    for name, backend in facts["backends"].items():
        print(f"  {name:<16} {'yes' if backend['available'] else 'no':<4} {backend['reason']}".rstrip())


def _print_rich(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def grid(title: str) -> Table:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", min_width=16, no_wrap=True)
        return table

    console = Console()
    for title, rows in _sections(facts).items():
        table = grid(title)
        for name, value in rows.items():
            table.add_row(name, Text(value))
        console.print(table)
    table = grid("Backends")
    for name, backend in facts["backends"].items():
        mark = Text("yes", style="green") if backend["available"] else Text("no", style="yellow")
        table.add_row(name, mark, Text(backend["reason"]))
    console.print(table)
