"""`memory`: bytes per parameter that each system keeps between steps (counted from the tensors themselves), and the
peak beyond that during one step."""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cases import MASTER_BYTES, Case, Precision, get_cases, held_bytes
from ..measure import gpu_footprint
from ..problem import NotAvailable, Problem, Side
from ..report import Progress, Row, cell_name, number, show_table
from ..shapes import Profile, get_profile
from ..systems import SYSTEMS, Options, System
from .arguments import add_run_arguments, systems_of
from .run import Run

HELP = "bytes per parameter held by each optimizer and storage format, and the peak during a step"
PRECISIONS = (
    Precision(),
    Precision("bf16"),
    Precision("bf16", "fp32"),
    Precision("bf16", "split"),
    Precision("bf16", "split", "bf16"),
    Precision("bf16", "split8", "int8"),
    Precision("bf16", None, "int8", True),
    Precision("fp32", None, "int8"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--opt", default="adamw,lion,sgd,adafactor", help="comma list of optimizers")
    parser.add_argument("--vs", default="all", help="systems to count beside")
    parser.add_argument("--profile", default="4x1024x1024", help="a profile or shape")


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(match[1]) * 1024 if match else 0


def cpu_peak(side: Side) -> int | None:
    """Growth of the process during one step, beyond what it held; None where only Linux could tell."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
        before = _status("VmRSS")
        side.step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def measure_memory(case: Case, precision: Precision, system: System, profile: Profile, device: torch.device) -> Row:
    problem = Problem(profile, precision, device)
    row = Row(
        "memory", case.key, precision.name, profile.name, profile.tensors, profile.elements, system.key, system.key,
        version=system.version(),
    )  # fmt: skip
    try:
        side = system.make(case, problem, Options())
        for _ in range(2):
            side.step()
    except NotAvailable as reason:
        row.status = f"not available: {reason}" if str(reason) != "not installed" else "not installed"
        return row
    except Exception as error:  # noqa: BLE001  a peer may raise anything
        row.status = f"not available: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        return row
    row.label, row.note = side.label, side.note
    row.held_bytes = side.held_bytes() / profile.elements
    row.temporary_bytes = gpu_footprint(side, device)[0] if device.type == "cuda" else cpu_peak(side)
    return row


def distinct(rows: Sequence[Row]) -> list[Row]:
    """torch's forms hold the same: one row stands for all of them."""
    seen = set()
    out = []
    for row in rows:
        key = (row.optimizer, row.precision, row.system.partition(".")[0] if row.ok else row.system, row.held_bytes)
        if row.ok and key not in seen:
            seen.add(key)
            out.append(row)
    return out


def model_error(rows: Sequence[Row], cases: Sequence[Case]) -> list[str]:
    """Where this package holds more than the bytes model says."""
    by_key = {c.key: c for c in cases}
    precisions = {p.name: p for p in PRECISIONS}
    out = []
    for row in rows:
        if row.system == "fused" and row.ok and row.held_bytes is not None:
            model = held_bytes(by_key[row.optimizer], precisions[row.precision])
            if row.held_bytes > model + 0.02:
                out.append(
                    f"{row.optimizer} {row.precision}: holds {row.held_bytes:.3f} bytes per element, model {model:.3f}"
                )
    return out


def run(args: argparse.Namespace) -> int:
    cases = get_cases(args.opt)
    others = systems_of(args)
    systems = [SYSTEMS["fused"], *(s for s in others if s.key not in ("torch.foreach", "torch.compile"))]
    profile = get_profile(args.profile)
    run_ = Run("memory", args, timed=False)
    with run_, Progress("memory", len(cases) * len(PRECISIONS)) as progress:
        for case in cases:
            rows = []
            for precision in PRECISIONS:
                progress(f"{case} {precision.name}")
                if run_.session.is_over():
                    run_.session.leave_out(cell_name("memory", case.key, precision.name, profile.name))
                    continue
                measured = [measure_memory(case, precision, system, profile, run_.device) for system in systems]
                rows += run_.keep(measured)
            cells = [
                [
                    r.precision,
                    r.label,
                    number(r.held_bytes, 4),
                    "-" if r.temporary_bytes is None else number(r.temporary_bytes / r.elements),
                    r.note,
                ]
                for r in distinct(rows)
            ]
            missing = sorted({f"{r.system}: {r.status}" for r in rows if r.status == "not installed"})
            columns = ["storage", "system", "held B/param", "peak B/param more", "note"]
            show_table(f"{case.cls}: bytes per parameter, {profile.name}", columns, cells, "; ".join(missing))
        run_.session.warnings += model_error(run_.rows, cases)
    masters = ", ".join(f"{k} {v:g}" for k, v in MASTER_BYTES.items() if k)
    print(f"held: parameter, masters ({masters}) and states; gradients not counted")
    return run_.exit_code
