"""Result files: one per machine in benchmarks/results, made of what each command measured there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ROOT
from .load import company
from .machine import slug, title
from .report import SCHEMA, Result, dump

RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class MachineResults:
    """Everything measured on one machine, by command."""

    machine: dict[str, Any]
    sections: dict[str, Result] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return slug(self.machine)

    @property
    def title(self) -> str:
        return title(self.machine)

    def rows(self, *benches: str) -> list[dict[str, Any]]:
        """Rows of the named benches ("step", "pipeline", "host", ...), over all commands, all of one condition: those
        measured alone, or beside the fewest busy processes."""
        rows = [r for s in self.sections.values() for r in s.rows if r.get("bench") in benches]
        fewest = _fewest(rows)
        return [r for r in rows if (r.get("beside") or 0) == fewest]

    @property
    def condition(self) -> str:
        """The busy processes beside the measurements that `rows` gives: what a label must say."""
        everything = [r for s in self.sections.values() for r in s.rows]
        benches = {r.get("bench") for r in everything} - {"memory", "converge", "decay"}
        loads = {_fewest([r for r in everything if r.get("bench") == bench]) for bench in benches}
        partly = "partly " if len(loads) > 1 else ""
        return partly + company(max(loads)) if any(loads) else ""

    def save(self, directory: Path = RESULTS) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.slug}.json"
        sections = {name: section.as_dict() for name, section in sorted(self.sections.items())}
        for section in sections.values():
            del section["machine"]
        data = {"schema": SCHEMA, "machine": self.machine, "sections": sections}
        path.write_text(dump(data), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> MachineResults:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA or "sections" not in data:
            raise ValueError(f"{path}: no result file of schema {SCHEMA}")
        machine = data["machine"]
        sections = {
            name: Result.from_dict({**section, "machine": machine}, str(path))
            for name, section in data["sections"].items()
        }
        return cls(machine, sections)

    @classmethod
    def collect(cls, directory: Path) -> MachineResults:
        """From the JSON files that the commands wrote into a folder."""
        sections = {}
        for path in sorted(directory.glob("*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            if "command" in data:
                sections[path.stem] = Result.from_dict(data, str(path))
        if not sections:
            raise ValueError(f"{directory}: no results (JSON files of `step`, `host`, ...)")
        newest = max(sections.values(), key=lambda s: s.when)
        return cls(newest.machine, sections)


def _fewest(rows: Iterable[dict[str, Any]]) -> int:
    return min((int(r.get("beside") or 0) for r in rows), default=0)


def published(directory: Path = RESULTS) -> list[MachineResults]:
    """All machines with committed results."""
    return [MachineResults.load(path) for path in sorted(directory.glob("*.json"))]
