r"""Builds ``fused._C``, the compiled kernels: C++ for the CPU and, where nvcc is found, CUDA. torch is not involved.

Compilers are driven by ninja, incrementally, from ``build/native-*/``. The extension is optional: where it cannot be
built, the package installs without it and ``fused/_build_info.py`` (also ``python -m fused info``) says why.

Environment:

    FUSED_REQUIRE_EXT=1   a failed build of the extension is an error (CI)
    FUSED_CUDA=0|1        0: no CUDA kernels; 1: not being able to build them is an error; unset: built where possible
    FUSED_CUDA_ARCHS      default "75;80;90;100;120", as far as nvcc knows them; PTX of the last is added
    CUDA_HOME             the CUDA toolkit; else nvcc of PATH, /usr/local/cuda, pip's cuda-toolkit[nvcc,cudart,cccl]
    CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS    as everywhere
    MAX_JOBS              compilers at a time; default: one per usable core
    FUSED_OPENMP=0|1      default: where the compiler has it, but on macOS 0, as a second OpenMP beside torch's aborts
    FUSED_WERROR=1        compiler warnings are errors (CI)
    FUSED_SANITIZE=address,undefined    a build of the CPU kernels for finding bugs, see below
    FUSED_INPLACE=0       do not leave the compiled module in the source tree as well (see ``BuildExt``)

With sanitizers, beside the usual installation (.ci/run does it; the runtime must be the process's first library):

    FUSED_SANITIZE=address,undefined pip install --no-deps --target /tmp/sanitized .
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" \
        ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=/tmp/sanitized pytest tests/test_numerics.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = Path("csrc/cpu/kernels.cpp")
LONGEST = Path("csrc/cuda/update_mixed.cu")  # a third of all the time that compilers take
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
SYSTEM_CUDA = Path("/usr/local/cuda")
DEFAULT_CUDA_ARCHS = ("75", "80", "90", "100", "120")
# What the results rest on, after the user's own flags: every instruction set and nvcc must round alike.
STRICT_MATH = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class BuildError(Exception):
    """The extension cannot be built; the message is for the user."""


class CudaUnavailable(BuildError):
    """The CUDA part cannot be built."""


# ---------------------------------------------------------------------------------------------------- environment


def switch(name: str) -> bool | None:
    """The environment variable ``name`` as True, False or None where it is not set."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value}: expected 0, 1 or nothing")
    return {"": None, "0": False, "1": True}[value]


def flags_of(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def jobs() -> int:
    value = os.environ.get("MAX_JOBS", "").strip()
    if value:
        if not value.isdigit() or int(value) < 1:
            raise SystemExit(f"MAX_JOBS={value}: expected a positive number")
        return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -------------------------------------------------------------------------------------------------------- compilers


@dataclass
class Host:
    """The C++ compiler and what it can do."""

    command: list[str]
    version: str
    openmp: bool
    isas: dict[str, list[str]]  # name -> flags; the first is the baseline


@dataclass
class Cuda:
    """nvcc and what goes with it."""

    nvcc: Path
    version: str
    include: Path
    lib: Path
    archs: list[str]
    compress: bool  # knows --compress-mode


def find_host() -> Host:
    if os.name == "nt":
        raise BuildError("the compiled CPU kernels are not available on Windows yet")
    command = flags_of("CXX")
    if not command:
        built_with = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
        command = next(([name] for name in [*built_with, "c++", "g++", "clang++"] if shutil.which(name)), [])
    if not command:
        raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")
    if not compiles(command, ["-std=c++17", "-fPIC"], link=True):
        raise BuildError(f"the C++ compiler does not work: {shlex.join(command)} (it must know C++17)")
    isas = {"baseline": list[str]()}
    if compiles(command, arch_flags(), "#ifndef __x86_64__\n#error not x86-64\n#endif\n"):
        isas |= {name: flags for name, flags in X86_ISAS.items() if compiles(command, flags)}
    wanted = switch("FUSED_OPENMP")
    if wanted is None:
        wanted = sys.platform != "darwin"
    openmp = wanted and compiles(command, ["-fopenmp"], "#include <omp.h>\nint f() { return omp_get_max_threads(); }\n")
    if switch("FUSED_OPENMP") and not openmp:
        raise BuildError(f"FUSED_OPENMP=1, but {shlex.join(command)} cannot compile with -fopenmp")
    return Host(command, output_of([*command, "--version"]).partition("\n")[0], openmp, isas)


def arch_flags() -> list[str]:
    return flags_of("ARCHFLAGS") if sys.platform == "darwin" else []


def compiles(compiler: Sequence[str], flags: Sequence[str], source: str = "", link: bool = False) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe.cpp").write_text(source + "int main() { return 0; }\n")
        command = [*compiler, *flags, *([] if link else ["-c"]), "probe.cpp", "-o", "probe.out"]
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL)
        except OSError:
            return False
        return run.returncode == 0 and (Path(folder) / "probe.out").exists()


