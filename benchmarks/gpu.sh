#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under ten minutes: build, tests, benchmarks, sanitizer.
#
#   bash benchmarks/gpu.sh
#
#   PYTHON=python3       the interpreter; its environment gets the package (or a folder in OUT, where it is read-only)
#   OUT=benchmarks/out/gpu   logs, a summary, JSON, CSV and plots
#   ARCHIVE=FILE.tar.gz  OUT in one file, renewed after every stage
#   LIMIT=570            seconds for everything, of which each stage has its part; benchmarks get what the rest leaves
#   SKIP="sanitizer"     stages to leave out: build info tests targets benchmarks sanitizer
#   LARGE=1              also the tests of more than 2^31 elements
#   PUBLISH=0            do not write benchmarks/results/<machine>.json, its plots and the README's tables
#   COMMIT=1a2b3c4       what is measured, where the tree came without its repository
#   DEVICE=cpu           a rehearsal: all of it without a GPU, as far as that goes
#   FUSED_CUDA_ARCHS     what to compile for; default: this machine's GPU alone, which takes a fifth of the time
#
# Needs no network where torch, pybind11, ninja, setuptools and pytest are installed already; what is missing is said
# before anything is started. A stage that fails or hangs does not stop the others, and what it left is kept; the exit code
# says whether all passed. The most telling come first. Where the CUDA kernels cannot be compiled, those of Triton are
# tested and measured. Nothing of the card's settings is touched.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/out/gpu}
ARCHIVE=${ARCHIVE:-}
LIMIT=${LIMIT:-570}
SKIP=" ${SKIP:-} "
PUBLISH=${PUBLISH:-1}
DEVICE=${DEVICE:-cuda}
[ -n "${COMMIT:-}" ] && export COMMIT
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
[ -n "$ARCHIVE" ] && ARCHIVE=$(realpath -m "$ARCHIVE")
: >"$OUT/summary.txt"
failed=()
running=

left() { echo $((LIMIT - SECONDS)); }

part() { echo $(($1 * LIMIT / 570)); } # of the time, in seconds of the usual limit

note() { # one line, kept
  echo "$*" | tee -a "$OUT/summary.txt"
}

keep() { # what there is so far; a folder that is written to meanwhile must not spoil it
  [ -n "$ARCHIVE" ] || return 0
  tar --exclude=site --warning=no-file-changed -czf "$ARCHIVE.tmp" -C "$(dirname "$OUT")" "$(basename "$OUT")"
  mv "$ARCHIVE.tmp" "$ARCHIVE"
}

stop() { # told to end: so is the stage, and what it wrote is kept
  trap - TERM INT
  [ -n "$running" ] && kill "$running" 2>/dev/null && wait "$running" 2>/dev/null
  note "=== stopped after $SECONDS s"
  keep
  exit 143
}
trap stop TERM INT

# stage NAME SECONDS COMMAND...: run under a time limit, log, remember failure. ENDED_BY=INT lets pytest say what has
# failed so far; the signal has to be made known again, as the shell has what it starts in the background ignore it.
stage() {
  local name=$1 limit=$2 start=$SECONDS code=0 signal=${ENDED_BY:-TERM}
  shift 2
  if [[ $SKIP == *" ${name%%-*} "* ]]; then
    note "=== $name: skipped"
    return
  fi
  if (($(left) < limit)); then limit=$(left); fi
  if ((limit < 2)); then
    note "=== $name: no time left"
    failed+=("$name (no time)")
    return 1
  fi
  printf '\n=== %s (after %d s, at most %d s)\n' "$name" "$SECONDS" "$limit"
  # In the background, so that a signal to this script is not kept waiting.
  timeout --signal="$signal" --kill-after=12 "$limit" env --default-signal=INT "$@" >"$OUT/$name.log" 2>&1 </dev/null &
  running=$!
  wait "$running" || code=$?
  running=
  tail -n "${LINES_SHOWN:-12}" "$OUT/$name.log"
  local result="exit code $code"
  if ((code == 124 || code == 137)); then result="cut off after $limit s"; fi
  if ((code == 0)); then
    note "=== $name: passed in $((SECONDS - start)) s"
  else
    failed+=("$name ($result)")
    note "=== $name: $result after $((SECONDS - start)) s, see $OUT/$name.log"
  fi
  keep
  return "$code"
}

