"""The benchmarks' own machinery: what it refuses, what it counts, what it writes. No speed is tested here."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: what is installed comes first

import fused  # noqa: E402

pytest.importorskip("benchmarks", reason="needs the checkout")

from benchmarks import goals, timing  # noqa: E402
from benchmarks.__main__ import COMMANDS, main, make_parser  # noqa: E402
from benchmarks.bandwidth import Bandwidth  # noqa: E402
from benchmarks.cases import CASES, MAIN, Case, Precision, get_cases, held_bytes, step_bytes  # noqa: E402
from benchmarks.commands import host, kernel  # noqa: E402
from benchmarks.gate import STEPS, Verdict, check  # noqa: E402
from benchmarks.goals import cpu_goals, gpu_goals  # noqa: E402
from benchmarks.gradients import FUNCTIONS, GradientSides, gradient_cells, tolerance  # noqa: E402
from benchmarks.measure import Session  # noqa: E402
from benchmarks.problem import NotAvailable, Problem, Side, storage_bytes, total_norm  # noqa: E402
from benchmarks.report import Result, Row, number, plain_table  # noqa: E402
from benchmarks.shapes import PROFILES, get_profile, parse_count, shrink  # noqa: E402
from benchmarks.store import MachineResults, published  # noqa: E402
from benchmarks.systems import SYSTEMS, TORCH, Options, System, get_systems, torch_optimizer  # noqa: E402
from benchmarks.tables import fill  # noqa: E402

ELEMENTWISE = [key for key, case in CASES.items() if case.elementwise]
TINY = get_profile("5x100")


# ---- shapes and registry ----


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2", 148, 124_439_808),
        ("gpt2-xl", 580, 1_557_611_200),
        ("llama3-8b", 291, 8_030_261_248),
        ("resnet50", 161, 25_557_032),
        ("vit-l", 296, 304_326_632),
        ("tiny", 10_000, 2_560_000),
        ("1000x32K", 1000, 1000 * 32768),
        ("1000x64x64", 1000, 1000 * 4096),
        ("1x32M", 1, 1 << 25),
    ],
)
def test_profiles_have_the_published_sizes(name: str, tensors: int, elements: int) -> None:
    profile = get_profile(name)
    assert (profile.tensors, profile.elements) == (tensors, elements)


def test_a_shard_is_a_share_of_every_tensor() -> None:
    whole, shard = get_profile("llama3-8b"), get_profile("llama3-8b/8")
    assert shard.tensors == whole.tensors
    assert shard.elements == pytest.approx(whole.elements / 8, rel=1e-3)
    assert shrink(get_profile("1x32M"), parse_count("1M")).elements == 1 << 20
    assert shrink(get_profile("gpt2"), 10_000_000).elements == pytest.approx(10_000_000, rel=0.1)


@pytest.mark.parametrize("name", ["nosuch", "3y5", "4xQ"])
def test_unknown_profiles_say_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"gpt2|example"):
        get_profile(name)


def test_every_optimizer_of_the_package_has_a_case() -> None:
    classes = {
        name
        for name in fused.__all__
        if isinstance(cls := getattr(fused, name), type)
        and issubclass(cls, fused.FusedOptimizer)
        and cls is not fused.FusedOptimizer
    }
    assert classes <= {case.cls for case in CASES.values()}
    assert classes <= {CASES[key].cls for key in MAIN} | {"Adam"}


def test_every_test_case_of_the_package_has_a_benchmark() -> None:
    tested = {case.name for case in pytest.importorskip("cases", reason="tests/cases.py").CASES}
    assert tested <= {case.cls for case in CASES.values()}


def test_names_that_do_not_exist_raise() -> None:
    with pytest.raises(ValueError, match="adamw"):
        get_cases("adamw,nosuch")
    with pytest.raises(ValueError, match=r"torch\.fused"):
        get_systems("nosuch")
    assert main(["step", "--opt", "nosuch"]) == 2


# ---- the correctness gate ----


def side_of(optimizer_class: Any, problem: Problem, **kwargs: Any) -> Side:
    params = problem.parameters()
    optimizer = optimizer_class(params, **kwargs)
    return Side("planted", "planted", params, optimizer.step, optimizer)


def verdict_of(side: Side, case: Case, problem: Problem) -> Verdict:
    verdict = check(case, problem, [side])[side.system]
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.mark.parametrize("key", [*ELEMENTWISE, "adafactor"])
@pytest.mark.parametrize("form", ["foreach", "loop"])
def test_gate_passes_torch(key: str, form: str) -> None:
    case = CASES[key]
    problem = Problem(get_profile("3x7x9"), Precision())
    params = problem.parameters()
    optimizer = torch_optimizer(case, params, form)
    assert verdict_of(Side("planted", "", params, optimizer.step, optimizer), case, problem).ok


@pytest.mark.parametrize("key", ELEMENTWISE)
def test_gate_passes_this_package(key: str) -> None:
    problem = Problem(TINY, Precision())
    side = SYSTEMS["fused"].make(CASES[key], problem, Options())
    assert verdict_of(side, CASES[key], problem).ok


class _Wrong(torch.optim.AdamW):
    """AdamW with a mistake planted after or before the right step."""

    def __init__(self, params: Any, mistake: str, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.mistake = mistake

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        if self.mistake == "nothing":
            return
        super().step()
        for p, old in zip(params, before, strict=True):
            if self.mistake == "sign":
                p.copy_(2 * old - p)
            elif self.mistake == "tail":
                p[-3:] = old[-3:]
            elif self.mistake == "rate":
                p.copy_(old + 1.01 * (p - old))
            elif self.mistake == "nan":
                p[0] = math.nan
            elif self.mistake == "gradients":
                p.grad.mul_(0.5)


@pytest.mark.parametrize("mistake", ["nothing", "sign", "tail", "rate", "nan", "gradients"])
def test_gate_refuses_mistakes(mistake: str) -> None:
    case = CASES["adamw"]
    problem = Problem(TINY, Precision())
    side = side_of(_Wrong, problem, mistake=mistake, **case.kwargs)
    assert not verdict_of(side, case, problem).ok


@pytest.mark.parametrize("precision", [Precision(), Precision("bf16")], ids=lambda p: p.name)
def test_gate_refuses_coupled_and_missing_decay(precision: Precision) -> None:
    case = CASES["adamw"]
    for kwargs, cls in (
        (case.kwargs, torch.optim.Adam),
        ({**case.kwargs, "weight_decay": 0.0}, torch.optim.AdamW),
    ):
        problem = Problem(TINY, precision)
        assert not verdict_of(side_of(cls, problem, **kwargs), case, problem).ok


def test_gate_names_the_side_that_raises_and_restores_spoilt_gradients() -> None:
    case = CASES["adamw"]
    problem = Problem(TINY, Precision())

    def explode() -> None:
        raise RuntimeError("no kernel")

    spoiler = side_of(_Wrong, problem, mistake="gradients", **case.kwargs)
    good = side_of(torch.optim.AdamW, problem, **case.kwargs)
    spoiler.system, good.system = "spoiler", "good"
    bad = Side("bad", "", problem.parameters(), explode)
    verdicts = check(case, problem, [bad, spoiler, good])
    assert isinstance(verdicts["bad"], RuntimeError)
    assert isinstance(verdicts["spoiler"], Verdict) and not verdicts["spoiler"].gradients_kept
    assert isinstance(verdicts["good"], Verdict) and verdicts["good"].ok, verdicts["good"]


@pytest.mark.parametrize("key", ["adamw", "sgd", "lion"])
def test_gate_passes_the_pipelines_and_notices_a_missing_clip(key: str) -> None:
    from benchmarks.commands.pipeline import CLIP, PIPELINE, SCALE

    case = CASES[key]
    problem = Problem(TINY, Precision())
    problem.set_factor(SCALE)
    forms = [f"torch.{f}" for f in case.torch_forms] + ["fused"]
    sides = [PIPELINE[form](case, problem, Options()) for form in forms]
    verdicts = check(case, problem, sides, clip=CLIP, scale=SCALE)
    assert all(isinstance(v, Verdict) and v.ok for v in verdicts.values()), verdicts
    problem.set_factor(SCALE)
    wrong = check(case, problem, [PIPELINE["fused"](case, problem, Options())], clip=30 * CLIP, scale=SCALE)["fused"]
    assert isinstance(wrong, Verdict) and (not wrong.ok or key == "lion")  # Lion hardly sees the gradient's size


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_gradient_functions_pass_their_check(dtype: str) -> None:
    session = Session(torch.device("cpu"), timing.Budget(0.01, 3, 5, 1), Bandwidth(10.0, 10.0, None, 1))
    rows = gradient_cells(session, TINY, Precision(dtype))
    assert [r.bench for r in rows[::2]] == list(FUNCTIONS) and not session.wrong
    assert all(r.ok and r.error is not None and (r.median_ms or 0) > 0 for r in rows), rows
    assert all(r.error < (1e-5 if dtype != "bf16" else 5e-3) for r in rows[::2])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mistake", ["nothing", "half", "tail"])
def test_gradient_functions_that_err_are_noticed(name: str, mistake: str) -> None:
    problem = Problem(TINY, Precision())
    made = GradientSides(problem)
    side = made.make("fused", FUNCTIONS[name])
    right = side.step

    def wrong() -> object:
        if mistake == "nothing":
            return torch.zeros(()) if name == "get_total_norm" else None
        norm = right()
        for p in side.params:
            assert p.grad is not None
            p.grad[-1:].mul_(3.0) if mistake == "tail" else p.grad.mul_(0.5)
        return norm

    side.step = wrong
    assert not made.error(side, FUNCTIONS[name]) < tolerance("fused", torch.float32)


@pytest.fixture
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.commands.run.measure_bandwidth", lambda *_: Bandwidth(10.0, 10.0, None, 1))


def _plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer, a pipeline and functions of this package that err, each in its way."""
    from benchmarks.commands.pipeline import PIPELINE

    def build(case: Case, problem: Problem, _options: Options) -> Side:
        side = side_of(_Wrong, problem, mistake="sign", **case.kwargs)
        side.system = "fused"
        return side

    monkeypatch.setitem(SYSTEMS, "fused", System("fused", "planted", build))
    monkeypatch.setitem(PIPELINE, "fused", build)
    for name in FUNCTIONS:
        monkeypatch.setattr(fused, name, lambda *_: torch.ones(()))


