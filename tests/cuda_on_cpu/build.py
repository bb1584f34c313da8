"""Compiles the extension with its CUDA part for the CPU: the kernels' own source, against the runtime beside this file.

``build()`` returns the module's path. Objects are kept in ``build/cuda-on-cpu*/`` and made anew where a source changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
SANITIZED = os.environ.get("CUDA_ON_CPU_SANITIZED") == "1"
"""Whether this process runs the tests with the sanitized build."""
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-Wno-psabi"),
    # The module is loaded beside the ordinary one: their types must not be taken for each other's.
    *("-Dfused=fused_on_cpu", "-DFUSED_WITH_CUDA=1", "-DFUSED_ISA_LIST=X(baseline)", "-DFUSED_ISA=baseline"),
    "-DFUSED_GPU_ARITHMETIC=1",
]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def sources(csrc: Path = CSRC) -> list[Path]:
    """What goes into the module, the longest compilations first."""
    found = [path for pattern in ("cuda/*.cu", "*.cpp", "cpu/*.cpp") for path in csrc.glob(pattern)]
    return [*sorted(found, key=lambda path: -path.stat().st_size), HERE / "runtime.cpp"]


def build(sanitize: bool = False, planted: tuple[str, Callable[[str, str], str]] | None = None) -> Path:
    """Compiles and links what is out of date.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        planted: a name, and what maps a source file's name and text to another text: a defect to be found.
    """
    sanitizers = SANITIZE if sanitize else []
    flags = [*FLAGS, *sanitizers, f"-I{HERE / 'include'}"]
    folder = ROOT / "build" / ("cuda-on-cpu" + ("-sanitized" if sanitize else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        csrc = edited(folder / planted[0], planted[1]) if planted else CSRC

        objects = compile_all(sources(csrc), folder, [*flags, "-x", "c++"])
        key = hashlib.sha256(repr(sorted(objects)).encode()).hexdigest()[:16]
        module = folder / key / f"_C{SUFFIX}"
        if not module.exists():
            module.parent.mkdir(exist_ok=True)
            partial = module.with_suffix(".tmp")
            run([*compiler(), *sanitizers, "-shared", *map(str, objects), "-o", str(partial)])
            partial.rename(module)
    return module


def compile_all(sources: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """The objects in ``folder``, made anew where a source, a header or a flag has changed."""
    import pybind11

    system = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> Path:
        text = b"".join(path.read_bytes() for path in read_by(source))
        key = hashlib.sha256(text + repr((flags, system, compiler())).encode())
        target = folder / f"{source.name}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(".tmp")
            run([*compiler(), *flags, *system, "-c", str(source), "-o", str(partial)])
            partial.rename(target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, sources))


def load(path: Path, package: str) -> ModuleType:
    """The module at ``path``, apart from others: to pybind11 those of the same name are one, wherever they lie."""
    name = f"{package}._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def read_by(source: Path) -> list[Path]:
    """The source and every header of ours that it includes, directly or not."""
    found: dict[Path, None] = {}
    left = [source.resolve()]
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^#include ["<](.+)[">]', path.read_text(), re.MULTILINE):
            left += [at.resolve() for at in (path.parent / name, HERE / "include" / name) if at.is_file()]
    return sorted(found)


def edited(folder: Path, edit: Callable[[str, str], str]) -> Path:
    """A copy of the sources with a text changed; only changed files are written."""
    for source in CSRC.rglob("*.*"):
        target = folder / source.relative_to(CSRC)
        text = edit(source.name, source.read_text())
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return folder


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr[-4000:]}")
    if result.stderr.strip():
        print(result.stderr, file=sys.stderr)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    import fcntl

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
