#!/usr/bin/env bash
# All that needs a GPU, in three calls of at most 9 minutes each.
#
#   benchmarks/gpu_suite.sh OUT [tests]       build, doctor, GPU tests, memory and race checker
#   benchmarks/gpu_suite.sh OUT benchmarks    build, doctor, benchmarks beside the peers, goals, plots
#   benchmarks/gpu_suite.sh OUT memory        build, doctor, whole updates and rewards at real size (gpu_memory.py,
#                                             rewards_gpu.py)
#
# OUT gets summary.txt (how each step ended) and suite.log (what each said), both written on by later calls;
# <gpu>/<date>.json or <gpu>/memory.json and <gpu>/rewards.json (the figures, written row by row), goals.txt, and from
# the benchmarks bars.png. A second memory call goes on from the memory.json that it finds in OUT, else
# in benchmarks/results. Nothing is downloaded; what is missing is said and gone around. The exit code is 1 when a step
# failed. PYTHON names the interpreter (default: python3).
#
# DRY=1 prints each step, its limit in seconds, why that long, and its command; nothing is run and no GPU is needed.
set -u
out=${1:?usage: [DRY=1] benchmarks/gpu_suite.sh OUT [tests|benchmarks|memory]}
part=${2:-tests}
case $part in
  tests | benchmarks | memory) ;;
  *) echo "there is no part '$part'; the second argument is tests, benchmarks or memory" >&2; exit 2 ;;
