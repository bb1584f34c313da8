"""``python -m fused``, as a user runs it: in a process of its own, outside the checkout."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from fused.__main__ import main

Command = subprocess.CompletedProcess[str]


def fused_cli(folder: Path, *arguments: str, **environment: str) -> Command:
    return subprocess.run(
        [sys.executable, "-m", "fused", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},  # one: a busy machine is slow with more
        capture_output=True,
        text=True,
        timeout=300,
    )


def hide(folder: Path, module: str) -> dict[str, str]:
    """Environment for a process in which ``module`` is not installed."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "hidden"), os.environ.get("PYTHONPATH")]))}


def assert_succeeded(command: Command) -> None:
    assert command.returncode == 0, command.stdout + command.stderr


def test_no_command_prints_help(tmp_path: Path) -> None:
    command = fused_cli(tmp_path)
    assert_succeeded(command)
    assert "info" in command.stdout and "demo" in command.stdout


def test_version(tmp_path: Path) -> None:
    command = fused_cli(tmp_path, "--version")
    assert_succeeded(command)
    assert command.stdout.startswith("fused-optim ")


def test_unknown_command() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train"])


def test_info_as_text(tmp_path: Path) -> None:
    command = fused_cli(tmp_path, "info")
    assert_succeeded(command)
    for heading in ("Versions", "Build", "Machine", "Backends"):
        assert f"{heading}\n" in command.stdout
    assert "reference        yes" in command.stdout
    assert "\x1b" not in command.stdout, "no colours in a pipe"


def test_info_as_json(tmp_path: Path) -> None:
    import torch

    command = fused_cli(tmp_path, "info", "--json")
    assert_succeeded(command)
    facts = json.loads(command.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] >= 1
    assert facts["backends"]["reference"]["available"] is True
    for name, backend in facts["backends"].items():
        assert backend["available"] or backend["reason"], f"{name} is missing without a reason"
    if facts["backends"]["cpu"]["available"]:
        assert facts["machine"]["instruction_set"]
        assert facts["build"]["isas"]


def test_info_says_whether_the_build_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused import info, sources

    package = tmp_path / "fused"
    assert sources.is_stale("0", package) is None  # as where only the package was installed
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for name in ("bindings.cpp", "cpu/kernels.cpp"):
        (tmp_path / "csrc" / name).write_text(f"// {name}\n")
    built_from = sources.digest(tmp_path)
    assert sources.is_stale(built_from, package) is False
    (tmp_path / "csrc" / "notes.txt").write_text("no source")
    assert sources.is_stale(built_from, package) is False
    with (tmp_path / "csrc" / "cpu" / "kernels.cpp").open("a") as file:
        file.write("int changed;\n")
    assert sources.is_stale(built_from, package) is True

    monkeypatch.setattr(info.fused, "__file__", str(package / "__init__.py"))
    build = SimpleNamespace(source_hash=built_from, isas=["baseline"])
    monkeypatch.setitem(sys.modules, "fused._build_info", build)
    facts = info.collect()
    assert facts["build"] == {"source_hash": built_from, "isas": ["baseline"], "stale": True}
    assert info._sections(facts)["Build"]["stale"].startswith("yes: csrc/ has changed")
    build.source_hash = sources.digest(tmp_path)
    assert info._sections(info.collect())["Build"]["stale"] == "no"


def test_switches_that_are_ignored_are_named(tmp_path: Path) -> None:
    command = fused_cli(tmp_path, "info", FUSED_ISA="avx9", FUSED_TENSOR_INTERFACE="fast")
    assert_succeeded(command)
    assert "FUSED_TENSOR_INTERFACE=fast is ignored" in command.stderr
    if json.loads(fused_cli(tmp_path, "info", "--json").stdout)["backends"]["cpu"]["available"]:
        assert "FUSED_ISA=avx9 is not built" in command.stderr
    quiet = fused_cli(tmp_path, "info", FUSED_ISA="baseline", FUSED_TENSOR_INTERFACE="stable")
    assert "FUSED_" not in quiet.stderr


