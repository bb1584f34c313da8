"""The machine and the versions a result belongs to, and what disturbed the measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

DISTRIBUTIONS = (
    "fused-optim", "torch", "triton", "numpy", "apex", "transformer-engine", "deepspeed", "bitsandbytes", "torchao",
    "flashoptim", "torch-optimi", "lion-pytorch", "transformers",
)  # fmt: skip

# Theoretical memory bandwidth in GB/s, by the vendors' data sheets, where the driver does not tell.
_DATASHEET = {
    "H200": 4800, "H100 80GB HBM3": 3350, "H100 PCIe": 2039, "H100 NVL": 3900, "GH200": 4000, "B200": 8000,
    "B300": 8000, "A100-SXM4-80GB": 2039, "A100 80GB PCIe": 1935, "A100-SXM4-40GB": 1555, "A100-PCIE-40GB": 1555,
    "A10G": 600, "A10": 600, "L40S": 864, "L40": 864, "L4": 300, "V100": 900, "T4": 320, "RTX 5090": 1792,
    "RTX 4090": 1008, "RTX 3090": 936, "RTX A6000": 768,
}  # fmt: skip


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Distribution -> version, '' where not installed."""
    return {name: version(name) for name in DISTRIBUTIONS}


def _cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return match[1].strip() if match else platform.processor() or platform.machine()


def _instruction_set() -> str:
    flags = set(_read("/proc/cpuinfo").split())
    for flag, name in (("avx512bw", "AVX-512"), ("avx2", "AVX2"), ("sve", "SVE"), ("asimd", "NEON")):
        if flag in flags:
            return name
    return platform.machine()


def last_level_cache() -> int:
    """Bytes, 0 where unknown."""
    sizes = [_read(str(p)).strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=0)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    match = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    return int(match[1]) * 1024 if match else 4 << 30


def theoretical_bandwidth(device: torch.device) -> float | None:
    """GB/s by the data sheet; None where unknown (no CPU tells)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(v) for k, v in sorted(_DATASHEET.items(), key=lambda kv: -len(kv[0])) if k in name), None)


def _commit() -> str:
    """What is measured; named by COMMIT where the tree came without its repository."""
    named = os.environ.get("COMMIT", "").strip()
    return named or _run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to place a number."""
    out: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "last_level_cache": last_level_cache(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": {k: v for k, v in versions().items() if v},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        out |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_processors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
            "theoretical_gbs": theoretical_bandwidth(device),
        }
        out["driver"] = "".join(out["driver"])
    return out


def title(machine: dict[str, Any]) -> str:
    """One line: what a plot is labelled with."""
    cpu = re.sub(r"\((R|TM)\)", "", machine["cpu"])
    name = machine.get("gpu") or f"{cpu}, {machine['threads']} threads"
    return f"{name} · torch {machine['versions'].get('torch', '?')}"


def slug(machine: dict[str, Any]) -> str:
    """The name of the machine's result file."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['threads']} threads"
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@", " ", name)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


class Watch:
    """Watches for what makes timings untrue: other processes, a stolen CPU, a throttled GPU.

    with Watch(device) as watch: ...
    watch.warnings
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warnings: list[str] = []

    @staticmethod
    def _cpu() -> tuple[float, float, float, float]:
        """Jiffies: all, busy, stolen; and this process's own seconds."""
        fields = [float(x) for x in _read("/proc/stat").partition("\n")[0].split()[1:9]]
        own = sum(os.times()[:4])
        if len(fields) < 8:
            return 0.0, 0.0, 0.0, own
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return sum(fields), user + nice + system + irq + softirq, steal, own

    def __enter__(self) -> Watch:
        self._before = self._cpu()
        return self

    def __exit__(self, *_: object) -> None:
        total, busy, steal, own = (b - a for a, b in zip(self._before, self._cpu(), strict=True))
        if total > 0:
            others = (busy - own * os.sysconf("SC_CLK_TCK")) / total
            if others > 0.05:
                self.warnings.append(f"other processes used {others:.0%} of the machine while measuring")
            if steal / total > 0.02:
                self.warnings.append(f"the hypervisor took {steal / total:.0%} of the CPU time while measuring")
        if self.device.type == "cuda":
            self.warnings += gpu_warnings()


def gpu_warnings() -> list[str]:
    """Throttling and company on the GPU, from nvidia-smi (which only reads here)."""
    out = []
    reasons = _run("nvidia-smi", "--query-gpu=clocks_event_reasons.active", "--format=csv,noheader").splitlines()
    harmless = 0x1 | 0x2  # idle; application clocks
    active = next((line.strip() for line in reasons if re.fullmatch(r"0x[0-9a-fA-F]+", line.strip())), "0x0")
    if int(active, 16) & ~harmless:
        out.append(f"the GPU reports throttling (clocks_event_reasons {active})")
    pids = _run("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader").split()
    strangers = [p for p in pids if p.isdigit() and int(p) != os.getpid()]
    if strangers:
        out.append(f"{len(strangers)} other process(es) on the GPU")
    return out
