#!/bin/bash
# One run on all GPUs of this machine; each line is another launcher of the same run.
#
#   bash examples/many_gpus.sh my.yaml max_steps=200
set -euo pipefail

torchrun --standalone --nproc-per-node gpu -m rsaft_fast train "$@"

# accelerate launch --multi_gpu --num_processes 8 -m rsaft_fast train "$@"