def test_info_says_why_there_is_no_extension(tmp_path: Path) -> None:
    hidden = hide(tmp_path, "fused._C")
    notes = 'import types\nnotes = types.ModuleType("fused._build_info")\nnotes.extension_error = "no compiler"\n'
    with (tmp_path / "hidden" / "sitecustomize.py").open("a") as file:
        file.write(notes + 'sys.modules["fused._build_info"] = notes\n')
    command = fused_cli(tmp_path, "info", **hidden)
    assert_succeeded(command)
    for backend in ("cuda", "cpu"):
        assert f"{backend:<16} no   the compiled extension is missing: no compiler" in command.stdout


def test_a_step_without_the_extension_says_so_once(tmp_path: Path) -> None:
    program = """
        import torch, fused
        for _ in range(2):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            fused.SGD([p], lr=0.5).step()
        print(p.tolist())
    """
    command = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path, env={**os.environ, **hide(tmp_path, "fused._C")}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert command.stdout == "[0.5, 0.5, 0.5]\n", command.stderr
    words = "parameters on cpu are updated by the reference backend (cpu: the compiled extension is missing"
    assert command.stderr.count(words) == 1


def test_info_needs_no_rich(tmp_path: Path) -> None:
    command = fused_cli(tmp_path, "info", **hide(tmp_path, "rich"))
    assert_succeeded(command)
    assert "Backends" in command.stdout


# ---------------------------------------------------------------------------------------------------------------- demo