def output_of(command: Sequence[str | Path]) -> str:
    """What the command prints, on either stream."""
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        return str(error)
    return run.stdout.strip()


def find_cuda() -> Cuda:
    if switch("FUSED_CUDA") is False:
        raise CudaUnavailable("FUSED_CUDA=0")
    if not cuda_sources():
        raise CudaUnavailable("there are no sources in csrc/cuda")
    if os.environ.get("FUSED_SANITIZE") and not switch("FUSED_CUDA"):
        raise CudaUnavailable("FUSED_SANITIZE builds the CPU kernels only")
    nvcc = find_nvcc()
    release = re.search(r"release [\d.]+, V([\d.]+)", output_of([nvcc, "--version"]))
    if release is None:
        raise CudaUnavailable(f"{nvcc} does not run: {output_of([nvcc, '--version'])[:200]}")
    root = cuda_root(nvcc)
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    include = first_with("cuda_runtime.h", [root / "include", *root.glob("targets/*/include"), Path("/usr/include")])
    lib = first_with(
        "libcudart_static.a",
        [root / "lib64", root / "lib", *root.glob("targets/*/lib"), Path("/usr/lib") / multiarch],
    )
    missing = [name for name, at in (("cuda_runtime.h", include), ("libcudart_static.a", lib)) if at is None]
    if include is None or lib is None:
        raise CudaUnavailable(
            f"{nvcc} found, but not {' and '.join(missing)} under {root} (with pip: cuda-toolkit[nvcc,cudart,cccl])"
        )
    compress = "--compress-mode" in output_of([nvcc, "--help"])
    return Cuda(nvcc, release[1], include, lib, cuda_archs(nvcc), compress)


def cuda_sources() -> list[Path]:
    return sources("csrc/cuda", "*.cu")


def find_nvcc() -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.exists():
                raise CudaUnavailable(f"nvcc not found: {variable}={home} has no bin/nvcc")
            return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    # pip's packages, looked for in the environment that is installed to: an isolated build has another sys.path.
    sites = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    pip_packages = [nvcc for site in sites if site for nvcc in sorted(Path(site).glob("nvidia/cu*/bin/nvcc"))[::-1]]
    for nvcc in [SYSTEM_CUDA / "bin" / "nvcc", *pip_packages]:
        if nvcc.exists():
            return nvcc
    raise CudaUnavailable(
        f"nvcc not found (looked at CUDA_HOME, PATH, {SYSTEM_CUDA} and pip's cuda-toolkit[nvcc,cudart,cccl])"
    )


def cuda_root(nvcc: Path) -> Path:
    """Where the toolkit is: nvcc itself knows, even where it is started through a link or a script."""
    top = re.search(r"^#\$ TOP=(.+)$", output_of([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]), re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def first_with(name: str, folders: Sequence[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / name).exists()), None)


