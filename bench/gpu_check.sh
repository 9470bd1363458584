#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU has to show, in one call of less than nine minutes, without network:
#   bash bench/gpu_check.sh
# builds and installs zfcore beside the machine's own packages, runs the tests marked gpu, and compute-sanitizer's four
# tools on planted bugs and on every kernel, measures what the GPU can do at most, runs the benchmarks against that, and
# times the kernels' configurations. Logs, results.json and results.md go to $OUT (out/gpu_check).
#
#   PYTHON=python3                      with torch, triton, pytest, pytest-benchmark, hypothesis and the build requirements
#   ZFCORE_GPU_SECONDS=520              for everything; each stage has a limit of its own inside it
#   ZFCORE_CUDA_ARCHITECTURES=...       a CMake list, "all" for those that a release has; the GPU's own by default
#   ZFCORE_COMMIT=...                   named in the results where the tree is a copy without git
#   PYTHONPATH=...                      may bring Captum, the other side of some comparisons, which are left out without
# Ends with 1 if a stage failed or found no time, and with 2 if nothing could be begun.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
python=${PYTHON:-python3}
out=${OUT:-out/gpu_check}
deadline=$((SECONDS + ${ZFCORE_GPU_SECONDS:-520}))
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>&1) || {
  echo "gpu_check: no usable NVIDIA GPU here: ${gpu:-nvidia-smi failed}" >&2
  exit 2
}
gpu=${gpu%%$'\n'*}
capability=${gpu##*, }
capability=${capability//./}
[[ $capability =~ ^[0-9]+$ ]] || {
  echo "gpu_check: nvidia-smi named no compute capability: $gpu" >&2
  exit 2
}
for tool in "$python" nvcc cmake timeout; do
  command -v "$tool" >/dev/null || {
    echo "gpu_check: $tool is not on PATH" >&2
    exit 2
  }
done

python=$(command -v "$python")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stages=$work/stages.tsv
: >"$stages"
rm -f "$out"/{build,tests,sanitizers,bench,tune}.log "$out"/results.{json,md}

# stage NAME LIMIT LOG COMMAND...: runs the command for at most LIMIT seconds, or as many as are left, and notes how it went.
stage() {
  local name=$1 limit=$2 log=$3 began=$SECONDS status result
  shift 3
  ((limit > deadline - began)) && limit=$((deadline - began))
  if ((limit < 5)); then
    result=skipped
  else
    printf '== %s\n' "$name" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    case $status in
      0) result=passed ;;
      124 | 137) result="failed (stopped after $limit s)" ;;
      *) result="failed ($status)" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" $((SECONDS - began)) "$result" >>"$stages"
  printf '%-16s %4d s  %s\n' "$name" $((SECONDS - began)) "$result"
  [[ $result == passed ]]
}

echo "$gpu; results in $out"

# The shipped architectures of this GPU's generation end in "a" from Hopper on: what only that chip has.
suffix=""
((capability >= 90)) && suffix=a
case ${ZFCORE_CUDA_ARCHITECTURES:=$capability$suffix-real} in
  all) unset ZFCORE_CUDA_ARCHITECTURES ;;
  *) export ZFCORE_CUDA_ARCHITECTURES ;;
esac
ZFCORE_CUDA=ON ZFCORE_BUILD_DIR=$work/build stage build 150 "$out/build.log" \
  "$python" -m pip install . --no-build-isolation --no-deps --no-index --target "$work/install" || {
  tail -40 "$out/build.log" >&2
  echo "gpu_check: without a build there is nothing to check" >&2
  exit 1
}

# From here on the install is what runs: the source tree is not on the path.
cd "$work" || exit 2
export PYTHONPATH=$work/install${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_DIR=$work/triton PYTHONUNBUFFERED=1
pytest=("$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root")
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)

# These two prove and do not time, so they may share the GPU.
stage tests 170 "$out/tests.log" "${pytest[@]}" -p no:benchmark "${workers[@]}" "$root/tests" -m gpu --no-skips &
stage sanitizers 170 "$out/sanitizers.log" "$python" "$root/tests/cuda/gpu_sanitizers.py" --seconds 160 \
  --architecture "sm_$capability" &
wait

bench() { # bench NAME LIMIT: one file of benchmarks in a process of its own, so that a fault ends no other
  stage "bench $1" "$2" "$out/bench.log" "${pytest[@]}" "$root/bench/bench_$1.py" --benchmark-only \
    --benchmark-columns=median --device cuda --stop-after $(($2 - 15)) --zfcore-json "$work/$1.json"
}
bench analyses 65
bench ops 75
bench changes 45
bench kernels 30
bench steps 30

left=$((deadline - SECONDS - 8))
stage tune 90 "$out/tune.log" "$python" "$root/bench/tune.py" --seconds $((left < 85 ? left - 5 : 80)) --json "$work/tune.json"

"$python" "$root/bench/gpu_report.py" "$work" "$out" || echo "report	0	failed" >>"$stages"
if grep -qv $'\tpassed$' "$stages"; then
  echo "gpu_check: not everything passed; the logs are in $out" >&2
  exit 1
fi
echo "gpu_check: all is well"