check() { # what is here; 1: nothing can be measured, 2: something has to be installed
  if [ "$DEVICE" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,temperature.gpu --format=csv || return 1
  fi
  DEVICE=$DEVICE SKIP=$SKIP "$PYTHON" - <<'PROGRAM'
import importlib.metadata as installed, os, re, shutil, sys

def version(name):
    try:
        return installed.version(name)
    except installed.PackageNotFoundError:
        return None

def at_least(name, *least):
    found = version(name)
    return found is not None and tuple(int(n) for n in re.findall(r"\d+", found)[: len(least)]) >= least

skipped = os.environ["SKIP"].split()
missing = []
if version("torch") is None:
    missing.append("torch>=2.10")
if "build" not in skipped:
    missing += [] if at_least("setuptools", 77) else ["setuptools>=77"]
    missing += [] if at_least("pybind11", 2, 13) else ["pybind11>=2.13"]
    missing += [] if version("ninja") or shutil.which("ninja") else ["ninja"]
    missing += [] if at_least("pip", 1) else ["pip"]
if not {"tests", "sanitizer"} <= set(skipped) and not at_least("pytest", 8):
    missing.append("pytest>=8")
if missing:
    print(f"missing: {' '.join(missing)}\n  {sys.executable} -m pip install " + " ".join(f"'{m}'" for m in missing))
    raise SystemExit(2)
for name, without in (
    ("triton", "its kernels are neither tested nor measured"), ("matplotlib", "no plots, nothing is published"),
    ("numpy", "some tests are skipped"), ("pytest-xdist", "tests run one after the other"),
):
    if version(name) is None:
        print(f"note: {name} is not installed: {without}")

import torch
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", version("triton"))
if os.environ["DEVICE"] == "cuda":
    if not torch.cuda.is_available():
        print("torch.cuda.is_available() is False")
        raise SystemExit(1)
    print(torch.cuda.get_device_name(), "of compute capability", "%d.%d" % torch.cuda.get_device_capability())
PROGRAM
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

build() {
  # The tools of this environment, which need no network; a read-only environment gets a folder. Told as it goes: what a
  # time limit cuts off should show where.
  "$PYTHON" -m pip install -v --no-deps --no-build-isolation --no-index . ||
    "$PYTHON" -m pip install -v --no-deps --no-build-isolation --no-index --upgrade --target "$OUT/site" .
}

check
case $? in
  0) ;;
  2) exit 2 ;;
  *) echo "no usable GPU (DEVICE=cpu rehearses without one)"; exit 1 ;;
esac
nvcc=$(command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2>/dev/null)
if [ -n "$nvcc" ]; then
  "$nvcc" --version | tail -n 2
  export FUSED_CUDA=${FUSED_CUDA:-1} # what there is a compiler for has to compile
else
  note "note: nvcc is neither on PATH nor in CUDA_HOME: the CUDA kernels are not built, those of Triton are tested and measured"
fi
if [ -z "${FUSED_CUDA_ARCHS:-}" ] && [ "$DEVICE" = cuda ]; then
  FUSED_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
fi
export FUSED_CUDA_ARCHS=${FUSED_CUDA_ARCHS:-90}
has matplotlib || PUBLISH=0

building=(bash -c "$(declare -f build); PYTHON='$PYTHON' OUT='$OUT' build")
if ! stage build "$(part 200)" "${building[@]}" && [ -n "$nvcc" ] && [ "$FUSED_CUDA" = 1 ]; then
  stage build-without-cuda "$(part 120)" env FUSED_CUDA=0 "${building[@]}"
fi
[ -d "$OUT/site" ] && export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
stage info "$(part 60)" env PYTHONSAFEPATH=1 "$PYTHON" -m fused info

# PYTHONSAFEPATH: what was installed is tested, not the checkout; no:cacheprovider: the checkout stays clean. Most of the
# time goes into compiling Triton's kernels, which several processes share through their cache. A test that hangs says
# where after a while.
tests=(env PYTHONSAFEPATH=1 "$PYTHON" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=60)
several=()
if has xdist; then several=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
test_stage() { ENDED_BY=INT LINES_SHOWN=25 stage "$1" "$2" "${tests[@]}" ${several[@]+"${several[@]}"} "${@:3}"; }
test_stage tests-gpu "$(part 120)" tests/test_gpu.py

publish=()
[ "$PUBLISH" = 1 ] && publish=(--publish)
# The goals in a process of their own: what kills it leaves the other measurements their GPU.
measured=(--device "$DEVICE" --seconds 0.15 --out "$OUT/results")
LINES_SHOWN=40 stage targets "$(part 110)" "$PYTHON" -m benchmarks targets "${measured[@]}" --limit "$(part 80)"
budget=$(($(left) - $(part 250))) # the share of what follows, and what a last cell may run over
LINES_SHOWN=70 stage benchmarks $((budget + $(part 60))) "$PYTHON" -m benchmarks all "${measured[@]}" --skip targets \
  --limit "$budget" ${publish[@]+"${publish[@]}"}

# What every backend has to pass, on the GPU's; without one nothing is left to select.
if [ "$DEVICE" = cuda ]; then
  others=(tests --ignore=tests/test_gpu.py --maxfail=20 -m "gpu and not large")
  test_stage tests-cuda "$(part 60)" "${others[@]}" -k "not triton"
  test_stage tests-triton "$(part 80)" "${others[@]}" -k triton
  [ "${LARGE:-0}" = 1 ] && test_stage tests-large "$(part 150)" tests -m "gpu and large"
fi

# The Triton kernels too, where the CUDA ones were measured above.
if [ "$DEVICE" = cuda ] && has triton; then
  LINES_SHOWN=30 stage benchmarks-triton "$(part 50)" "$PYTHON" -m benchmarks step --quick --device cuda --backend triton \
    --opt adamw,adafactor --seconds 0.1
fi

# Small odd shapes through the CUDA kernels in every kind of storage, under the memory checker and the race checker. torch
# must not hand out parts of larger blocks, in which an access out of bounds would go unnoticed.
if command -v compute-sanitizer >/dev/null; then
  small=(tests/test_gpu.py -k "cuda and (same_bits or adafactor_repeats)")
  for tool in memcheck racecheck; do
    ENDED_BY=INT stage "sanitizer-$tool" "$(part 80)" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --error-exitcode 9 --target-processes all --tool "$tool" "${tests[@]}" "${small[@]}"
  done
else
  note "=== sanitizer: compute-sanitizer is not here"
fi

printf '\n=== done after %d s; %s\n' "$SECONDS" "$OUT"
if ((${#failed[@]})); then
  note "failed: $(printf '%s; ' "${failed[@]}")"
  keep
  exit 1
fi
note "everything passed"
keep