def cuda_archs(nvcc: Path) -> list[str]:
    known = re.findall(r"compute_(\w+)", output_of([nvcc, "--list-gpu-arch"]))
    asked = os.environ.get("FUSED_CUDA_ARCHS", "").strip()
    if not asked:
        archs = [arch for arch in DEFAULT_CUDA_ARCHS if arch in known]
        if not archs:
            raise CudaUnavailable(f"{nvcc} knows none of {', '.join(DEFAULT_CUDA_ARCHS)}")
        return archs
    archs = [re.sub(r"^(sm_|compute_)|\.|\+PTX$", "", word) for word in re.split(r"[;,\s]+", asked) if word]
    for arch in archs:
        if re.sub(r"[af]$", "", arch) not in known:
            raise SystemExit(f"fused-optim: FUSED_CUDA_ARCHS={asked}: {nvcc} knows {', '.join(known)}, not {arch}")
    return archs


# ------------------------------------------------------------------------------------------------------ the ninja file


def sources(folder: str, pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def native_sources() -> list[Path]:
    return [*sources("csrc", "*.cpp"), *sources("csrc/cpu", "*.cpp")]


def source_hash() -> str:
    """Identifies what the extension was made from, so that a stale build can be told."""
    # By path: importing the package would import torch.
    spec = importlib.util.spec_from_file_location("fused_sources", ROOT / "fused" / "sources.py")
    assert spec is not None and spec.loader is not None
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    return str(sources.digest(ROOT))


def host_flags(host: Host, cuda: Cuda | None, pybind11_include: Path) -> list[str]:
    sanitize = os.environ.get("FUSED_SANITIZE", "")
    if sanitize:
        optimize = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    else:
        optimize = ["-O3", "-DNDEBUG"]
    includes = ["-Icsrc", "-isystem", str(pybind11_include), "-isystem", sysconfig.get_path("include")]
    if cuda:
        includes += ["-DFUSED_WITH_CUDA=1", f"-idirafter{cuda.include}"]
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if switch("FUSED_WERROR") else [])]
    threads = ["-fopenmp"] if host.openmp else ["-Wno-unknown-pragmas"]
    users = [*arch_flags(), *flags_of("CPPFLAGS"), *flags_of("CXXFLAGS")]
    language = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
    return [*language, *optimize, *users, *STRICT_MATH, *threads, *warnings, *includes]


