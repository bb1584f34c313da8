"""Result files: one per machine in benchmarks/results, made of what each command measured there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import ROOT
from .load import company
from .machine import slug, title
from .report import SCHEMA, Result, cell_name, dump

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
        measured alone, or beside the fewest busy processes. A cell that several commands measured is given once, as a
        whole: ratios hold within a run only. The goals' own measurement comes after the command that is made for it."""
        found = [
            (name, row)
            for name, section in sorted(self.sections.items(), key=lambda item: item[0] == "targets")
            for row in section.rows
            if row.get("bench") in benches
        ]
        fewest = _fewest(row for _, row in found)
        chosen = [(name, row) for name, row in found if (row.get("beside") or 0) == fewest]
        command_of: dict[tuple[Any, ...], str] = {}
        return [row for name, row in chosen if command_of.setdefault(_measured(row), name) == name]

    def sections_of(self, *benches: str) -> list[Result]:
        """Those that hold rows of the benches, or goals for the bench "goals"; all for no name."""
        return [
            s
            for s in self.sections.values()
            if not benches or (s.goals and "goals" in benches) or any(r.get("bench") in benches for r in s.rows)
        ]

    def condition(self, *benches: str) -> str:
        """The busy processes beside the measurements that `rows` gives: what a label must say."""
        everything = [r for s in self.sections.values() for r in s.rows]
        timed = {r.get("bench") for r in everything} - {"memory", "converge", "decay", "goal"}
        chosen = timed & set(benches) if benches else timed
        loads = {_fewest([r for r in everything if r.get("bench") == bench]) for bench in chosen}
        partly = "partly " if len(loads) > 1 else ""
        return partly + company(max(loads)) if any(loads) else ""

    def origin(self, *benches: str) -> str:
        """Commits and dates of what the benches' rows are from."""
        sections = self.sections_of(*benches)
        commits = dict.fromkeys(s.settings.get("commit") or self.machine.get("commit") or "?" for s in sections)
        days = {s.when[:10] for s in sections}
        for row in self.rows(*benches):  # of an earlier run
            if row.get("when"):
                commits |= {row["commit"]: None}
                days |= {row["when"][:10]}
        quick = ["QUICK RUN"] if any(s.settings.get("quick") for s in sections) else []
        return ", ".join([f"commit {' and '.join(commits)}", " and ".join(sorted(days)), *quick])

    def with_earlier(self, earlier: MachineResults) -> MachineResults:
        """These results, and of the earlier ones what these lack: whole commands that did not run or measured nothing,
        and what the time limit left out, with its own commit and date."""
        sections = dict(earlier.sections)
        for name, section in self.sections.items():
            old = earlier.sections.get(name)
            if old is None or (name == "env" or section.rows or section.goals):
                sections[name] = section if old is None else _completed(section, old, earlier.machine)
        return MachineResults(self.machine, sections)

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


def _completed(new: Result, old: Result, machine: dict[str, Any]) -> Result:
    origin = {"commit": old.settings.get("commit") or machine.get("commit") or "?", "when": old.when}

    def dated(record: dict[str, Any]) -> dict[str, Any]:
        return record | {key: record.get(key) or value for key, value in origin.items()}

    left_out = set(new.settings.get("left_out", ())) - {_cell(row) for row in new.rows}
    kept = [dated(row) for row in old.rows if _cell(row) in left_out]
    measured = {g["goal"]: g for g in old.goals if g.get("value") is not None}
    goals = [dated(measured[g["goal"]]) if _no_time(g) and _same(g, measured.get(g["goal"])) else g for g in new.goals]
    return replace(new, rows=[*new.rows, *kept], goals=goals)


def _cell(row: dict[str, Any]) -> str:
    return cell_name(row["bench"], row.get("optimizer", "-"), row.get("precision", ""), row.get("profile", ""))


def _measured(row: dict[str, Any]) -> tuple[Any, ...]:
    return _cell(row), row.get("tensors"), row.get("groups")


def _no_time(goal: dict[str, Any]) -> bool:
    return goal.get("value") is None and goal.get("how") == "time limit"


def _same(goal: dict[str, Any], old: dict[str, Any] | None) -> bool:
    return old is not None and goal["bound"] == old["bound"]


def _fewest(rows: Iterable[dict[str, Any]]) -> int:
    return min((int(r.get("beside") or 0) for r in rows), default=0)


def published(directory: Path = RESULTS) -> list[MachineResults]:
    """All machines with committed results."""
    return [MachineResults.load(path) for path in sorted(directory.glob("*.json"))]