@pytest.mark.parametrize(
    "arguments",
    [
        ["step", "--opt", "adamw", "--shape", "3x64", "--vs", "torch.loop"],
        ["compare", "--opt", "adamw", "--shape", "3x64", "--vs", "torch.loop"],
        ["pipeline", "--shape", "3x64"],
        ["host", "--vs", "none"],
        ["kernel", "--opt", "adamw", "--n", "4096", "--what", "update"],
        ["kernel", "--what", "size"],
        ["kernel", "--what", "gradient"],
        ["targets", "--match", "AdamW"],
        ["targets", "--match", "clip_grad_norm_ alone: no"],
    ],
    ids=lambda a: " ".join(a[:1] + [w for w in a if w in ("update", "size", "gradient") or "clip" in w]),
)
def test_every_command_that_times_refuses_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, no_bandwidth: None, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    _plant(monkeypatch)
    monkeypatch.setattr(kernel, "CPU_GRADIENTS", ("3x64",))
    monkeypatch.setattr(kernel, "PRECISIONS", (Precision(),))
    monkeypatch.setattr(kernel, "size_exponents", lambda *_: range(12, 13))
    monkeypatch.setattr(host, "COUNTS", (1, 3))
    few = [goals._never_slower(("clip_grad_norm_",), 1.0, ("3x64",)), goals._best_torch("adamw", "1x1", 1.0)]
    monkeypatch.setattr(goals, "cpu_goals", lambda: few)
    assert main([*arguments, "--seconds", "0.01", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "WRONG RESULT, not timed" in output, output


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor it"), torch.OutOfMemoryError("CUDA out of memory")])
def test_one_cell_that_fails_does_not_take_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_bandwidth: None, error: Exception
) -> None:
    make = SYSTEMS["fused"].build

    def build(case: Case, problem: Problem, options: Options) -> Side:
        side = make(case, problem, options)
        if problem.profile.name == "3x64":

            def explode() -> None:
                raise error

            side.step = explode
        return side

    monkeypatch.setitem(SYSTEMS, "fused", System("fused", "planted", build))
    arguments = ["step", "--opt", "adamw", "--shape", "3x64,3x65", "--vs", "torch.loop", "--seconds", "0.01"]
    lost = isinstance(error, torch.OutOfMemoryError)  # room for it is no question of right and wrong
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == (0 if lost else 1)
    rows = {(row["profile"], row["system"]): row for row in Result.load(tmp_path / "step.json").rows}
    assert rows["3x64", "fused"]["status"].startswith("not available" if lost else "failed: RuntimeError: no kernel")
    assert all(rows[key]["status"] == "ok" for key in rows if key != ("3x64", "fused"))
    monkeypatch.setattr(goals, "cpu_goals", lambda: [goals._best_torch("adamw", "3x64", 0.0)])
    assert main(["targets", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == (0 if lost else 1)


def test_a_command_that_breaks_off_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_bandwidth: None
) -> None:
    from benchmarks.commands import step

    def show(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(step, "show_rows", show)
    arguments = ["step", "--opt", "adamw", "--shape", "3x64", "--vs", "none", "--seconds", "0.01", "--device", "cpu"]
    with pytest.raises(RuntimeError, match="gone"):
        main([*arguments, "--out", str(tmp_path)])
    kept = Result.load(tmp_path / "step.json")
    assert len(kept.rows) == 1 and "broken off by RuntimeError" in kept.warnings


def test_a_wrong_result_gives_no_number_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_bandwidth: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch)
    arguments = ["step", "--opt", "adamw", "--shape", "3x64", "--vs", "torch.loop", "--seconds", "0.01"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out
    rows = Result.load(tmp_path / "step.json").rows
    ours, torchs = rows
    assert ours["status"].startswith("wrong result") and "median_ms" not in ours
    assert torchs["status"] == "ok" and torchs["median_ms"] > 0 and "ratio" not in torchs


# ---- bytes ----


@pytest.mark.parametrize("key", ELEMENTWISE)
@pytest.mark.parametrize(
    "precision",
    [
        Precision(),
        Precision("bf16"),
        Precision("bf16", "fp32"),
        Precision("bf16", "split"),
        Precision("bf16", "split", "bf16"),
        Precision("bf16", "split8", "int8"),
        Precision("fp32", None, "int8"),
    ],
    ids=lambda p: p.file_name,
)
def test_bytes_model_is_what_the_tensors_hold(key: str, precision: Precision) -> None:
    problem = Problem(get_profile("2x16K"), precision)
    try:
        side = SYSTEMS["fused"].make(CASES[key], problem, Options())
        side.step()
    except NotAvailable as reason:
        pytest.skip(str(reason))
    held = side.held_bytes() / problem.profile.elements
    assert held == pytest.approx(held_bytes(CASES[key], precision), abs=2e-3)


def test_step_bytes_of_float32_adamw() -> None:
    assert held_bytes(CASES["adamw"], Precision()) == 12
    assert step_bytes(CASES["adamw"], Precision()) == 28
    assert step_bytes(CASES["adamw"], Precision("bf16", "split", "bf16")) == 18


def test_shared_storage_counts_once() -> None:
    whole = torch.zeros(100)
    assert storage_bytes([whole, whole[:50], whole[50:], torch.zeros(0)]) == 400


# ---- timing ----


def test_quantiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert timing.quantile(values, 0.2) == pytest.approx(1.8)
    stats = timing.Stats.of(values)
    assert (stats.median, stats.best, stats.rounds) == (statistics.median(values), 1.0, 5)
    assert stats.p20 <= stats.median <= stats.p80
    ratio = timing.paired_ratio([2.0, 40.0, 2.0], [1.0, 20.0, 1.0])
    assert ratio.median == ratio.p20 == ratio.p80 == 2.0


def test_interleaving_steps_every_side_equally_and_alternates_the_order() -> None:
    calls: list[str] = []
    sides = [Side(name, name, [], lambda name=name: calls.append(name)) for name in "abc"]
    budget = timing.Budget(seconds=60, min_rounds=4, max_rounds=8, warmup=1)
    results = timing.interleave(sides, timing.CpuClock(), budget)
    assert all(len(results[n].walls) == 8 and calls.count(n) == 9 for n in "abc")
    rounds = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert rounds[0] == "abc" and rounds[1] == "cba" and len({r[0] for r in rounds}) == 3


def test_preparation_is_not_timed() -> None:
    import time

    clock = timing.CpuClock(cold_bytes=4096)
    sample = clock.sample(lambda: None, lambda: time.sleep(0.02))
    assert sample.wall < 0.01


def test_gpu_clock_waits_flushes_and_keeps_host_time_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock's order of events, on a GPU made of paper."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, _other: Any) -> float:
            return 2.0

    flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *_args, **_kwargs: flush)
    for name, value in {
        "get_device_properties": lambda _device: SimpleNamespace(L2_cache_size=1 << 20),
        "Event": Event,
        "synchronize": lambda *_: log.append("wait"),
        "_sleep": lambda _cycles: log.append("sleep"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    sample = timing.CudaClock(torch.device("cuda")).sample(lambda: log.append("step"), lambda: log.append("prepare"))
    assert log == [
        *("prepare", "flush", "wait", "step", "wait"),
        *("prepare", "flush", "sleep", "event", "step", "event", "wait"),
    ]
    assert sample.device == pytest.approx(2e-3) and sample.host <= sample.wall


# ---- gradients are alike ----


def test_problems_are_reproducible_and_gradients_restorable() -> None:
    problem, twin = (Problem(TINY, Precision("bf16")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(problem.initial, twin.initial, strict=True))
    first, second = problem.parameters(), problem.parameters()
    assert all(a.grad is b.grad and a is not b for a, b in zip(first, second, strict=True))
    problem.set_factor(-0.5)
    assert torch.equal(problem.gradients()[0], twin.gradients()[0] * -0.5)
    problem.gradients()[0].zero_()
    problem.restore_gradients()
    assert torch.equal(problem.gradients()[0], twin.gradients()[0] * -0.5)
    assert total_norm(twin.gradients()) == pytest.approx(math.sqrt(500), rel=0.2)


# ---- results ----


def test_results_survive_json_and_csv(tmp_path: Path) -> None:
    row = Row("step", "adamw", "fp32", "5x100", 5, 500, "fused", "fused", median_ms=1.23456789, ratio=None)
    result = Result("step", {"cpu": "x"}, {"copy": 1.0}, [vars(row)], ["noisy"], {"quick": False})
    path = result.save(tmp_path)
    loaded = Result.load(path)
    assert loaded.rows[0]["median_ms"] == 1.23457 and "ratio" not in loaded.rows[0]
    assert loaded.warnings == ["noisy"] and loaded.when == result.when
    header, line = path.with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("bench,optimizer,precision,profile") and line.startswith("step,adamw,fp32,5x100,5,500")
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "schema": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match="schema 99"):
        Result.load(path)


def test_step_command_writes_what_it_promises(
    tmp_path: Path, no_bandwidth: None, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = System("absent", "absent", lambda *_: pytest.fail("must not be built"), "absent", "no_such_module")
    SYSTEMS["absent"] = missing
    try:
        arguments = ["--opt", "adamw,sgd", "--shape", "3x64,2x8x8", "--vs", "torch,absent", "--seconds", "0.01"]
        assert main(["step", *arguments, "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    finally:
        del SYSTEMS["absent"]
    output = capsys.readouterr().out
    assert "not installed" in output and "\x1b" not in output
    result = Result.load(tmp_path / "step.json")
    assert {"machine", "bandwidth", "settings"} <= set(vars(result)) and result.machine["versions"]["torch"]
    assert [r["system"] for r in result.rows[:5]] == ["fused", *TORCH, "absent"]
    for row in result.rows:
        if row["status"] == "ok":
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] >= 3
            assert row["gbs"] > 0 and row["error"] < 1e-3
    held = {r["optimizer"]: r["held_bytes"] for r in result.rows if r["system"] == "fused"}
    assert held["adamw"] == pytest.approx(12, abs=0.1)
    assert STEPS == 3


def test_every_command_has_help() -> None:
    parser = make_parser()
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([command, "--help"])
        assert stop.value.code == 0


def test_goals_are_well_formed() -> None:
    for every in (cpu_goals(), gpu_goals(None), gpu_goals("triton")):
        assert all(g.bound > 0 and g.unit in ("x", "%", "ms", "B") for g in every)
        assert len({g.text for g in every}) == len(every)
    goal = cpu_goals()[0]
    assert goal.met(goal.bound) and not goal.met(goal.bound * 0.99)


def test_numbers_are_readable() -> None:
    assert [number(v) for v in (None, 0, 1234.5, 12.34, 1.234, 0.1234)] == ["-", "0", "1,234", "12.3", "1.23", "0.123"]
    assert plain_table(["a", "b"], [["x", "1"], ["yy", "22"]]).splitlines()[2] == "x    1"


# ---- published results ----


def _results(tmp_path: Path) -> MachineResults:
    machine = {"device": "cpu", "cpu": "Paper CPU", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": "abc"}
    base = {"tensors": 3, "elements": 192, "precision": "fp32", "status": "ok", "profile": "3x64", "bench": "step"}
    rows = [
        {**base, "optimizer": "adamw", "system": "fused", "label": "fused", "median_ms": 1.0, "device_ms": 1.0},
        {**base, "optimizer": "adamw", "system": "torch.fused", "label": "torch fused", "median_ms": 4.0, "ratio": 4.0,
         "device_ms": 4.0, "model_bytes": 28},
    ]  # fmt: skip
    rows[0]["model_bytes"] = 28
    Result("step", machine, {"copy": 10.0}, rows).save(tmp_path)
    return MachineResults.collect(tmp_path)


def test_machine_results_and_tables(tmp_path: Path) -> None:
    results = _results(tmp_path)
    again = MachineResults.load(results.save(tmp_path / "results"))
    assert again.rows("step") == results.rows("step") and again.title == results.title
    text = "before\n<!-- benchmarks: cpu-speed -->\nold\n<!-- /benchmarks -->\nafter\n"
    filled = fill(text, published(tmp_path / "results"), tmp_path, tmp_path)
    assert "| adamw | 4.0x (1.00 ms) |" in filled and "old" not in filled
    assert fill(filled, [again], tmp_path, tmp_path) == filled
    assert "adamw" not in fill(text.replace("cpu-speed", "gpu-speed"), [again], tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no benchmark table"):
        fill(text.replace("cpu-speed", "nosuch"), [again], tmp_path, tmp_path)


def test_readmes_agree_with_the_committed_results() -> None:
    assert main(["readme", "--check"]) == 0, "python -m benchmarks readme"


def test_committed_results_are_complete() -> None:
    for results in published():
        assert results.sections and results.machine["versions"]["torch"]
        for section in results.sections.values():
            assert not section.settings.get("quick"), f"{results.slug}: a --quick run is no result"
            assert not any(
                str(r.get("status", "")).startswith("wrong") and r["system"] == "fused" for r in section.rows
            )


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    paths = draw(_results(tmp_path), tmp_path)
    assert {p.name for p in paths} >= {"speedup-fp32.png", "roofline.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_profiles_are_documented() -> None:
    assert all(title and callable(make) for title, make in PROFILES.values())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_gpu_footprint_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.measure import gpu_footprint

    for name, value in {
        "synchronize": None,
        "memory_allocated": 100,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 164,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    side = Side("fused", "", [], lambda: torch.ones(3) + 1)
    temporary, launches = gpu_footprint(side, torch.device("cuda"))
    assert temporary == 64
    assert not launches  # nothing ran on a GPU, or this torch cannot profile one
