"""8-bit blocks and remainders as the CUDA kernels compute them, against the text that defines them.

The comparison is a program of its own, ``cuda_on_cpu/conversions.cpp``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu.build import CSRC, FLAGS, HERE, compiler, run

if not CSRC.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
if shutil.which(compiler()[0]) is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("fibers are as on Linux", allow_module_level=True)


def differences(csrc: Path, folder: Path) -> str:
    """What the program says of these sources; empty where all is as it should be."""
    program = folder / "conversions"
    sources = [HERE / "conversions.cpp", HERE / "runtime.cpp"]
    run([*compiler(), *FLAGS, f"-I{HERE / 'include'}", f"-I{csrc}", *map(str, sources), "-o", str(program)])
    result = subprocess.run([str(program)], capture_output=True, text=True)
    return result.stdout + result.stderr if result.returncode else ""


def test_same_bits_as_defined(tmp_path: Path) -> None:
    """Codes of every value, divisions, and what is dealt with apart, whatever a device's rough reciprocals are."""
    assert differences(CSRC, tmp_path) == ""


PLANTED: dict[str, tuple[str, str]] = {
    "rough-quotients": ("return fma_(fma_(-q, d, n), y, q);", "return q;"),
    "units-of-one-product": ("kUnitLow = float(4.0 / 3.0 - double(kUnitHigh))", "kUnitLow = 0.0f"),
    "nan-codes-in-one-word": ("(zero_bytes(biased[0]) | zero_bytes(biased[1])) == 0u", "zero_bytes(biased[0]) == 0u"),
    "codes-of-nan": ("(low & ~word) | (high & word)", "low & ~word"),
    "codes-of-zero": ("(low & ~word) | (high & word)", "high & word"),
    "levels-of-infinity": ("finite && ", ""),
    "zeros-among-deficits": ("if ((~nonzero & (0x8000u * kHalves)) == 0u) return", "return"),
    "zeros-in-one-half": ("~nonzero & (0x8000u * kHalves)", "~nonzero & 0x8000u"),
    "denormal-gains": ("kHuge = 0x1p100f", "kHuge = 0x1p127f"),
    "nan-unseen": ("!(most < kHuge)", "most >= kHuge"),
    "small-scales": ("larger(largest, kSmallestScale)", "largest"),
    "partial-vectors": ("at.count < kVector || !(most", "!(most"),
    "partial-vectors-unsigned": ("at.count < kVector || !inside", "!inside"),
    "lanes-apart": ("__any_sync(kAllLanes, at.count < kVector || !inside)", "!inside"),
    "level-above-the-last": ("- 1.0f - 0x1p-7f", "+ 0.5f"),
    "codes-of-zeros": ("  if (zeros) {", "  if (false) {"),
    "denormal-ranges": (" && smallest >= 4u << kLowShift", ""),
    "first-steps": ("threshold.narrow == 0u", "true"),
    "nan-unseen-by-remainders": ("return sum != sum;", "return false;"),
    "rounded-to-16-bits-alone": ("kRound = 0x8080u", "kRound = 0x8000u"),
    "curve-at-its-end": ("deficit <= uint32_t(kSquareRoot)", "deficit < uint32_t(kSquareRoot)"),
}
"""A place in the sources of csrc/cuda, and what is put there instead."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name: str, tmp_path: Path) -> None:
    good, bad = PLANTED[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    (target,) = (path for path in (tmp_path / "csrc" / "cuda").iterdir() if good in path.read_text())
    text = target.read_text()
    assert text.count(good) == 1, "there is more than one such place"
    target.write_text(text.replace(good, bad))
    assert differences(tmp_path / "csrc", tmp_path) != ""
