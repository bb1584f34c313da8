"""The CUDA kernels compiled for three architectures, no GPU needed: what the compiler made of them.

Registers are kept in ``cuda_registers.json``; growth fails, as it costs occupancy. After a change that is meant:
``python tests/test_cuda_compile.py`` writes the table anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("cuda_registers.json")
ARCHS = ("80", "90", "100")
FLAGS = ["-O3", "-std=c++17", "-I", str(ROOT / "csrc"), "--fmad=false"]
SLACK = 4
"""Registers that another release of the compiler may take more."""

Report = dict[str, dict[str, int]]
"""Kernel and architecture -> what ptxas reports."""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    beside = [Path(path).resolve().parent / "cuobjdump" for path in (find_nvcc(),) if path]
    beside += [Path(folder) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in sys.path]
    return next((str(path) for path in beside if path.exists()), shutil.which("cuobjdump"))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCES, reason="needs the source tree"),
    pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH and CUDA_HOME is not set"),
]


def compile_one(source: Path, folder: Path) -> Report:
    """One source for all architectures, as setup.py compiles it; the object stays in ``folder``."""
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [nvcc, *FLAGS, "-Xptxas", "-v", "-c", str(source)]
    command += [flag for arch in ARCHS for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    result = subprocess.run(
        [*command, "-o", str(folder / f"{source.stem}.o")], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return read_report(result.stderr)


def read_report(text: str) -> Report:
    report: Report = {}
    name = ""
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name = f"{readable(entry[1])} sm_{entry[2]}"
            report[name] = {}
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if name:
                report[name].setdefault("stack", int(frame[1]))
                report[name].setdefault("spills", int(frame[2]) + int(frame[3]))
        elif used := re.search(r"Used (\d+) registers", line):
            report[name]["registers"] = int(used[1])
            name = ""
    return report


def readable(mangled: str) -> str:
    """A kernel's name with its rule: 'update_plain Adam<0>'. Names of anonymous namespaces carry a hash of the path."""
    plain = re.sub(r"_GLOBAL__N__\w*?cu_[0-9a-f]{8}(_?\d+)?", "", mangled)
    kernels = r"update_\w+?|adafactor_\w+?|prologue|reduce|write_words|list_pieces|list_tiles"
    kernel = re.search(rf"({kernels})(?=I|E|P|N)", plain)
    assert kernel is not None, mangled
    rule = re.search(r"INS_(\d+)(.*)", plain[kernel.end() :])
    if rule is None:
        return kernel[1]
    length = int(rule[1])
    arguments = re.match(r"I((?:Lb[01]E)+)E", rule[2][length:])
    flags = ",".join(re.findall(r"Lb([01])", arguments[1])) if arguments else ""
    return f"{kernel[1]} {rule[2][:length]}" + (f"<{flags}>" if flags else "")


def compile_all(folder: Path) -> Report:
    report: Report = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in pool.map(lambda source: compile_one(source, folder), SOURCES):
            report |= part
    return report


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def report(objects: Path) -> Report:
    return compile_all(objects)


def test_nothing_lives_in_local_memory(report: Report) -> None:
    assert {name: facts for name, facts in report.items() if facts["stack"] or facts["spills"]} == {}


def test_registers_do_not_grow(report: Report) -> None:
    recorded = json.loads(TABLE.read_text())
    assert sorted(recorded) == sorted(report), "kernels came or went: write the table anew"
    grown = {
        name: f"{recorded[name]} -> {facts['registers']}"
        for name, facts in report.items()
        if facts["registers"] > recorded[name] + SLACK
    }
    assert grown == {}


def functions(path: Path, arch: str) -> Iterator[tuple[str, str]]:
    """(mangled name, machine code) of an object file."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is neither with nvcc nor with Triton")
    dump = subprocess.run([tool, "-sass", "-arch", f"sm_{arch}", str(path)], capture_output=True, text=True)
    assert dump.returncode == 0, dump.stderr
    for part in dump.stdout.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        yield name.strip(), code


def instructions(path: Path, arch: str) -> Iterator[tuple[str, str]]:
    """(kernel, its machine code) of an object file."""
    return ((readable(name), code) for name, code in functions(path, arch))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "source", ["update_plain", "update_mixed", "update_double", "reduce", "adafactor_stats", "adafactor_apply"]
)
def test_memory_is_accessed_16_bytes_at_a_time(report: Report, objects: Path, source: str, arch: str) -> None:
    found = 0
    for name, code in instructions(objects / f"{source}.o", arch):
        found += 1
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", code), name
        if source != "reduce" and name != "adafactor_norm":
            assert re.search(r"\bSTG\.E(\.\w+)*\.128\b", code), name
        # Local memory, which spills and indexed arrays would use.
        assert not re.search(r"\b(LDL|STL)\b", code), name
        if source == "update_plain":
            fused_multiply_adds_of_a_contraction(name, code)
    assert found > 0


def under_way(code: str) -> int:
    """The most 128-bit loads that are asked for in a row before anything that they bring is used.

    Read from top to bottom: the alternatives of a branch follow one another, and count together.
    """
    most = pending = 0
    waited: set[int] = set()
    for line in code.splitlines():
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?(\S+) ?([^;]*);", line)
        if found is None:
            continue
        condition, operation, operands = found.groups()
        target, _, read = operands.partition(",")
        used = operands if operation.startswith("ST") else read
        if waited & {int(number) for number in re.findall(r"\bR(\d+)\b", used)}:
            most, pending, waited = max(most, pending), 0, set()
        if operation.startswith("LDG") and (first := re.match(r"R(\d+)", target)):
            words = 4 if ".128" in operation else 2 if ".64" in operation else 1
            pending += words == 4
            waited |= {int(first[1]) + word for word in range(words)}
        elif operation.startswith(("BRA", "EXIT")) and condition is None:
            waited = set()  # what follows is reached from elsewhere, where other registers are waited for
    return max(most, pending)


STATES = {"SGD<0>": 0, "Adam<0>": 2, "Adam<1>": 3, "Adadelta": 2, "RMSprop<0,0>": 1, "RMSprop<1,1>": 3, "RMSprop": 2}
"""Of the rules, and of those that begin so; of any other one."""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", ["update_plain", "update_mixed", "reduce", "adafactor_stats"])
def test_loads_of_all_operands_are_under_way_at_once(report: Report, objects: Path, source: str, arch: str) -> None:
    """A thread that looks at one operand before it asks for the next waits for the memory as often as it has operands.

    Where operands are stored in any format, the instructions for 16 and for 32 bits are both there: three for each.
    """
    for name, code in instructions(objects / f"{source}.o", arch):
        rule = name.partition(" ")[2]
        operands = 2 + STATES.get(rule, STATES.get(rule.partition("<")[0], 1))
        least = {"update_plain": operands, "update_mixed": 2 * operands}.get(source, 4)
        if name != "list_tiles":
            assert under_way(code) >= least, name


def fused_multiply_adds_of_a_contraction(name: str, code: str) -> None:
    """SGD without momentum is one fma for the decay and one for the step; contraction would leave no lone FMUL."""
    if name == "update_plain SGD<0>":
        assert re.search(r"\bFMUL\b", code), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        table = {name: facts["registers"] for name, facts in sorted(compile_all(Path(temporary)).items())}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{TABLE}: {len(table)} kernels")
