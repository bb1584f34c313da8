#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under ten minutes: build, tests, sanitizer, benchmarks.
#
#   bash benchmarks/gpu.sh
#
#   PYTHON=python3       the interpreter; its environment gets the package (or a folder in OUT, where it is read-only)
#   OUT=benchmarks/out/gpu   logs, JSON, CSV and plots
#   LIMIT=570            seconds for everything; benchmarks get what the rest leaves
#   SKIP="sanitizer"     stages to leave out: build tests sanitizer benchmarks
#   LARGE=1              also the tests of more than 2^31 elements
#   PUBLISH=1            also write benchmarks/results/<machine>.json, its plots and the README's tables
#
# Needs no network where torch, pybind11, ninja, setuptools and pytest are installed already. A stage that fails does not
# stop the others; the exit code says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/out/gpu}
LIMIT=${LIMIT:-570}
SKIP=" ${SKIP:-} "
PUBLISH=${PUBLISH:-1}
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
failed=()

left() { echo $((LIMIT - SECONDS)); }

stage() { # stage NAME SECONDS COMMAND...: run under a time limit, log, remember failure
  local name=$1 limit=$2
  shift 2
  if [[ $SKIP == *" ${name%%-*} "* ]]; then
    echo "=== $name: skipped"
    return
  fi
  if (($(left) < limit)); then limit=$(left); fi
  if ((limit < 5)); then
    echo "=== $name: no time left"
    failed+=("$name (no time)")
    return
  fi
  printf '\n=== %s (after %d s, at most %d s)\n' "$name" "$SECONDS" "$limit"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  tail -n "${LINES_SHOWN:-12}" "$OUT/$name.log"
  if ((code != 0)); then
    failed+=("$name (exit code $code)")
    echo "--- $name: exit code $code, see $OUT/$name.log"
  fi
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu --format=csv
  nvcc --version 2>/dev/null | tail -n 2
  "$PYTHON" -c 'import sys, torch; print(sys.version); print("torch", torch.__version__, torch.cuda.get_device_name())'
}

build() {
  # Isolated first, as a user would; without a network the tools of this environment serve; a read-only environment
  # gets a folder. FUSED_CUDA=1 makes a missing nvcc an error where there is one to be found.
  if command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ]; then export FUSED_CUDA=1; fi
  "$PYTHON" -m pip install --no-deps . ||
    "$PYTHON" -m pip install --no-deps --no-build-isolation . ||
    "$PYTHON" -m pip install --no-deps --no-build-isolation --upgrade --target "$OUT/site" .
}

environment || { echo "no usable GPU"; exit 1; }
stage build 200 bash -c "$(declare -f build); PYTHON='$PYTHON' OUT='$OUT' build"
[ -d "$OUT/site" ] && export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
stage info 30 env PYTHONSAFEPATH=1 "$PYTHON" -m fused info

# PYTHONSAFEPATH: what was installed is tested, not the checkout; no:cacheprovider: the checkout stays clean.
tests=("$PYTHON" -m pytest tests -q --maxfail=20 -p no:cacheprovider)
stage tests-gpu 130 env PYTHONSAFEPATH=1 "${tests[@]}" -m "gpu and not large"
[ "${LARGE:-0}" = 1 ] && stage tests-large 150 env PYTHONSAFEPATH=1 "${tests[@]}" -m "gpu and large"

publish=()
[ "$PUBLISH" = 1 ] && publish=(--publish)
budget=$(($(left) - 150)) # the sanitizer's share, and what a last cell may run over
LINES_SHOWN=70 stage benchmarks $((budget + 60)) "$PYTHON" -m benchmarks all --device cuda --seconds 0.15 \
  --limit "$budget" --out "$OUT/results" "${publish[@]}"

# The Triton kernels too, where the CUDA ones were measured above.
LINES_SHOWN=30 stage benchmarks-triton 60 "$PYTHON" -m benchmarks step --quick --device cuda --backend triton \
  --opt adamw,adafactor --seconds 0.1

# Small odd shapes through every optimizer and two storage formats, under the memory checker and the race checker.
if command -v compute-sanitizer >/dev/null; then
  small=("$PYTHON" -m benchmarks step --quick --device cuda --shape 5x1023,2x65 --vs none --seconds 0.001)
  check=(compute-sanitizer --error-exitcode 9 --tool)
  stage sanitizer-memcheck 45 "${check[@]}" memcheck "${small[@]}" --opt main
  stage sanitizer-racecheck 45 "${check[@]}" racecheck "${small[@]}" --opt adamw,adafactor
  # Wide and narrow matrices and stacks of small ones: every way in which Adafactor's kernels cut a tensor.
  factored=("$PYTHON" -m benchmarks step --quick --device cuda --shape 1x70x288,1x70x61,1x600x3x3 --vs none --seconds 0.001)
  stage sanitizer-adafactor 45 "${check[@]}" memcheck "${factored[@]}" --opt adafactor
  stage sanitizer-adafactor-race 45 "${check[@]}" racecheck "${factored[@]}" --opt adafactor
  stage sanitizer-storage 45 "${check[@]}" memcheck "${small[@]}" --opt adamw --dtype bf16 --master split8 --state int8
else
  echo "=== sanitizer: compute-sanitizer is not here"
fi

printf '\n=== done after %d s; %s\n' "$SECONDS" "$OUT"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "everything passed"
