#!/usr/bin/env bash
# Train on all GPUs of this machine, or in PROCESSES processes.
#
#   scripts/one_node.sh train_dpo.py --model sft/final --data prefs.jsonl --out dpo --tp 2
#   PROCESSES=2 scripts/one_node.sh train_dpo.py --device cpu ...    # try a layout without GPUs
#
# PROCESSES  number of processes [one per GPU, or one without GPUs]
# RESTARTS   restarts from the newest checkpoint after a process has died [1]
# GRACE      seconds for a stopped run to save before it is killed [120]
# PYTHON     interpreter [python]
#
# Ctrl-C or SIGTERM saves and exits; the same command continues from there.
set -euo pipefail
script=${1:?usage: scripts/one_node.sh train_dpo.py --model DIR --data FILE --out DIR ...}
shift
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# torchrun sets one thread per process by default; tokenising and gloo can use the other cores.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# torchrun kills its processes 30 s after it has passed a signal on, which is too short to write a
# large checkpoint. A torch without --shutdown-timeout ignores this variable and keeps the 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-120}
# Restarted processes must not read keys of their predecessors in a shared store (pytorch #135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --resume auto starts from scratch without a checkpoint. A --resume in the arguments overrides it.
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    --max-restarts "${RESTARTS:-1}" "$script" --resume auto "$@"
