#!/usr/bin/env bash
# All that needs a GPU, in two calls of 9 minutes each.
#
#   benchmarks/gpu_suite.sh OUT            build, doctor, GPU tests, memory and race checker, benchmarks, plots
#   benchmarks/gpu_suite.sh OUT memory     build, doctor, whole updates and rewards at real size (gpu_memory.py,
#                                          rewards_gpu.py)
#
# OUT gets summary.txt (how each step ended), suite.log (what each said), <gpu>/<date>.json or <gpu>/memory.json and
# <gpu>/rewards.json (the figures, written row by row), goals.txt, and in the first call bars.png and roofline.png. A
# second memory call goes on from the memory.json that it finds in OUT, else in benchmarks/results. Nothing is
# downloaded; what is missing is said and gone around. The exit code is 1 when a step failed. PYTHON names the
# interpreter (default: python3).
set -u
out=${1:?usage: benchmarks/gpu_suite.sh OUT [memory]}
part=${2:-suite}
case $part in suite | memory) ;; *) echo "there is no part '$part'; the second argument is memory, or left out" >&2; exit 2 ;; esac
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
RSAFT_COMMIT=${RSAFT_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
export RSAFT_COMMIT RSAFT_CUDA=1 RSAFT_ARCHITECTURES="${arch:-90}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
: > "$out/summary.txt"
: > "$out/suite.log"
status=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: within its time, output kept, the next step runs whatever this one did
step() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  echo "== $name: $*" >> "$out/suite.log"
  timeout --kill-after=5 "$limit" "$@" > "$scratch/log" 2>&1
  rc=$?
  tail -c 1500000 "$scratch/log" >> "$out/suite.log"
  [ $rc -eq 0 ] || status=1
  [ $rc -eq 124 ] && say "$name: out of time after $limit s" || say "$name: exit $rc after $((SECONDS - start)) s"
  tail -n 3 "$scratch/log" | cut -c1-200 | sed 's/^/  /' | tee -a "$out/summary.txt"
  return $rc
}

# Where pip's setuptools is too old for pyproject.toml: the same files as an installed package, and the library by nvcc.
without_pip() {
  mkdir -p "$scratch/site/rsaft_fast"
  for entry in "$PWD"/rsaft_fast/* "$PWD/kernels" "$PWD/recipes" "$PWD/benchmarks"; do
    ln -sfn "$entry" "$scratch/site/rsaft_fast/$(basename "$entry")"
  done
  rm -f "$scratch/site/rsaft_fast/librsaft.so"
  local sources=() name
  for name in $(cat csrc/sources.txt); do sources+=("csrc/$name"); done
  # Else the checkout's rsaft_fast/, which lacks the folders beside it, would be found in the working folder first.
  export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
  step build-by-nvcc 90 nvcc -O3 -std=c++17 -fmad=false --threads=0 -Xcompiler=-fPIC,-fvisibility=hidden --shared \
    -cudart=static -gencode="arch=compute_$RSAFT_ARCHITECTURES,code=sm_$RSAFT_ARCHITECTURES" "${sources[@]}" \
    -o "$scratch/librsaft.so" && export RSAFT_LIBRARY="$scratch/librsaft.so"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

tests=(tests/ops tests/kernels tests/optim tests/benchmarks)
if has diffusers pydantic; then tests=(tests); else say "no diffusers or pydantic here: GPU tests of ${tests[*]} only"; fi
pytest=("$python" -m pytest -m gpu -p no:cacheprovider)

step build 75 "$python" -m pip install -q --no-build-isolation --no-deps --disable-pip-version-check -e . || { status=0; without_pip; }
step doctor 20 "$python" -m rsaft_fast.cli doctor
if [ "$part" = memory ]; then
  has diffusers pydantic peft transformers || { say "whole updates need diffusers, pydantic, peft and transformers"; exit 1; }
  # Begun elsewhere, it goes on: rows of this card, these versions and these recipes are not measured twice.
  for known in benchmarks/results/*/memory.json; do
    into="$out/$(basename "$(dirname "$known")")"
    [ -f "$known" ] && [ ! -f "$into/memory.json" ] && mkdir -p "$into" && cp "$known" "$into/"
  done
  budget=$((445 - SECONDS)) # whatever the build has left
  step memory $((budget + 10)) "$python" -m rsaft_fast.benchmarks.gpu_memory --results "$out" --budget $budget
  step rewards 60 "$python" -m rsaft_fast.benchmarks.rewards_gpu --results "$out" --repeats 5
  step goals 15 "$python" -m rsaft_fast.benchmarks.report "$out" --goals
  "$python" -m rsaft_fast.benchmarks.report "$out" --goals > "$out/goals.txt" 2>&1
  say "all: ${SECONDS} s"
  exit $status
fi
# A part that cannot be collected here (a package is missing) fails the step, after the others ran.
step tests 115 "${pytest[@]}" --continue-on-collection-errors "${tests[@]}"
if command -v compute-sanitizer > /dev/null; then
  # Without torch's caching allocator a write beyond a tensor is a write beyond an allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  step memcheck 75 compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" -x tests/ops \
    -k "cuda-gpu and not images"
  step memcheck-images 20 compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" -x tests/ops \
    -k "cuda-gpu and images"
  # Hazards in shared memory: the reductions and the 8-bit blocks.
  step racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 9 "${pytest[@]}" -x tests/ops \
    -k "cuda-gpu and (norm or images or 8bit)"
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  say "memcheck, racecheck: no compute-sanitizer on PATH"
  status=1
fi
step benchmarks 170 "$python" -m rsaft_fast.cli bench --results "$out" --budget 140 --goals \
  --providers ours-cuda,ours-triton,usual-fused,adamw-alone,foreach,bitsandbytes,pytorch_optimizer,eager
step plots 15 "$python" -m rsaft_fast.benchmarks.report "$out" --goals --plots "$out"
"$python" -m rsaft_fast.benchmarks.report "$out" --goals > "$out/goals.txt" 2>&1
say "all: ${SECONDS} s"
exit $status
