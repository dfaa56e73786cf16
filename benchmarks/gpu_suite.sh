#!/usr/bin/env bash
# Builds the CUDA kernels and checks and times everything on a machine with a GPU.
#
#   benchmarks/gpu_suite.sh DIR [build] [tests] [sanitizer] [throughput]      (default: all four)
#
# Leaves at most 8 files in DIR: a log for each part, tests.xml, <device>.json, kernels-<device>.json
# and summary.txt. A part that fails does not stop the next; the exit code is 1 when any failed. Needs
# nvcc, cmake, ninja and pybind11 beside a CUDA build of torch. PYTHON chooses the interpreter,
# *_LIMIT_S the time limits. The tests compile hundreds of Triton kernels: with pytest-xdist they use
# every core (minutes on 16).
set -uo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=${*:-build tests sanitizer throughput}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
summary=$out/summary.txt
: >"$summary"
failed=0

# part NAME LIMIT_S COMMAND...: runs it with its output in NAME.log, notes state and seconds.
part() {
  local name=$1 limit=$2 begin code
  shift 2
  begin=$SECONDS
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  if [ $code -ne 0 ]; then
    failed=1
    echo "--- last lines of $name.log"
    tail -n 15 "$out/$name.log"
  fi
  printf '%-12s exit %3d  %4d s\n' "$name" "$code" $((SECONDS - begin)) | tee -a "$summary"
}

build() {
  # Only this machine's architecture: compiling for others takes time and tells nothing here.
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  nvidia-smi || return 1
  CO2S_WITH_CUDA=1 CO2S_CUDA_ARCHS=${CO2S_CUDA_ARCHS:-$arch} \
    "$python" -m pip install --no-build-isolation --no-deps --verbose --editable . || return 1
  # A failed native build still installs a pure Python package; here that is a failure.
  "$python" -c 'from co2s_fast import ops
with ops.use_backend("cuda"):
    print("backend:", ops.backend("cuda"))'
}

tests() {
  local elsewhere workers=()
  mapfile -t elsewhere < <(grep -rl 'mark\.gpu' tests --include='test_*.py' |
    grep -v '^tests/\(conformance\|ops\|kernels\)/')
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n auto)
  # Every test by name: of a run that is cut short, too, the log says which failed.
  "$python" -m pytest -m "gpu or not gpu" -v -rs -p no:cacheprovider "${workers[@]}" \
    --junitxml="$out/tests.xml" tests/conformance tests/ops tests/kernels "${elsewhere[@]}"
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: not run"
    return 0
  fi
  # Without the caching allocator each tensor is an allocation of its own, so overruns are seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" benchmarks/smoke.py
}

throughput() {
  local name
  name=$("$python" -c 'import sys; sys.path.insert(0, "."); import torch
from benchmarks.results import slug
print(slug(torch.device("cuda"), torch.get_num_threads()))') || return 1
  "$python" benchmarks/kernel_times.py --out "$out/kernels-$name.json" || return 1
  "$python" benchmarks/throughput.py --device cuda --out "$out/$name.json"
}

export -f build tests sanitizer throughput
export python out
for name in $parts; do
  case $name in
    build) part build "${BUILD_LIMIT_S:-240}" bash -c build ;;
    tests) part tests "${TESTS_LIMIT_S:-900}" bash -c tests ;;
    sanitizer) part sanitizer "${SANITIZER_LIMIT_S:-120}" bash -c sanitizer ;;
    throughput) part throughput "${THROUGHPUT_LIMIT_S:-900}" bash -c throughput ;;
    *) echo "unknown part: $name" >&2; failed=1 ;;
  esac
done
exit $failed
