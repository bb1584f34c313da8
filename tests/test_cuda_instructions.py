"""How many instructions the CUDA update and the norm take per element, by storage format, counted in the machine code.

A GPU that moves the bytes of one element while it issues fewer instructions than these waits for its own arithmetic
instead of its memory. An H200 issues 33e12 instructions of a lane a second and moves 4.8e12 bytes: 7 instructions to a
byte, so 196 to the 28 bytes of AdamW in float32 and 98 to the 14 in bfloat16. Of float64 there is to be none: consumer
GPUs and B300 have two such instructions a clock and multiprocessor, 0.6e12 a second. Counts are kept in
``cuda_instructions.json``; growth fails. After a change that is meant: ``python tests/test_cuda_instructions.py``.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

from test_cuda_compile import FLAGS, find_nvcc, functions, pytestmark  # noqa: F401

SOURCE = Path(__file__).with_name("cuda_instructions.cu")
TABLE = SOURCE.with_suffix(".json")
ARCH = "90"
ELEMENTS = 8
"""Of a thread in one turn of the update's loop."""
NORM_ELEMENTS = {"float32": 16, "bfloat16": 32, "float16": 32}
SLACK = 1.03
"""What another release of the compiler may take more."""

FORMATS = dict(enumerate(("", "float32", "", "bfloat16", "float16", "remainder16", "remainder8", "8 bits", "8 bits")))


def count(folder: Path) -> dict[str, float]:
    nvcc, binary = find_nvcc(), folder / "counted.cubin"
    assert nvcc is not None
    mark = '-DFUSED_RARE()=asm volatile("pmevent 0;")'
    command = [nvcc, *FLAGS, mark, "-cubin", f"-arch=sm_{ARCH}", str(SOURCE), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    found = {}
    for name, code in functions(binary, ARCH):
        if formats := re.search(r"counted(?:ILh(\d+)ELh(\d+)ELh(\d+)ELh(\d+)E)", name):
            param, master, first, second = (FORMATS[int(number)] for number in formats.groups())
            states = first if first == second else f"{first} and {second}"
            found[" + ".join(filter(None, (param, master, f"states in {states}")))] = per_element(code, ELEMENTS)
        elif norm := re.search(r"counted_normILh(\d+)E", name):
            grad = FORMATS[int(norm[1])]
            found[f"norm of {grad}"] = per_element(code, NORM_ELEMENTS[grad])
    return dict(sorted(found.items()))


def per_element(code: str, elements: int) -> float:
    instructions = usual(code)
    assert [text for text in instructions if re.search(r"F64|\bD(ADD|MUL|FMA|SETP)\b", text)] == []
    return round(len(instructions) / elements, 1)


def usual(code: str) -> list[str]:
    """The instructions of the longest loop, without what ordinary contents do not run.

    That is calls, which are the slow paths of divisions and roots; what is marked as rare; and what only those lead to.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    place = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    text = [instruction for _, instruction in lines]
    jumps = {
        number: place[int(target[1], 16)]
        for number, instruction in enumerate(text)
        if (target := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction)) and int(target[1], 16) in place
    }
    first, last = max(((to, at) for at, to in jumps.items() if to <= at), key=lambda loop: loop[1] - loop[0])
    turns, always = re.compile(r"\b(BRA|CALL|EXIT|RET)\b"), re.compile(r"BRA 0x|EXIT|RET")
    ends = {at + 1 for at, instruction in enumerate(text) if turns.search(instruction)}
    cuts = sorted({0, len(text)} | set(jumps.values()) | ends)
    blocks = dict(itertools.pairwise(cuts))
    rare = {begin for begin, end in blocks.items() if any(re.search("CALL|PMTRIG", line) for line in text[begin:end])}
    ways: dict[int, set[int]] = {}
    for begin, end in blocks.items():
        onward = set[int]() if end - 1 == last or always.match(text[end - 1]) else {end}
        ways[begin] = ({jumps[end - 1]} if end - 1 in jumps else set()) | onward
    entered = reached(first, {begin: to - rare for begin, to in ways.items()})
    back: dict[int, set[int]] = {begin: {at for at in blocks if begin in ways[at]} - rare for begin in blocks}
    home = reached(first, back)
    return [instruction for begin in entered & home for instruction in text[begin : blocks[begin]]]


def reached(start: int, ways: dict[int, set[int]]) -> set[int]:
    found, left = {start}, [start]
    while left:
        for to in ways.get(left.pop(), set()) - found:
            found.add(to)
            left.append(to)
    return found


def test_instructions_do_not_grow(tmp_path: Path) -> None:
    recorded, found = json.loads(TABLE.read_text()), count(tmp_path)
    assert sorted(recorded) == sorted(found), "formats came or went: write the table anew"
    grown = {name: f"{recorded[name]} -> {now}" for name, now in found.items() if now > recorded[name] * SLACK}
    assert grown == {}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        table = count(Path(temporary))
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{TABLE}: {table}")