def nvcc_flags(host: Host, cuda: Cuda) -> list[str]:
    last = cuda.archs[-1]
    return [
        *("-O3", "-std=c++17", "-Icsrc", "--fmad=false", "-DFUSED_WITH_CUDA=1"),
        *(flag for arch in cuda.archs for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")),
        *("-gencode", f"arch=compute_{last},code=compute_{last}"),
        *(["--compress-mode=size"] if cuda.compress else []),
        *(["-ccbin", host.command[0]] if len(host.command) == 1 else []),
        *(["--Werror=all-warnings"] if switch("FUSED_WERROR") else []),
        f"-Xcompiler={','.join(['-fPIC', '-fvisibility=hidden', '-Wall', *STRICT_MATH])}",
    ]


def archs_at_once(source: Path, cuda: Cuda) -> int:
    """Of one source, which is a job by itself; the longest would be the last to end."""
    share = jobs() // (2 if source == LONGEST else len(cuda_sources()))
    return max(1, min(len(cuda.archs), share))


def link_flags(host: Host, cuda: Cuda | None) -> list[str]:
    flags = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    flags += [*arch_flags(), *flags_of("LDFLAGS"), *(["-fopenmp"] if host.openmp else [])]
    if os.environ.get("FUSED_SANITIZE"):
        flags += [f"-fsanitize={os.environ['FUSED_SANITIZE']}"]
    if cuda:
        # The CUDA runtime stays private: torch loads another one into the process under the same symbol names.
        flags += [f"-L{cuda.lib}", "-lcudart_static", "-Wl,--exclude-libs,ALL", "-lpthread", "-ldl", "-lrt"]
    return flags


def write_ninja(folder: Path, target: Path, host: Host, cuda: Cuda | None, pybind11_include: Path) -> Path:
    """Writes folder/build.ninja; paths in it are relative to ROOT."""
    common = host_flags(host, cuda, pybind11_include)
    isa_list = "-DFUSED_ISA_LIST=" + " ".join(f"X({isa})" for isa in host.isas)
    # Rule, source, object's name, flags.
    units = [("cxx", path, ".".join(path.parts), [isa_list]) for path in native_sources() if path != KERNELS]
    if cuda:
        units += [
            ("nvcc", path, ".".join(path.parts), [isa_list, f"--threads={archs_at_once(path, cuda)}"])
            for path in cuda_sources()
        ]
    # Last, and the widest instruction set at the end: of inline functions that several objects carry the linker keeps
    # the first one, which must not hold instructions that the machine may not have.
    units += [
        ("cxx", KERNELS, f"{isa}.{KERNELS.name}", [f"-DFUSED_ISA={isa}", *flags]) for isa, flags in host.isas.items()
    ]

    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {ninja_path(folder)}",
        "rule cxx",
        f"  command = {ninja_command([*host.command, *common])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = {ninja_command(host.command)} $in -o $out {ninja_command(link_flags(host, cuda))}",
        "  description = link $out",
    ]
    if cuda:
        lines += [
            "rule nvcc",
            f"  command = {ninja_command([cuda.nvcc, *nvcc_flags(host, cuda)])} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
        ]
    objects = {name: ninja_path(folder / f"{name}.o") for _, _, name, _ in units}
    # What takes longest begins first: at the end it would keep one core busy and leave the others idle.
    for rule, source, name, flags in sorted(units, key=lambda unit: (unit[1] != LONGEST, unit[0] != "nvcc")):
        lines += [f"build {objects[name]}: {rule} {ninja_path(source)}", f"  flags = {ninja_command(flags)}"]
    lines += [f"build {ninja_path(target)}: link {' '.join(objects.values())}", f"default {ninja_path(target)}"]
    path = ROOT / folder / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_command(words: Sequence[str | Path]) -> str:
    return shlex.join(map(str, words)).replace("$", "$$")


