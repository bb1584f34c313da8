"""benchmarks/gpu.sh with stand-ins for the GPU's tools and the interpreter: stages, time limits, what is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
    pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("timeout"), reason="made for Linux"),
]

INTERPRETER = r"""#!/bin/bash
echo "$*" >>"$CALLS"
case "$1 $2" in
  "- ") cat >/dev/null; exit 0;;
  "-c "*compute*) echo 90; exit 0;;
  "-c "*capability*) echo 90; exit 0;;
  "-c "*) exit 0;;
  "-m benchmarks") mkdir -p "$OUT/results"; echo '{}' >"$OUT/results/step.json";;
esac
echo "output of $2"
if [ "$2" = "${HANGS:-}" ]; then sleep 1000; fi
if [ "$2" = "${FAILS:-}" ]; then exit 3; fi
if [ "$2" = pip ] && [ -n "${FAILS_WITH_CUDA:-}" ] && [ "$FUSED_CUDA" = 1 ]; then exit 3; fi
exit 0
"""

SANITIZER = r"""#!/bin/bash
while [[ "$1" == --* ]]; do shift 2; done
exec "$@"
"""


@dataclass
class Stage:
    """A place with stand-ins, where the script can be run."""

    folder: Path
    environment: dict[str, str]

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {**self.environment, **variables}
        return subprocess.Popen(
            ["bash", str(SCRIPT)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def summary(self) -> str:
        return (self.folder / "out" / "summary.txt").read_text()

    def archived(self) -> set[str]:
        with tarfile.open(self.folder / "all.tar.gz") as archive:
            return {Path(name).name for name in archive.getnames()}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "python-stand-in": INTERPRETER,
        "nvidia-smi": "#!/bin/bash\necho a GPU\n",
        "nvcc": "#!/bin/bash\necho release 13.0\n",
        "compute-sanitizer": SANITIZER,
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHON": "python-stand-in",
        "CALLS": str(tmp_path / "calls"),
        "OUT": str(tmp_path / "out"),
        "ARCHIVE": str(tmp_path / "all.tar.gz"),
    }
    return Stage(tmp_path, environment)


def test_every_stage_is_run_and_kept(stage: Stage) -> None:
    code, output = stage.run()
    assert code == 0, output
    lines = [line.split()[1].rstrip(":") for line in stage.summary.splitlines() if line.startswith("===")]
    assert lines == [
        *("build", "info", "tests-gpu", "targets", "benchmarks", "tests-cuda", "tests-triton"),
        *("benchmarks-triton", "sanitizer-memcheck", "sanitizer-racecheck"),
    ]
    assert "everything passed" in output
    assert {"build.log", "tests-gpu.log", "summary.txt", "step.json"} <= stage.archived()
    calls = "\n".join(stage.calls)
    assert "--no-build-isolation --no-index" in calls  # nothing asks a network
    assert calls.count("--publish") == 1


def test_a_failure_does_not_stop_the_others(stage: Stage) -> None:
    code, output = stage.run(FAILS="pytest")
    assert code == 1
    assert "tests-gpu (exit code 3)" in output
    assert "=== benchmarks: passed" in stage.summary
    assert "failed: tests-gpu (exit code 3); tests-cuda (exit code 3); tests-triton (exit code 3); " in stage.summary


def test_what_hangs_is_cut_off_and_the_others_run(stage: Stage) -> None:
    start = time.monotonic()
    code, output = stage.run(HANGS="pytest", LIMIT="20")
    assert code == 1
    assert "tests-gpu (cut off after 4 s)" in output
    assert "=== benchmarks: passed" in stage.summary
    assert "output of pytest" in (stage.folder / "out" / "tests-gpu.log").read_text()
    assert time.monotonic() - start < 100


def test_a_build_that_fails_is_tried_in_a_folder_and_said(stage: Stage) -> None:
    code, output = stage.run(FAILS="pip")
    assert code == 1
    assert "build (exit code 3)" in output and "build-without-cuda (exit code 3)" in output
    assert [line for line in stage.calls if "--target" in line]
    assert "=== tests-gpu: passed" in stage.summary


def test_where_the_cuda_kernels_do_not_compile_the_others_are_measured(stage: Stage) -> None:
    code, output = stage.run(FAILS_WITH_CUDA="1")
    assert code == 1
    assert "build (exit code 3)" in output and "=== build-without-cuda: passed" in stage.summary
    assert "=== benchmarks: passed" in stage.summary


def test_pytest_cut_off_can_say_what_has_failed(stage: Stage) -> None:
    """A signal that the shell has its background processes ignore."""
    interpreter = stage.folder / "tools" / "python-stand-in"
    waits = "if [ \"$2\" = pytest ]; then trap 'echo the failures so far; exit 2' INT; sleep 1000 & wait; fi\n"
    interpreter.write_text(interpreter.read_text().replace('echo "output of', waits + 'echo "output of', 1))
    code, output = stage.run(LIMIT="20", SKIP="sanitizer")
    assert code == 1
    assert "tests-gpu (cut off after 4 s)" in output and "the failures so far" in output


def test_stages_can_be_left_out(stage: Stage) -> None:
    code, _ = stage.run(SKIP="build targets benchmarks sanitizer", PUBLISH="0")
    assert code == 0
    assert not [line for line in stage.calls if "-m pip" in line or "-m benchmarks" in line]
    assert "=== benchmarks-triton: skipped" in stage.summary


def test_told_to_end_it_keeps_what_there_is(stage: Stage) -> None:
    process = stage.start(HANGS="benchmarks", SKIP="targets")
    log = stage.folder / "out" / "benchmarks.log"
    for _ in range(600):
        if log.exists() and "output of benchmarks" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert "=== tests-gpu: passed" in stage.summary and "stopped after" in stage.summary
    assert "benchmarks.log" in stage.archived()


def test_without_a_gpu_nothing_is_started(stage: Stage) -> None:
    (stage.folder / "tools" / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    code, output = stage.run()
    assert code == 1
    assert "no usable GPU" in output
    assert not (stage.folder / "calls").exists()


def test_what_is_missing_is_said_before_anything_is_started(stage: Stage) -> None:
    """With a real interpreter, which has nothing installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(stage.folder / "bare")], check=True)
    code, output = stage.run(PYTHON=str(stage.folder / "bare" / "bin" / "python"))
    assert code == 2
    assert "missing: torch>=2.10 setuptools>=77 pybind11>=2.13 " in output and "pytest>=8" in output
    assert "===" not in output
