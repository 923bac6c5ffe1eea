#!/usr/bin/env bash
# Trains on all GPUs of this machine, or in PROCESSES processes:
#
#   scripts/one_node.sh train_dpo.py --model sft/final --data prefs.jsonl --out dpo --tp 2
#   PROCESSES=2 scripts/one_node.sh train_dpo.py --device cpu ...          # gloo, to try a layout without GPUs
#
# PROCESSES  how many; default one a GPU, one without GPUs
# RESTARTS   how often a run whose process died starts again from its newest checkpoint [1]
# GRACE      seconds that a stopped run gets to save before it is killed [120]
# PYTHON     the interpreter [python]
#
# Ctrl-C or SIGTERM saves and leaves; the same command goes on from there.
set -euo pipefail
script=${1:?usage: scripts/one_node.sh train_dpo.py --model DIR --data FILE --out DIR ...}
shift
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# torchrun's default of one thread a process idles the other cores; tokenising and gloo use them.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# torchrun kills 30 s after it has passed a signal on: too short to write a large checkpoint. A torch too old for
# --shutdown-timeout does not read this either and keeps its 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-120}
# Restarted processes must not find the keys of those before them in a shared store (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --resume auto starts afresh where there is no checkpoint; a --resume among the arguments comes later and wins.
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts "${RESTARTS:-1}" \
    "$script" --resume auto "$@"
