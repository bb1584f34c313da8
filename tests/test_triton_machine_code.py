"""The Triton kernels' machine code for NVIDIA GPUs, compiled without one: wide accesses, no spills, registers that stay."""

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
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"


def _formats():
    from fused.backends.triton import Formats

    def of(rule, param=Format.FLOAT32, grad=None, master=Format.NONE, state=None, stochastic=False):
        states = (int(state or param),) * len(RULES[rule].states)
        return Formats(rule, stochastic, int(param), int(grad or param), int(master), states)

    low, fp16 = Format.BFLOAT16, Format.FLOAT16
    named = {f"{rule}-float32": of(rule) for rule in RULES}
    named["adam-bfloat16"] = of("adam", low)
    named["adam-bfloat16-stochastic"] = of("adam", low, stochastic=True)
    named["adam-bfloat16-split-float32"] = of("adam", low, master=Format.REMAINDER16, state=Format.FLOAT32)
    named["adam-bfloat16-split-bfloat16"] = of("adam", low, master=Format.REMAINDER16, state=low)
    named["adam-bfloat16-fp32-float32"] = of("adam", low, master=Format.FLOAT32, state=Format.FLOAT32)
    named["adam-float16-split-float32"] = of("adam", fp16, master=Format.REMAINDER16, state=Format.FLOAT32)
    return named


def _disassembly(compiled, tmp_path):
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    return sass, int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr).group(1))


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this Triton carries no disassembler")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", list(_formats()) if find_spec("triton") else [])
def test_update(name, architecture, tmp_path, record_property):
    """Registers are compared with a file: delete it and run the tests to record new ones on purpose."""
    from fused.backends.triton.ahead import compile_update

    formats = _formats()[name]
    sass, registers = _disassembly(compile_update(formats, architecture), tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
    # 1024 elements in 128 threads are 8 each: 128-bit accesses for every operand of 16 bits or more
    wide_loads, wide_stores = len(re.findall(r"LDG\.E\S*\.128", sass)), len(re.findall(r"STG\.E\S*\.128", sass))
    operands = 1 + len(formats.states) + (formats.master != Format.NONE)
    assert wide_loads >= operands + 1, f"{wide_loads} 128-bit loads for {operands} operands and the gradient"
    assert wide_stores >= operands, f"{wide_stores} 128-bit stores for {operands} operands"
    record_property("registers", registers)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    key = f"{name}-sm{architecture}"
    if key not in table:
        TABLE.write_text(json.dumps({**table, key: registers}, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{key} was not in {TABLE.name}; {registers} registers are recorded now")
    assert registers <= table[key], f"{key} takes {registers} registers, {table[key]} before"