def run_ninja(path: Path) -> None:
    try:
        import ninja

        program: str | None = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja")
    if program is None:
        raise BuildError("ninja not found (pip install ninja)")
    output = []
    command = [program, "-v", "-j", str(jobs()), "-f", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        telling = re.compile(r"(^|[\s:])error\b|undefined reference|multiple definition|cannot find|Killed|not found")
        first = next(filter(telling.search, output), output[-1] if output else "")
        raise BuildError(f"compilation failed: {first.strip()[:300]}")


def stable_pybind11(folder: Path) -> Path:
    """A copy of pybind11's headers in the build folder: an isolated build has them under a new path every time, and
    with the path in the command lines nothing would ever be up to date."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 not found (pip install pybind11)") from None
    copy = folder / f"pybind11-{pybind11.__version__}"
    if not (ROOT / copy).exists():
        shutil.copytree(pybind11.get_include(), ROOT / folder / "pybind11.tmp", dirs_exist_ok=True)
        (ROOT / folder / "pybind11.tmp").rename(ROOT / copy)
    return copy


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a build folder (two environments may install from one source tree)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_extension(suffix: str) -> tuple[Path, dict[str, object]]:
    """Builds the extension; its path and the facts for ``_build_info``."""
    host = find_host()
    sanitize = os.environ.get("FUSED_SANITIZE", "")
    tag = "-".join(["native", sysconfig.get_platform(), sys.implementation.cache_tag or "python"])
    folder = Path("build") / (tag + (f"-{sanitize.replace(',', '-')}" if sanitize else ""))
    target = folder / f"_C{suffix}"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)

    cuda: Cuda | None = None
    cuda_skipped: str | None = None
    try:
        cuda = find_cuda()
    except CudaUnavailable as error:
        if switch("FUSED_CUDA"):
            raise BuildError(f"FUSED_CUDA=1, but the CUDA kernels cannot be built: {error}") from None
        cuda_skipped = str(error)
    with locked(ROOT / folder):
        include = stable_pybind11(folder)
        try:
            run_ninja(write_ninja(folder, target, host, cuda, include))
        except BuildError as error:
            if cuda is None or switch("FUSED_CUDA"):
                raise
            warn(f"building with CUDA failed, trying without. {error}")
            cuda, cuda_skipped = None, str(error)
            run_ninja(write_ninja(folder, target, host, cuda, include))
    return ROOT / target, {
        "compiler": host.version,
        "isas": list(host.isas),
        "openmp": host.openmp,
        "cuda": cuda is not None,
        "nvcc": cuda.version if cuda else None,
        "cuda_archs": cuda.archs if cuda else [],
        "cuda_skipped": cuda_skipped,
        "sanitize": sanitize or None,
    }


# -------------------------------------------------------------------------------------------------------- setuptools


def warn(text: str) -> None:
    print(f"\nWARNING (fused-optim): {text}\n", file=sys.stderr, flush=True)


def write_build_info(path: Path, version: str, facts: dict[str, object]) -> None:
    lines = ['"""What the build found and made; written by setup.py."""', "", f"version = {version!r}"]
    for name, value in facts.items():
        lines.append(f"{name}{': list[str]' if isinstance(value, list) else ''} = {value!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


class BuildPy(build_py):
    def run(self) -> None:
        # build/lib is kept between installations: without this, modules that are gone would be installed for ever.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fused", ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Compiles, and leaves the result in the source tree too, whatever the kind of installation: in a checkout,
    ``python -m fused`` imports the checkout's ``fused/``, which would lack the compiled module otherwise."""

    def built(self, ext: Extension) -> Path:
        """Where the result goes first, an editable installation's too."""
        return Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def build_extension(self, ext: Extension) -> None:
        target = self.built(ext)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        facts: dict[str, object] = {"extension": True, "extension_error": None}
        try:
            built, more = compile_extension(target.name.removeprefix("_C"))
            shutil.copy2(built, target)
            facts |= more
        except BuildError as error:
            if switch("FUSED_REQUIRE_EXT") or switch("FUSED_CUDA"):
                raise SystemExit(f"fused-optim: {error}") from None
            warn(
                f"installing without the compiled kernels, so CPU tensors use the slower reference backend. {error}. "
                "FUSED_REQUIRE_EXT=1 makes this an error."
            )
            facts = {"extension": False, "extension_error": str(error)}
        facts |= {"python": sys.implementation.cache_tag, "source_hash": source_hash()}
        write_build_info(target.with_name("_build_info.py"), self.distribution.get_version(), facts)

    def run(self) -> None:
        super().run()
        if not self.inplace and switch("FUSED_INPLACE") is not False and not os.environ.get("FUSED_SANITIZE"):
            try:
                self.copy_extensions_to_source()
            except OSError as error:
                warn(f"the compiled module was not copied into the source tree: {error}")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = self.built(ext)
            for name in (built.name, "_build_info.py"):
                source, destination = built.with_name(name), ROOT / "fused" / name
                if source.exists():
                    # Not over the old file: a running process may have it mapped.
                    fresh = destination.with_name(f"{name}.tmp")
                    shutil.copy2(source, fresh)
                    fresh.replace(destination)
                else:
                    destination.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        built = [self.built(ext) for ext in self.extensions]
        return [str(path) for file in built for path in (file, file.with_name("_build_info.py")) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {path: str(ROOT / "fused" / Path(path).name) for path in self.get_outputs()} if self.inplace else {}


def main() -> None:
    os.chdir(ROOT)
    native = [str(path) for path in [*native_sources(), *cuda_sources()]]
    setup(
        ext_modules=[Extension("fused._C", native, optional=True)],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )


# PEP 517 frontends execute this file with __name__ == "__main__"; the tests import it for its functions.
if __name__ == "__main__":
    main()
