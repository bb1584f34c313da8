"""The build: what is installed is what was built, and building fails, or does without, as it says."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(str(importlib.import_module("fused").__file__)).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# In place of csrc: a module that compiles in a second and has a part per instruction set.
TINY_CSRC = {
    "csrc/bindings.cpp": """
        #define PY_SSIZE_T_CLEAN
        #include <Python.h>
        #include "tiny.h"
        #define X(isa) int answer_##isa();
        FUSED_ISA_LIST
        #undef X
        #define X(isa) + answer_##isa()
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, {}, {}, {}, {}, {}};
        extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
          PyObject* m = PyModule_Create(&module);
          PyModule_AddIntConstant(m, "answer", 0 FUSED_ISA_LIST);
          return m;
        }
    """,
    "csrc/tiny.h": "#define ANSWER 7\n",
    "csrc/cpu/kernels.cpp": """
        #include "tiny.h"
        #define GLUE(a, b) a##b
        #define NAME(a, b) GLUE(a, b)
        int NAME(answer_, FUSED_ISA)() { return ANSWER; }
    """,
}


def build_info() -> ModuleType:
    module: ModuleType = pytest.importorskip("fused._build_info", reason="fused was not built by setup.py")
    return module


@pytest.fixture(scope="module")
def setup_py() -> Iterator[ModuleType]:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("fused_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fused_setup"] = module  # dataclasses looks it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fused_setup"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the package is built from, with nothing built."""
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module, reason="building needs the [test] extra")
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("_C.*", "_build_info.py", "__pycache__")
    for name in ("fused", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def tiny_tree(tree: Path) -> Path:
    """The same with a csrc that takes no time to compile."""
    shutil.rmtree(tree / "csrc")
    for name, text in TINY_CSRC.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


def run(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it with none of the variables that steer the build but those given."""
    steering = re.compile(r"FUSED_|CXX|CPPFLAGS|LDFLAGS|MAX_JOBS|PYTHONPATH|LD_PRELOAD")
    inherited = {name: value for name, value in os.environ.items() if not steering.match(name)}
    return subprocess.run(
        command,
        cwd=cwd,
        env=inherited | environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def install(tree: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """pip install --target, verbosely: pip hides what a successful build says."""
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--upgrade"]
    return run([*pip, "--target", target, "."], tree, **environment)


def python(code: str, cwd: Path, *path: Path) -> str:
    """What the code prints in a fresh interpreter with these folders first on its path."""
    result = run([sys.executable, "-c", textwrap.dedent(code)], cwd, PYTHONPATH=os.pathsep.join(map(str, path)))
    assert result.returncode == 0, result.stdout
    return result.stdout.strip()


# ------------------------------------------------------------------------------------------------ what is installed


def test_tests_run_on_the_installed_package() -> None:
    if os.environ.get("FUSED_EXPECT_INSTALLED") != "1":
        pytest.skip("for CI (FUSED_EXPECT_INSTALLED=1)")
    assert ROOT not in PACKAGE.parents
    assert build_info().extension


def test_version() -> None:
    version = importlib.metadata.version("fused-optim")
    assert importlib.import_module("fused").__version__ == version
    assert build_info().version == version


def test_build_info_is_true() -> None:
    info = build_info()
    if not info.extension:
        assert info.extension_error
        with pytest.raises(ImportError):
            importlib.import_module("fused._C")
        return
    extension = importlib.import_module("fused._C")
    assert info.extension_error is None
    assert extension.built_isas() == info.isas
    assert info.isas[0] == "baseline"
    assert info.compiler
    assert (info.nvcc is not None) == info.cuda == bool(info.cuda_archs) == (info.cuda_skipped is None)


def test_extension_is_of_these_sources(setup_py: ModuleType) -> None:
    assert build_info().source_hash == setup_py.source_hash(), (
        f"{PACKAGE} was built from other sources than csrc/ holds now: run pip install again"
    )


def test_extension_does_not_know_torch() -> None:
    if not build_info().extension:
        pytest.skip("no extension")
    path = PACKAGE / f"_C{SUFFIX}"
    contents = path.read_bytes()
    # Torch's libraries are named once, to be looked for at run time, as are two functions that are looked up there.
    for name in (b"libc10", b"libcudart.so"):
        assert name not in contents
    if readelf := shutil.which("readelf"):
        parts = [subprocess.run([readelf, "-W", part, path], capture_output=True, text=True, check=True).stdout
                 for part in ("--dynamic", "--dyn-syms")]  # fmt: skip
        needed = [line for line in parts[0].splitlines() if "NEEDED" in line]
        assert needed
        assert not [line for line in needed if "torch" in line or "c10" in line]
        assert "PyInit__C" in parts[1]
        # Mangled names of torch's namespaces.
        assert not re.search(r"_ZNK?(2at|3c10|5torch)", parts[1])


# ------------------------------------------------------------------------------------------------------- building


@pytest.mark.slow
def test_installs_and_works_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    result = install(tree, tmp_path / "target", CXX="/bin/false")
    assert result.returncode == 0, result.stdout
    assert "WARNING (fused-optim): installing without the compiled kernels" in result.stdout
    assert "/bin/false" in result.stdout
    assert not list((tmp_path / "target" / "fused").glob("_C*"))
    code = """
        import torch, fused, fused._build_info as info
        assert not info.extension and '/bin/false' in info.extension_error, vars(info)
        p, q = (torch.ones(5, requires_grad=True) for _ in range(2))
        p.grad = q.grad = torch.full((5,), 0.5)
        fused.AdamW([p]).step(), torch.optim.AdamW([q]).step()
        assert torch.allclose(p, q) and not torch.equal(p, torch.ones(5))
        print(fused.__file__)
    """
    where = python(code, tmp_path, tmp_path / "target")
    assert where.startswith(str(tmp_path / "target"))


@pytest.mark.slow
def test_missing_compiler_is_an_error_on_demand(tree: Path, tmp_path: Path) -> None:
    result = install(tree, tmp_path / "target", CXX="/bin/false", FUSED_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "fused-optim: the C++ compiler does not work: /bin/false" in result.stdout


@pytest.mark.slow
def test_code_that_does_not_compile_is_reported(tiny_tree: Path, tmp_path: Path) -> None:
    (tiny_tree / "csrc" / "tiny.h").write_text("#define ANSWER nothing\n")
    result = install(tiny_tree, tmp_path / "target")
    assert result.returncode == 0, result.stdout
    assert re.search(r"compilation failed: csrc/tiny.h:1:.*nothing", result.stdout)


@pytest.mark.slow
def test_missing_nvcc_is_an_error_on_demand(tiny_tree: Path, tmp_path: Path) -> None:
    (tiny_tree / "csrc" / "cuda").mkdir()
    (tiny_tree / "csrc" / "cuda" / "kernels.cu").write_text("__global__ void kernel() {}\n")
    nowhere = str(tmp_path / "nowhere")
    result = install(tiny_tree, tmp_path / "target", FUSED_CUDA="1", CUDA_HOME=nowhere)
    assert result.returncode != 0
    message = f"nvcc not found: CUDA_HOME={nowhere} has no bin/nvcc"
    assert f"fused-optim: FUSED_CUDA=1, but the CUDA kernels cannot be built: {message}" in result.stdout

    result = install(tiny_tree, tmp_path / "target", CUDA_HOME=nowhere)
    assert result.returncode == 0, result.stdout
    assert message in python("import fused._build_info as i; print(i.cuda_skipped)", tmp_path, tmp_path / "target")


@pytest.mark.slow
def test_builds_every_isa_in_both_places_and_only_once(tiny_tree: Path, tmp_path: Path, setup_py: ModuleType) -> None:
    if not build_info().extension:
        pytest.skip("no compiler")
    target = tmp_path / "target"

    def answers() -> list[str]:
        """From the installed package, and from the source tree, as `python -m fused` in a checkout imports it."""
        code = """
            import sys, types
            package = sys.modules['fused'] = types.ModuleType('fused')
            package.__path__ = [sys.path[1]]
            import fused._C, fused._build_info as info
            print(fused._C.answer / len(info.isas))
        """
        return [python(code, tmp_path, place / "fused") for place in (target, tiny_tree)]

    result = install(tiny_tree, target)
    assert result.returncode == 0, result.stdout
    assert answers() == ["7.0", "7.0"]
    assert (target / "fused" / f"_C{SUFFIX}").exists()

    result = install(tiny_tree, target)
    assert "ninja: no work to do" in result.stdout

    (tiny_tree / "csrc" / "tiny.h").write_text("#define ANSWER 8\n")
    result = install(tiny_tree, target)
    assert result.returncode == 0, result.stdout
    assert answers() == ["8.0", "8.0"]


@pytest.mark.slow
def test_source_distribution_is_complete(tree: Path) -> None:
    (tree / "fused" / "_build_info.py").write_text("stale = True\n")
    result = run([sys.executable, "setup.py", "-q", "sdist"], tree)
    assert result.returncode == 0, result.stdout
    (archive,) = (tree / "dist").glob("fused_optim-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*.*")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE"}
    wanted |= {path.relative_to(tree).as_posix() for path in (tree / "fused").rglob("*.py")} - {"fused/_build_info.py"}
    assert wanted <= names
    assert "fused/_build_info.py" not in names


# --------------------------------------------------------------------------------------------- settings, one by one


def test_settings_are_checked(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CUDA", "yes")
    with pytest.raises(SystemExit, match="FUSED_CUDA=yes: expected 0, 1 or nothing"):
        setup_py.find_cuda()
    monkeypatch.setenv("MAX_JOBS", "0")
    with pytest.raises(SystemExit, match="MAX_JOBS=0"):
        setup_py.jobs()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_py.jobs() == 3


@pytest.fixture
def fake_cuda(tmp_path: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit that says what nvcc 13.0 says, laid out as pip's packages are; and sources for it."""
    home = tmp_path / "nvidia" / "cu13"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin" / "nvcc").write_text(
        """#!/bin/sh
        case "$*" in
          --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;
          --help) echo "--compress-mode";;
          --list-gpu-arch) for arch in 75 80 90 100 120; do echo compute_$arch; done;;
          --dryrun*) echo "#$ TOP=$(dirname "$0")/..";;
        esac
        """
    )
    (home / "bin" / "nvcc").chmod(0o755)
    for name in ("FUSED_CUDA", "FUSED_CUDA_ARCHS", "FUSED_SANITIZE", "CUDA_PATH", "MAX_JOBS", "FUSED_WERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(setup_py, "cuda_sources", lambda: [Path("csrc/cuda/a.cu"), Path("csrc/cuda/b.cu")])
    return home


def test_finds_cuda(fake_cuda: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = setup_py.find_cuda()
    assert (cuda.nvcc, cuda.version) == (fake_cuda / "bin" / "nvcc", "13.0.88")
    assert (cuda.include, cuda.lib) == (fake_cuda / "include", fake_cuda / "lib")
    assert cuda.archs == ["75", "80", "90", "100", "120"]

    monkeypatch.setenv("FUSED_CUDA_ARCHS", "8.0, sm_90a;compute_100+PTX")
    assert setup_py.find_cuda().archs == ["80", "90a", "100"]
    monkeypatch.setenv("FUSED_CUDA_ARCHS", "70")
    with pytest.raises(SystemExit, match="not 70"):
        setup_py.find_cuda()


def test_says_why_there_is_no_cuda(fake_cuda: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_cuda / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(setup_py.CudaUnavailable, match=r"not libcudart_static.a under .*cuda-toolkit\["):
        setup_py.find_cuda()
    (fake_cuda / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(setup_py.CudaUnavailable, match="does not run"):
        setup_py.find_cuda()
    monkeypatch.setenv("FUSED_CUDA", "0")
    with pytest.raises(setup_py.CudaUnavailable, match="FUSED_CUDA=0"):
        setup_py.find_cuda()
    monkeypatch.delenv("FUSED_CUDA")
    monkeypatch.setattr(setup_py, "cuda_sources", list)
    with pytest.raises(setup_py.CudaUnavailable, match="no sources"):
        setup_py.find_cuda()


def test_finds_nvcc_of_pip(fake_cuda: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "SYSTEM_CUDA", Path("nowhere"))
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(fake_cuda.parent.parent))
    assert setup_py.find_nvcc() == fake_cuda / "bin" / "nvcc"


def test_nvcc_flags(fake_cuda: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    host = setup_py.Host(["g++"], "g++", True, {"baseline": []})
    flags = setup_py.nvcc_flags(host, setup_py.find_cuda())
    assert {"arch=compute_75,code=sm_75", "arch=compute_120,code=compute_120"} <= set(flags)
    assert sum("code=compute_" in flag for flag in flags) == 1
    assert {"--fmad=false", "--compress-mode=size"} <= set(flags)
    assert not {"--use_fast_math", "-lineinfo"} & set(flags)


def test_the_longest_source_begins_first(
    fake_cuda: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is linked keeps its order: the kernels of the widest instruction set come last."""
    assert (ROOT / setup_py.LONGEST).is_file()
    host = setup_py.Host(["g++"], "g++", True, {"baseline": [], "avx2": ["-mavx2"]})
    cuda = setup_py.find_cuda()
    monkeypatch.setattr(setup_py, "cuda_sources", lambda: [Path("csrc/cuda/a.cu"), setup_py.LONGEST])
    text = setup_py.write_ninja(tmp_path, tmp_path / "_C.so", host, cuda, Path("pybind11")).read_text()
    builds = [line.split(":")[1].split() for line in text.splitlines() if line.startswith("build ")]
    assert [source for _, source, *_ in builds[:2]] == [str(setup_py.LONGEST), "csrc/cuda/a.cu"]
    assert [Path(path).name for path in builds[-1][-2:]] == ["baseline.kernels.cpp.o", "avx2.kernels.cpp.o"]
    for jobs, longest, other in (("1", 1, 1), ("6", 3, 3), ("64", 5, 5)):
        monkeypatch.setenv("MAX_JOBS", jobs)
        assert setup_py.archs_at_once(setup_py.LONGEST, cuda) == longest
        assert setup_py.archs_at_once(Path("csrc/cuda/a.cu"), cuda) == other
    monkeypatch.setattr(setup_py, "cuda_sources", lambda: [Path("csrc/cuda/a.cu")] * 10)
    monkeypatch.setenv("MAX_JOBS", "8")
    assert setup_py.archs_at_once(setup_py.LONGEST, cuda) == 4
    assert setup_py.archs_at_once(Path("csrc/cuda/a.cu"), cuda) == 1


def test_math_flags_win_over_the_users(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-ffp-contract=fast -O2")
    host = setup_py.Host(["g++"], "g++", True, {"baseline": []})
    flags = setup_py.host_flags(host, None, Path("pybind11"))
    assert flags.index("-ffp-contract=off") > flags.index("-ffp-contract=fast")
    assert flags.index("-O2") > flags.index("-O3")
    assert "-ffast-math" not in flags
