"""The Triton kernels' machine code for NVIDIA GPUs, compiled without one: wide accesses, no spills, few registers."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from fused import backends
from fused.precision import Format
from fused.rules import RULES

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not there")

TABLE = Path(__file__).with_name("triton_registers.json")
TOOLS = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
WIDTH = {
    Format.FLOAT32: 4, Format.FLOAT64: 8, Format.BFLOAT16: 2, Format.FLOAT16: 2, Format.REMAINDER16: 2,
    Format.REMAINDER8: 1, Format.BLOCK8_SIGNED: 1, Format.BLOCK8_UNSIGNED: 1,
}  # fmt: skip
ELEMENTS = 8
"""Of one thread: 1024 of a chunk on 128 threads."""


def _formats():
    from fused.backends.triton import Formats

    def of(rule, param=Format.FLOAT32, master=Format.NONE, state=None, stochastic=False):
        states = state if isinstance(state, tuple) else (int(state or param),) * len(RULES[rule].states)
        return Formats(rule, stochastic, int(param), int(param), int(master), states)

    low, half = Format.BFLOAT16, Format.FLOAT16
    return {
        **{f"{rule}-float32": of(rule) for rule in RULES},
        "adam-bfloat16-stochastic": of("adam", low, stochastic=True),
        "adam-bfloat16-split-bfloat16": of("adam", low, master=Format.REMAINDER16, state=low),
        "adam-bfloat16-split8-bfloat16": of("adam", low, master=Format.REMAINDER8, state=low),
        "adam-bfloat16-fp32-float32": of("adam", low, master=Format.FLOAT32, state=Format.FLOAT32),
        "adam-bfloat16-split-int8": of(
            "adam", low, master=Format.REMAINDER16, state=(int(Format.BLOCK8_SIGNED), int(Format.BLOCK8_UNSIGNED))
        ),
        "adam-float16-split-float32": of("adam", half, master=Format.REMAINDER16, state=Format.FLOAT32),
    }


def _selection():
    """All on Hopper; before and after it what most models use."""
    if not TOOLS.exists():
        return []
    names = list(_formats())
    others = [(name, sm) for name in ("adam-float32", "adam-bfloat16-split-bfloat16") for sm in (80, 100)]
    return [(name, 90) for name in names] + others


def _adafactor():
    """Adafactor's kernels in float32, and in bfloat16 with remainders and a first moment."""
    from fused.backends.triton import Formats

    low = int(Format.BFLOAT16)
    return {
        "float32": Formats("adafactor", False, int(Format.FLOAT32), int(Format.FLOAT32), 0, ()),
        "bfloat16-split-bfloat16": Formats("adafactor", False, low, low, int(Format.REMAINDER16), (low,)),
    }


def _disassembly(compiled, tmp_path):
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    return sass, int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr).group(1))


def _accesses(operands, bits):
    """How many accesses of ``bits`` one thread makes to the operands that are that wide or wider."""
    sizes = [WIDTH[Format(operand)] * ELEMENTS * 8 for operand in operands]
    return sum(size // bits for size in sizes if (size >= 128 if bits == 128 else size == bits))


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this Triton carries no disassembler")
@pytest.mark.parametrize(("name", "architecture"), _selection())
def test_update(name, architecture, tmp_path, record_property):
    """Registers are compared with a file of one Triton version: delete it and run the tests to record new ones."""
    from fused.backends.triton.ahead import compile_update

    formats = _formats()[name]
    sass, registers = _disassembly(compile_update(formats, architecture), tmp_path)
    _check_spills(sass)
    written = [formats.param, *formats.states] + [formats.master] * (formats.master != Format.NONE)
    # float32 masters beside the parameter: the parameter is not read
    read = [formats.grad] + (written[1:] if formats.master == Format.FLOAT32 else written)
    for instruction, operands in (("LDG", read), ("STG", written)):
        for bits in (128, 64):
            found, expected = len(re.findall(rf"{instruction}\.E\S*\.{bits}\b", sass)), _accesses(operands, bits)
            assert found >= expected, f"{found} {bits}-bit {instruction}, not {expected}"
    record_property("registers", registers)
    _compare_registers(f"{name}-sm{architecture}", registers)


def _check_spills(sass):
    """None by the compiler whose registers are recorded; one value at most by any other."""
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    recorded = TABLE.exists() and json.loads(TABLE.read_text())["triton"] == triton.__version__
    assert spills <= (0 if recorded else 2), f"{spills} spills to local memory"


def _compare_registers(key, registers):
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__, "registers": {}}
    if table["triton"] != triton.__version__:
        return  # another compiler: its counts say nothing about the kernels
    if key not in table["registers"]:
        table["registers"][key] = registers
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{key} was not in {TABLE.name}; {registers} registers are recorded now")
    recorded = table["registers"][key]
    assert registers <= recorded, f"{key} takes {registers} registers, {recorded} before"


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this Triton carries no disassembler")
@pytest.mark.parametrize("name", ["float32", "bfloat16-split-bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "architecture"), [("stats", 90), ("norm", 90), ("apply", 80), ("apply", 90), ("apply", 100)]
)
def test_adafactor(kernel, name, architecture, tmp_path, record_property):
    """Parts of matrices are what the main path takes: eight elements of each operand and thread."""
    from fused.backends.triton.ahead import compile_adafactor

    formats = _adafactor()[name]
    sass, registers = _disassembly(compile_adafactor(kernel, formats, architecture), tmp_path)
    _check_spills(sass)
    written = [] if kernel != "apply" else [formats.param, *formats.states, *[formats.master] * bool(formats.master)]
    for instruction, operands in (("LDG", [formats.grad, *written]), ("STG", written)):
        found, expected = len(re.findall(rf"{instruction}\.E\S*\.128\b", sass)), _accesses(operands, 128)
        assert found >= expected, f"{found} 128-bit {instruction}, not {expected}"
    record_property("registers", registers)
    _compare_registers(f"adafactor_{kernel}-{name}-sm{architecture}", registers)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_prologue(rule):
    from fused.backends.triton.ahead import compile_prologue

    assert ".f64" in compile_prologue(rule, 90).asm["ptx"]


@pytest.mark.parametrize("grad_format", [Format.FLOAT64, Format.BFLOAT16])
@pytest.mark.parametrize("maximum", [True, False])
def test_reduce(grad_format, maximum):
    """The last program may read what others wrote only after a barrier of the whole device."""
    from fused.backends.triton.ahead import compile_reduce

    assert "acq_rel" in compile_reduce(int(grad_format), maximum, 90).asm["ptx"]


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this Triton carries no disassembler")
@pytest.mark.parametrize("grad_format", [Format.FLOAT32, Format.BFLOAT16, Format.FLOAT16])
def test_norms_are_added_up_in_float32_from_wide_loads(grad_format, tmp_path):
    from fused.backends.triton.ahead import compile_reduce

    sass, _ = _disassembly(compile_reduce(int(grad_format), False, 90), tmp_path)
    _check_spills(sass)
    for instruction, expected in ((r"LDG\.E\S*\.128", _accesses([grad_format], 128)), ("FMUL", 8), ("FADD", 7)):
        found = len(re.findall(rf"\b{instruction}\b", sass))
        assert found >= expected, f"{found} {instruction}, not {expected}"
    # Squares that float32 does not hold; without a path of their own there would be as many again.
    assert len(re.findall(r"\bDMUL\b", sass)) <= ELEMENTS