esac
dry=${DRY:-}
whole=540 # seconds of a call: what no step may outlast
[ -n "$dry" ] || mkdir -p "$out" || exit 2
[ -n "$dry" ] || out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
RSAFT_COMMIT=${RSAFT_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
export RSAFT_COMMIT RSAFT_CUDA=1 RSAFT_ARCHITECTURES="${arch:-90}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0 promised=0

say() { if [ -n "$dry" ]; then echo "$*"; else echo "$*" | tee -a "$out/summary.txt"; fi; }

# step NAME SECONDS WHY COMMAND...: within its time and the call's, output kept; the next runs whatever this one did
step() {
  local name=$1 limit=$2 why=$3 start=$SECONDS left=$((whole - SECONDS)) rc
  shift 3
  if [ -n "$dry" ]; then
    promised=$((promised + limit))
    printf '%s: at most %s s: %s\n   ' "$name" "$limit" "$why"
    printf ' %q' "$@"
    echo
    return 0
  fi
  if [ "$left" -lt 10 ]; then say "$name: not begun, $left s were left"; status=1; return 1; fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name: $*" >> "$out/suite.log"
  timeout --kill-after=5 "$limit" "$@" > "$scratch/log" 2>&1
  rc=$?
  tail -c 1500000 "$scratch/log" >> "$out/suite.log"
  [ $rc -eq 0 ] || status=1
  [ $rc -eq 124 ] && say "$name: out of time after $limit s" || say "$name: exit $rc after $((SECONDS - start)) s"
  tail -n 3 "$scratch/log" | cut -c1-200 | sed 's/^/  /' | tee -a "$out/summary.txt"
  return $rc
}

end() {
  if [ -n "$dry" ]; then say "all: at most $promised s of $whole s"; [ "$promised" -le "$whole" ]; exit; fi
  say "all: ${SECONDS} s"
  exit $status
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
  step build-by-nvcc 60 "where pip cannot: half a minute of CPU for one architecture" \
    nvcc -O3 -std=c++17 -fmad=false --threads=0 -Xcompiler=-fPIC,-fvisibility=hidden --shared \
    -cudart=static -gencode="arch=compute_$RSAFT_ARCHITECTURES,code=sm_$RSAFT_ARCHITECTURES" "${sources[@]}" \
    -o "$scratch/librsaft.so" && export RSAFT_LIBRARY="$scratch/librsaft.so"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

# The sanitizers' option that names kernels has changed its own name.
sanitizer_filter() {
  local said option
  said=$(compute-sanitizer --help 2>&1)
  for option in --kernel-name --kernel-regex; do
    case $said in *"$option"*) echo "$option kernel_substring=rsaft"; return ;; esac
  done
}

say "== $part"
pip=("$python" -m pip install -q --no-build-isolation --no-deps --disable-pip-version-check -e .)
if [ -n "$dry" ]; then
  step build 60 "half a minute of CPU for one architecture" "${pip[@]}"
  without_pip
else
  step build 60 "" "${pip[@]}" || { status=0; without_pip; }
fi
step doctor 20 "torch's import and a context on the GPU" "$python" -m rsaft_fast doctor
report=("$python" -m rsaft_fast.benchmarks.report "$out" --goals)

case $part in
  memory)
    if ! has diffusers pydantic peft transformers; then
      say "whole updates need diffusers, pydantic, peft and transformers"
      [ -n "$dry" ] || exit 1
    fi
    # Begun elsewhere, it goes on: rows of this card, these versions and these recipes are not measured twice.
    for known in benchmarks/results/*/memory.json; do
      into="$out/$(basename "$(dirname "$known")")"
      [ -z "$dry" ] && [ -f "$known" ] && [ ! -f "$into/memory.json" ] && mkdir -p "$into" && cp "$known" "$into/"
    done
    budget=$((whole - promised - SECONDS - 95)) # what the build leaves, and the steps below do not take
    step memory $((budget + 10)) "its budget, and ten seconds to end in; the most important runs come first" \
      "$python" -m rsaft_fast.benchmarks.gpu_memory --results "$out" --budget $budget
    step rewards 60 "five repeats of each reward's gradient; weights are random, nothing is downloaded" \
      "$python" -m rsaft_fast.benchmarks.rewards_gpu --results "$out" --repeats 5
    step goals 15 "reads JSON" "${report[@]}"
    [ -n "$dry" ] || "${report[@]}" > "$out/goals.txt" 2>&1
    ;;
  tests)
    tests=(tests/ops tests/triton_kernels tests/optim tests/benchmarks)
    ignored=()
    if has diffusers pydantic; then
      tests=(tests)
    else
      say "no diffusers or pydantic here: GPU tests of ${tests[*]} only"
      # Without transformers it cannot be imported, and would hide other failures behind its own.
      has transformers || ignored=(--ignore=tests/benchmarks/test_rewards_gpu.py)
    fi
    pytest=("$python" -m pytest -m gpu -p no:cacheprovider)
    workers=()
    # Most of the time is Triton's compiler, on one core of many.
    if has xdist; then workers=(-n 4 --dist loadfile); else say "no pytest-xdist here: one process, it may be late"; fi
    step tests 200 "600 tests, half of them Triton's at 0.1 to 1.4 s of compiling: 60 to 110 s in one process" \
      "${pytest[@]}" --continue-on-collection-errors "${workers[@]}" "${ignored[@]}" "${tests[@]}"
    if [ -n "$dry" ] || command -v compute-sanitizer > /dev/null; then
      # Our kernels alone: torch's are many, and theirs to check.
      filter=(--kernel-name kernel_substring=rsaft)
      [ -n "$dry" ] || read -ra filter <<< "$(sanitizer_filter)"
      # Without torch's caching allocator a write beyond a tensor is a write beyond an allocation.
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      step memcheck 80 "torch's import under the tool 20 s, 200 small tests at 0.1 to 0.2 s" \
        compute-sanitizer --tool memcheck "${filter[@]}" --error-exitcode 9 "${pytest[@]}" -x tests/ops \
        -k "cuda-gpu and not images"
      step memcheck-images 45 "8 s of CPU without any tool, less what compiles for torch, and the import" \
        compute-sanitizer --tool memcheck "${filter[@]}" --error-exitcode 9 "${pytest[@]}" -x tests/ops \
        -k "cuda-gpu and images and not opcheck and not compiles"
      # Hazards in shared memory: the reductions and the 8-bit blocks.
      step racecheck 70 "a third of memcheck's tests, at up to twice their time" \
        compute-sanitizer --tool racecheck "${filter[@]}" --error-exitcode 9 "${pytest[@]}" -x tests/ops \
        -k "cuda-gpu and (norm or images or 8bit) and not opcheck and not compiles"
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
    else
      say "memcheck, racecheck: no compute-sanitizer on PATH"
      status=1
    fi
    ;;
  benchmarks)
    step benchmarks 360 "its budget of 330 s, after which nothing new begins, and the end of what has begun" \
      "$python" -m rsaft_fast bench --results "$out" --budget 330 --goals \
      --providers ours-cuda,ours-triton,usual-fused,adamw-alone,foreach,bitsandbytes,pytorch_optimizer,eager
    step plots 30 "matplotlib's import and a figure" "${report[@]}" --plots "$out"
    [ -n "$dry" ] || "${report[@]}" > "$out/goals.txt" 2>&1
    ;;
esac
end
