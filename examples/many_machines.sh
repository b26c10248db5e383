#!/bin/bash
# One run on several machines, without a scheduler: the same line on each, within distributed.timeout.
# output_dir, the prompts and the models lie on a file system that all of them see.
#
#   MACHINES=2 FIRST=node01 bash examples/many_machines.sh my.yaml
set -euo pipefail

torchrun \
  --nnodes "$MACHINES" --nproc-per-node gpu \
  --rdzv-backend c10d --rdzv-id "${RUN:-rsaft}" --rdzv-endpoint "$FIRST:29500" \
  -m rsaft_fast train "$@"
