"""Tables and progress (rich on a terminal, plain when piped), JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .timing import Timed

SCHEMA = 1


def cell_name(bench: str, optimizer: str, precision: str, profile: str) -> str:
    """What rows that were measured together are called where they are left out."""
    return " ".join([bench, *([] if optimizer == "-" else [optimizer]), precision, profile])


@dataclass
class Row:
    """One measurement. Times in milliseconds, bandwidths in GB/s; `ratio` = this system's time / ours: above 1, ours is
    faster."""

    bench: str
    optimizer: str
    precision: str
    profile: str
    tensors: int
    elements: int
    system: str
    label: str
    status: str = "ok"  # or "not available: why", "wrong result: how"
    version: str = ""
    groups: int = 1
    beside: int | None = None  # busy processes beside it
    rounds: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    best_ms: float | None = None
    host_ms: float | None = None
    device_ms: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    device_ratio: float | None = None
    model_bytes: float | None = None  # least bytes moved per element
    gbs: float | None = None
    copy_fraction: float | None = None
    peak_fraction: float | None = None  # of the theoretical bandwidth
    held_bytes: float | None = None  # parameters and state, per element
    temporary_bytes: int | None = None  # peak beyond what is held, during one step
    launches: int | None = None
    error: float | None = None
    note: str = ""
    commit: str = ""  # and date, where the row is of an earlier run than its section
    when: str = ""

    @property
    def cell(self) -> str:
        return cell_name(self.bench, self.optimizer, self.precision, self.profile)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def take_times(self, timed: Timed) -> None:
        wall = timed.wall
        self.rounds = wall.rounds
        self.median_ms, self.p20_ms = 1e3 * wall.median, 1e3 * wall.p20
        self.p80_ms, self.best_ms = 1e3 * wall.p80, 1e3 * wall.best
        self.host_ms, self.device_ms = 1e3 * timed.host.median, 1e3 * timed.device.median


def tidy(value: Any) -> Any:
    """Floats to six digits: enough for any use, and small files."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: tidy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(v) for v in value]
    return value


def dump(data: Any) -> str:
    """JSON with one row per line: small files, readable differences."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda m: re.sub(r"\s*\n\s*", " ", m[0]), text) + "\n"


@dataclass
class Result:
    """Everything one command measured; what a JSON file holds."""

    command: str
    machine: dict[str, Any]
    bandwidth: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    goals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    when: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        self.when = self.when or time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())

    def as_dict(self) -> dict[str, Any]:
        data = tidy(dataclasses.asdict(self))
        data["rows"] = [{k: v for k, v in row.items() if v is not None and v != ""} for row in data["rows"]]
        return dict(data)

    def save(self, directory: Path, name: str | None = None) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / (name or self.command)
        data = self.as_dict()
        stem.with_suffix(".json").write_text(dump(data), encoding="utf-8")
        if self.rows:
            columns = list(dict.fromkeys(k for row in self.rows for k in row if k != "losses"))
            with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(data["rows"])
        return stem.with_suffix(".json")

    @classmethod
    def load(cls, path: Path) -> Result:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "result") -> Result:
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{where}: schema {data.get('schema')}, this reads {SCHEMA}")
        return cls(**data)


@functools.cache
def _rich() -> Any:
    """The one rich console, shared by tables and the live bar; None where there is no terminal or no rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first is left-aligned, and any that holds text."""
    cells = [list(columns), *([*row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    left = [i == 0 or any(row[i][:1].isalpha() for row in cells[1:]) for i in range(len(columns))]
    lines = []
    for row in cells:
        parts = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(row, widths, left, strict=True)]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    console = _rich()
    if console is None:
        print(f"\n{title}\n{plain_table(columns, rows)}")
        if caption:
            print(caption)
        sys.stdout.flush()
        return
    from rich.table import Table

    table = Table(
        title=title, caption=caption or None, header_style="bold", title_justify="left", caption_justify="left"
    )
    for i, column in enumerate(columns):
        text = i == 0 or any(row[i][:1].isalpha() for row in rows)
        table.add_column(column, justify="left" if text else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def say(message: str) -> None:
    _line(message, "dim")


def warn(message: str) -> None:
    _line(f"warning: {message}", "yellow")


def _line(message: str, style: str) -> None:
    if console := _rich():
        console.print(message, style=style, highlight=False, markup=False)
    else:
        print(message, flush=True)


class Progress:
    """A live bar with the current cell on a terminal; nothing when piped (the tables tell).

    with Progress("step", total) as progress:
        progress("adamw gpt2"); ...
    """

    def __init__(self, what: str, total: int) -> None:
        self._bar: Any = None
        if console := _rich():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            # No refresh thread: it would run in the middle of what is being timed.
            columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            description = TextColumn("{task.description}")
            self._bar = RichProgress(*columns, description, console=console, transient=True, auto_refresh=False)
            self._task = self._bar.add_task("", total=total)
        self._started = False

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __call__(self, description: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=description, advance=int(self._started), refresh=True)
            self._started = True

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent; '-' for nothing."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.{digits - 1}f}" if abs(value) >= 1 else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}x"