TINY = ("demo", "--size", "tiny", "--steps", "5", "--device", "cpu", "--out", "results")


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_demo(tmp_path: Path, optimizer: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    pytest.importorskip("rich")
    command = fused_cli(tmp_path, *TINY, "--optimizer", optimizer)
    assert_succeeded(command)
    assert "step 5/5" in command.stdout

    result = json.loads((tmp_path / "results" / "demo.json").read_text())
    labels = [item["label"] for item in result["runs"]]
    assert labels[-1] == {"adamw": "fused.AdamW", "lion": "fused.Lion"}[optimizer]
    assert len(labels) >= 2
    for item in result["runs"]:
        assert item["label"] in command.stdout
        assert len(item["losses"]) == len(item["optimizer_seconds"]) == 5
        assert all(seconds > 0 for seconds in item["optimizer_seconds"])
        # A uniform guess costs log(256) = 5.545; the weights have barely moved, but they have.
        assert 4.0 < item["losses"][-1] < item["losses"][0] < 6.5
        assert item["losses"] == pytest.approx(result["runs"][-1]["losses"], abs=1e-4)
        assert item["validation_loss"] == pytest.approx(result["runs"][-1]["validation_loss"], abs=1e-4)
    assert all(item["max_loss_difference_to_fused"] < 1e-4 for item in result["summary"])
    assert result["config"]["steps"] == 5
    assert result["corpus"]["train_bytes"] > 1_000_000

    pixels = image.imread(tmp_path / "results" / "demo.png")
    height, width = pixels.shape[:2]
    assert height > 500 and width > 1000
    dark = pixels[..., :3].max(axis=-1) < 0.5
    for left, right in ((0, width // 2), (width // 2, width)):
        assert dark[:, left:right].mean() > 0.005, "a panel is empty"


def test_demo_reports_a_run_that_diverges(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    command = fused_cli(tmp_path, *TINY, "--optimizer", "sgd", "--against", "default", "--lr", "1e30")
    assert_succeeded(command)
    result = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert math.isnan(result["runs"][-1]["losses"][-1])
    assert (tmp_path / "results" / "demo.png").stat().st_size > 10_000


def test_demo_in_float16_skips_overflows(tmp_path: Path) -> None:
    import fused

    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    if not hasattr(fused, "GradScaler"):
        pytest.skip("this version has no loss scaler")
    options = ("--precision", "fp16", "--master", "split", "--clip", "1.0", "--inject-overflow", "4")
    command = fused_cli(tmp_path, *TINY, "--steps", "9", "--against", "default", *options)
    assert_succeeded(command)
    float32, ours = json.loads((tmp_path / "results" / "demo.json").read_text())["runs"]
    assert ours["skipped_steps"] == [4, 8]
    assert ours["losses"][:4] == pytest.approx(float32["losses"][:4], abs=5e-3)
    assert ours["losses"] == pytest.approx(float32["losses"], abs=5e-3), "as many updates on either side"
    assert "sat out the injected ones (every 4 steps)" in command.stdout
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["bytes_per_parameter"] == pytest.approx(12.0, abs=0.01)


def test_progress_in_a_terminal() -> None:
    rich_console = pytest.importorskip("rich.console")
    from fused.demo import command

    written = io.StringIO()
    console = rich_console.Console(file=written, force_terminal=True, width=80)
    runs = [SimpleNamespace(label=label, losses=[], optimizer_seconds=[]) for label in ("torch.optim.SGD", "fused.SGD")]
    with command._progress(console, runs, steps=2) as on_step:
        for step in (1, 2):
            for run in runs:
                run.losses.append(3.25 - step)
                run.optimizer_seconds.append(0.0125)
            on_step(step)
    assert "2/2" in written.getvalue()
    assert "loss 1.250" in written.getvalue()
    assert "12.50 ms" in written.getvalue()


def test_demo_is_repeatable(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    losses = []
    for out in ("first", "second"):
        command = fused_cli(tmp_path, *TINY, "--steps", "3", "--against", "default", "--seed", "3", "--out", out)
        assert_succeeded(command)
        result = json.loads((tmp_path / out / "demo.json").read_text())
        losses.append([item["losses"] for item in result["runs"]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_demo_without_its_extra(tmp_path: Path, module: str) -> None:
    command = fused_cli(tmp_path, *TINY, **hide(tmp_path, module))
    assert command.returncode == 2
    assert module in command.stderr
    assert "pip install 'fused-optim[demo]'" in command.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--steps", "0"), "not positive"),
        (("--steps", "many"), "invalid int value"),
        (("--lr", "-1"), "not positive"),
        (("--optimizer", "newton"), "invalid choice"),
    ],
)
def test_demo_checks_its_arguments(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--optimizer", "rmsprop", "--against", "fused"), "torch has no fused=True form of RMSprop"),
        (("--master", "split"), "fused.AdamW"),  # there is nothing to split in float32 parameters
        (("--device", "cuda"), "no CUDA device"),
    ],
)
def test_demo_says_what_is_not_there(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "results").exists()


# --------------------------------------------------------------------------------------------------------- its pieces


def test_corpus(tmp_path: Path) -> None:
    text = pytest.importorskip("fused.demo.text")
    corpus = text.standard_library()
    again = text.standard_library()
    assert corpus.sha256 == again.sha256
    assert corpus.train.equal(again.train) and corpus.validation.equal(again.validation)
    assert 0.03 < corpus.validation.numel() / corpus.train.numel() < 0.3
    with pytest.raises(text.CorpusError, match="bytes of Python source"):
        text.standard_library(tmp_path)


def test_batches_are_the_text_and_its_successors() -> None:
    import torch

    from fused.demo.text import even_batches, random_batches

    data = torch.arange(200, dtype=torch.uint8)
    inputs, targets = next(random_batches(data, batch=3, context=8, seed=0))
    assert inputs.shape == targets.shape == (3, 8)
    assert inputs.dtype == torch.int64
    assert targets.equal(inputs + 1)
    batches = list(even_batches(data, batch=4, context=199, batches=2))
    assert len(batches) == 2
    assert all(targets[:, -1].eq(199).all() for _, targets in batches), "the last byte is in reach, none beyond it"


@pytest.mark.parametrize("steps", [2, 7, 400, 5000])
def test_schedule(steps: int) -> None:
    from fused.demo.training import warmup_cosine

    factor = warmup_cosine(steps)
    factors = [factor(step) for step in range(steps)]
    assert max(factors) == 1.0
    assert all(0 < value <= 1 for value in factors)
    peak = factors.index(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factor(steps) == pytest.approx(0.1)


def test_model_is_causal() -> None:
    import torch

    from fused.demo.model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=16, context=12))
    assert model.head.weight is model.token_embedding.weight
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 256
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.allclose(before[:7], after[:7], atol=1e-6)
    assert not torch.allclose(before[7:], after[7:], atol=1e-3)
