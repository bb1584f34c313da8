"""What surrounds the benchmarks' timings: company, resumed trainings, merged results, the words of a comparison."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: what is installed comes first

pytest.importorskip("benchmarks", reason="needs the checkout")

from benchmarks import goals, timing  # noqa: E402
from benchmarks.__main__ import main, make_parser  # noqa: E402
from benchmarks.bandwidth import Bandwidth  # noqa: E402
from benchmarks.commands import converge, everything  # noqa: E402
from benchmarks.commands.compare import verdict  # noqa: E402
from benchmarks.commands.everything import plan, share_of  # noqa: E402
from benchmarks.commands.run import Run  # noqa: E402
from benchmarks.decay import VARIANTS, cells_of, measure  # noqa: E402
from benchmarks.limit import TimeUpError, broken_off_after  # noqa: E402
from benchmarks.load import Busy, company  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.measure import Session  # noqa: E402
from benchmarks.problem import NotAvailable, Side  # noqa: E402
from benchmarks.report import Result, Row  # noqa: E402
from benchmarks.store import MachineResults  # noqa: E402
from benchmarks.systems import SYSTEMS, System, get_systems  # noqa: E402
from benchmarks.tables import TABLES, not_first  # noqa: E402

MACHINE = {"device": "cpu", "cpu": "Paper CPU", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": "abc"}


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.commands.run.measure_bandwidth", lambda *_: Bandwidth(10.0, 10.0, None, 1))


# ---- company ----


def test_busy_processes_use_the_cpu_and_are_gone_afterwards() -> None:
    before = os.times()
    with Busy(2) as busy:
        pids = [process.pid for process in busy._processes]
        sum(range(3_000_000))
    after = os.times()
    assert len(pids) == 2 and after.children_user > before.children_user
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_company_is_said_of_nobody_and_a_negative_one_is_refused() -> None:
    assert (company(0), company(1), company(2)) == ("", "beside 1 busy process", "beside 2 busy processes")
    with pytest.raises(ValueError, match="--beside -1"):
        Busy(-1)


def test_step_in_company_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["step", "--opt", "sgd", "--shape", "3x64", "--vs", "none", "--seconds", "0.01", "--quick"]
    assert main([*arguments, "--device", "cpu", "--beside", "1", "--out", str(tmp_path)]) == 0
    assert "SGD (sgd), fp32, cpu, beside 1 busy process" in capsys.readouterr().out
    result = Result.load(tmp_path / "step-beside-1.json")
    assert result.settings["beside"] == 1 and all(row["beside"] == 1 for row in result.rows)
    assert MachineResults.collect(tmp_path).condition() == "beside 1 busy process"


def test_targets_measure_timed_goals_in_both_conditions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []

    def planted(name: str, unit: str) -> goals.Goal:
        def measured(run: Run) -> tuple[float, str]:
            seen.append((name, len(run._busy._processes)))
            return 3.0 if run.session.beside else 1.0, "planted"

        return goals.Goal(name, 2.0, unit, measured)

    monkeypatch.setattr(goals, "cpu_goals", lambda: [planted("speed", "x"), planted("bytes", "B")])
    assert main(["targets", "--device", "cpu", "--beside", "2", "--out", str(tmp_path)]) == 1  # missed alone
    assert seen == [("speed", 0), ("speed", 2), ("bytes", 0)]
    assert "beside 2 busy processes" in capsys.readouterr().out
    speed, size = Result.load(tmp_path / "targets.json").goals
    assert (speed["value"], speed["verdict"], speed["beside_value"], speed["beside_verdict"]) == (1, "MISSED", 3, "met")
    assert "beside" not in size
    table = TABLES["goals"](MachineResults.collect(tmp_path))
    assert "| goal | bound | alone |  | beside 2 busy processes |  |" in table
    assert "| speed | at least 2 x | 1.00 x | MISSED | 3.00 x | met |" in table
    assert "targets --beside 2" in [line.text for line in plan(False, False, 2)]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_every_line_of_the_plan_can_be_run_and_gets_its_share(gpu: bool, quick: bool) -> None:
    lines = plan(quick, gpu)
    for line in lines:
        assert make_parser().parse_args(line.words).command == line.words[0]
    heavy = max(lines, key=lambda line: line.weight)
    assert share_of(100, [heavy, *lines]) > share_of(100, [lines[0], *lines])
    assert share_of(100, lines[-1:]) == 125 and share_of(-5, lines) == 1


def test_what_takes_too_long_is_broken_off() -> None:
    with pytest.raises(TimeUpError), broken_off_after(0.05):
        time.sleep(600)
    with broken_off_after(600):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


def test_a_line_of_the_plan_that_is_broken_off_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stuck(case: Any, _problem: Any, _options: Any) -> Side:
        if case.key == "adamw":
            signal.raise_signal(signal.SIGALRM)  # as if it had compiled for an hour
        raise NotAvailable("not there")

    monkeypatch.setitem(SYSTEMS, "stuck", System("stuck", "stuck", stuck))
    lines = [everything.Line(1, text) for text in ("step --opt sgd,adamw,lion --shape 3x64 --vs stuck", "env")]
    monkeypatch.setattr(everything, "plan", lambda *_: lines)
    assert main(["all", "--limit", "500", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "broken off by the time limit" in output and "=== env" in output
    result = Result.load(tmp_path / "step.json")
    assert [(r["optimizer"], r["status"]) for r in result.rows if r["system"] == "fused"] == [("sgd", "ok")]
    assert "broken off by the time limit" in result.warnings


def test_no_line_begins_after_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "run_line", lambda *_: time.sleep(0.02) or 0)
    _results(tmp_path)
    assert main(["all", "--quick", "--limit", "0.01", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "time limit of 0.01 s: left out: step; pipeline;" in capsys.readouterr().out


def _results(folder: Path) -> None:
    Result("step", MACHINE, {}, [vars(_row("fused", "a", 1.0))]).save(folder)


def test_the_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "1a2b3c4")
    assert describe(torch.device("cpu"))["commit"] == "1a2b3c4"
    monkeypatch.setenv("COMMIT", "")
    assert describe(torch.device("cpu"))["commit"] != "1a2b3c4"


def test_cells_share_the_time_that_is_left() -> None:
    session = Session(torch.device("cpu"), timing.Budget(), Bandwidth(1.0, 1.0, None, 1), planned=4)
    assert session.part() == float("inf") and not session.is_over()
    session.planned, now = 4, time.perf_counter()
    session.deadline = now + 8.0
    assert session.part() == pytest.approx(now + 3.0, abs=0.5) and session.planned == 3
    session.leave_out("a", "b")
    assert session.part() == pytest.approx(now + 12.0, abs=0.5)  # the last one: nobody else needs it
    session.deadline = now - 1.0
    assert session.is_over() and session.left_out == ["a", "b"]
    calls: list[int] = []
    budget = timing.Budget(seconds=60, min_rounds=9, fewest=3, max_rounds=50, warmup=2)
    timing.interleave([Side("a", "a", [], lambda: calls.append(1))], timing.CpuClock(), budget, stop_at=now)
    assert len(calls) == 3


def test_a_slow_system_sits_out_and_the_others_go_on() -> None:
    class Clock:
        def sample(self, step: Any, _prepare: Any) -> timing.Sample:
            start = time.perf_counter()
            step()
            return timing.Sample(*[time.perf_counter() - start] * 3)

    calls = dict.fromkeys("abc", 0)

    def side(name: str, seconds: float) -> Side:
        def step() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return Side(name, name, [], step)

    budget = timing.Budget(seconds=0.02, min_rounds=9, max_rounds=12, warmup=2)
    results = timing.interleave([side("a", 0.002), side("b", 0.05), side("c", 0.002)], Clock(), budget)
    assert len(results["b"].walls) == 3 and calls["b"] == 4  # one to warm up
    assert len(results["a"].walls) == len(results["c"].walls) >= 9
    assert timing.paired_ratio(results["b"].walls, results["a"].walls).rounds == 3


def test_rows_of_different_conditions_are_not_mixed() -> None:
    rows = [{"bench": "step", "median_ms": 1.0}, {"bench": "step", "median_ms": 9.0, "beside": 2}]
    results = MachineResults(MACHINE, {"step": Result("step", MACHINE, {}, rows)})
    assert [r["median_ms"] for r in results.rows("step")] == [1.0] and not results.condition()


def test_a_cell_that_two_commands_measured_is_given_once_as_a_whole() -> None:
    def measured(ours: float, theirs: float, *profiles: str) -> list[dict[str, Any]]:
        return [vars(_row(*cell)) for p in profiles for cell in (("fused", p, ours), ("torch.fused", p, theirs, 2.0))]

    sections = {
        name: Result(name, MACHINE, {}, [{**r, "bench": "pipeline"} for r in rows])
        for name, rows in (("targets", measured(1.0, 2.0, "a", "b")), ("pipeline", measured(5.0, 10.0, "a")))
    }
    rows = MachineResults(MACHINE, sections).rows("pipeline")
    assert [(r["profile"], r["median_ms"]) for r in rows] == [("a", 5.0), ("a", 10.0), ("b", 1.0), ("b", 2.0)]


# ---- trainings ----


def test_trainings_resume_and_come_out_in_the_tables_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[str, int]] = []

    def train(_run: Any, form: converge.Format, size: str, steps: int, seed: int, _tell: Any) -> dict[str, Any]:
        trained.append((form.key, seed))
        return {
            "bench": "converge", "format": form.label, "seed": seed, "steps": steps, "size": size,
            "validation_loss": 2.0 + seed, "losses": [3.0],
        }  # fmt: skip

    monkeypatch.setattr(converge, "train", train)
    arguments = ["converge", "--what", "loss", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*arguments, "--formats", "split,torch-bf16"]) == 0
    assert trained == [("split", 0), ("torch-bf16", 0), ("split", 1), ("torch-bf16", 1)]
    trained.clear()
    assert main([*arguments, "--formats", "split,torch-fp32", "--resume"]) == 0
    assert trained == [("torch-fp32", 0), ("torch-fp32", 1)]
    rows = Result.load(tmp_path / "converge.json").rows
    assert [(r["seed"], r["format"]) for r in rows] == [
        (s, f) for s in (0, 1) for f in ("torch float32", "bf16 split", "torch bf16")
    ]
    capsys.readouterr()
    assert main([*arguments, "--steps", "7", "--resume"]) == 2
    assert "1000 steps" in capsys.readouterr().err
    assert main(["converge", "--resume"]) == 2 and "--out" in capsys.readouterr().err
    assert main(["converge", "--formats", "nosuch"]) == 2 and "split8-int8" in capsys.readouterr().err


def test_one_training_learns(tmp_path: Path) -> None:
    arguments = ["--steps", "3", "--seeds", "1", "--formats", "split", "--device", "cpu", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert main(["converge", "--what", "loss", *arguments, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = Result.load(tmp_path / "converge.json")
    (row,) = result.rows
    assert row["losses"][-1] < row["losses"][0] and 3 < row["validation_loss"] < row["losses"][0]
    assert result.settings["threads"] == 1 and result.machine["threads"] == threads  # quality: the machine is the same


def test_decay_is_lost_by_bfloat16_alone() -> None:
    by_label = {v.label: v for v in VARIANTS}
    for label, kept in (("fused, split", True), ("fused, split8", True), ("fused, stochastic", True), ("torch", False)):
        record = measure(by_label[label], torch.device("cpu"))
        assert (record["mean_error"] < 0.01) == kept and (record["share_of_decay"] > 0.95) == kept, record
        assert cells_of(record)[-1] == ("yes" if kept else "no")
    get_systems("all")  # registers the third parties
    absent = replace(by_label["torch"], system="apex")  # needs a GPU
    assert measure(absent, torch.device("cpu"))["status"] != "ok"


# ---- results ----


def test_publishing_keeps_what_the_folder_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.commands import publish

    monkeypatch.setattr(publish.readme, "run", lambda _: 0)
    monkeypatch.setattr(publish, "draw", lambda *_: [])
    row = {"bench": "converge", "format": "x", "seed": 0}
    for command, folder in (("converge", "first"), ("step", "second")):
        Result(command, MACHINE, {}, [row]).save(tmp_path / folder)
        assert main(["publish", str(tmp_path / folder), "--results", str(tmp_path / "results")]) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    assert set(MachineResults.load(path).sections) == {"converge", "step"}


def test_what_a_limit_leaves_out_stays_published_with_its_commit_and_date() -> None:
    def row(profile: str, ms: float) -> dict[str, Any]:
        return vars(_row("fused", profile, ms))

    def goal(text: str, value: float | None, how: str = "") -> dict[str, Any]:
        verdict = "met" if value else "not available"
        return {"goal": text, "bound": 1, "unit": "x", "at_most": False, "value": value, "verdict": verdict, "how": how}

    old_goals = [goal("a", 3.0), goal("b", 4.0)]
    old = MachineResults(
        MACHINE,
        {
            "compare": Result("compare", MACHINE, {}, [row("x", 1.0), row("y", 2.0), row("z", 3.0)],
                              settings={"commit": "old"}, when="2026-01-02T03:04Z"),
            "host": Result("host", MACHINE, {}, [row("h", 1.0)], settings={"commit": "old"}, when="2026-01-02T03:04Z"),
            "targets": Result("targets", MACHINE, {}, [], [], {"commit": "old"}, old_goals, "2026-01-02T03:04Z"),
        },
    )  # fmt: skip
    new_goals = [goal("a", None, "time limit"), goal("b", None, "needs more memory"), goal("c", None, "time limit")]
    settings = {"commit": "new", "left_out": ["compare adamw fp32 y"]}
    new = MachineResults(
        MACHINE,
        {
            "compare": Result("compare", MACHINE, {}, [row("x", 5.0)], settings=settings, when="2026-02-03T04:05Z"),
            "host": Result("host", MACHINE, {}, [], settings={"commit": "new"}, when="2026-02-03T04:05Z"),
            "targets": Result("targets", MACHINE, {}, [], [], {"commit": "new"}, new_goals, "2026-02-03T04:05Z"),
        },
    )
    both = new.with_earlier(old)
    rows = both.sections["compare"].rows
    assert [(r["profile"], r["median_ms"], r["commit"]) for r in rows] == [("x", 5.0, ""), ("y", 2.0, "old")]
    assert both.sections["host"].rows[0]["profile"] == "h"  # nothing was measured this time
    assert [g["value"] for g in both.sections["targets"].goals] == [3.0, None, None]
    assert "| met (commit old, 2026-01-02) |" in TABLES["goals"](both)
    assert both.origin("compare") == "commit new and old, 2026-01-02 and 2026-02-03"
    again = both.with_earlier(old)
    assert again.sections["compare"].rows == rows


def test_losses_are_listed_from_the_data() -> None:
    assert not_first([("a", "torch", 0.99)]) == "Ours is first, within 3 %, in each of 1 cells.\n"
    text = not_first([("a", "torch", 0.9), ("b", "torch", 2.0), ("c", "torch", 0.5)])
    assert text.splitlines() == [
        "Ours is first, within 3 %, in 1 of 3 cells; not first:", "",
        "- c: torch takes 50% less time", "- a: torch takes 10% less time",
    ]  # fmt: skip


def _row(system: str, profile: str, ms: float, ratio: float | None = None) -> Row:
    return Row("compare", "adamw", "fp32", profile, 1, 1, system, system, median_ms=ms, ratio=ratio)


def test_where_ours_is_not_first_is_said_in_words() -> None:
    rows = [_row("fused", "a", 2.0), _row("peer", "a", 1.5, 0.75), _row("fused", "b", 2.0), _row("peer", "b", 4.0, 2.0)]
    assert verdict(rows) == [
        "ours is first, within 3 %, in 1 of 2 comparisons; not first:",
        "  adamw fp32 a: peer takes 1.50 ms, 25% less than our 2.00 ms",
    ]
    assert verdict(rows[2:]) == ["ours is first, within 3 %, in each of 1 comparisons"]
    assert verdict(rows[:1]) == []
    results = MachineResults(MACHINE, {"compare": Result("compare", MACHINE, {}, [vars(r) for r in rows])})
    assert "\n\n- adamw fp32 a: peer takes 1.50 ms, 25% less than our 2.00 ms\n" in TABLES["compare"](results)
