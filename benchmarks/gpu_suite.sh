#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes: build, tests, memory checker, benchmarks. Results go to the folder given.
#   benchmarks/gpu_suite.sh OUT
set -u
out=${1:?usage: benchmarks/gpu_suite.sh OUT}
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit 2
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
status=0
step() { # name, seconds, command: runs it within the time, keeps its output, goes on after a failure
  local name=$1 limit=$2; shift 2
  local start; start=$(date +%s)
  timeout "$limit" "$@" > "$out/$name.log" 2>&1; local rc=$?
  [ $rc -eq 0 ] || status=1
  echo "$name: exit $rc after $(( $(date +%s) - start )) s"; tail -n 3 "$out/$name.log"
}

step build 90 env RSAFT_CUDA=1 RSAFT_ARCHITECTURES="$arch" python -m pip install --no-build-isolation --no-deps -e .
step doctor 60 python -m rsaft_fast.cli doctor
step tests 180 python -m pytest -m gpu tests -p no:cacheprovider
step memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 9 \
  python -m pytest -m gpu tests/ops -p no:cacheprovider -k "cuda-gpu and (norm or perturb or adamw)" -x
step benchmarks 180 python -m pytest benchmarks -p no:cacheprovider --results "$out" \
  --cases sdxl-full,sd15-full,sdxl-lora32,flux1-lora32
exit $status
