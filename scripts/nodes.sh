#!/usr/bin/env bash
# Train on several machines: run the same command on each within ten minutes, with --out on a
# shared disk.
#
#   NODES=2 HEAD=node0:29500 RUN=dpo1 scripts/nodes.sh train_dpo.py --model sft/final \
#       --data prefs.jsonl --out dpo
#
# NODES      number of machines
# HEAD       host:port of one machine that all can reach; the processes meet there
# RUN        name of the run, unique at HEAD
# IS_HEAD    1 on the machine of HEAD, 0 on the others; needed only when HEAD is an alias that
#            torch does not recognise
# PROCESSES, RESTARTS [3], GRACE, PYTHON  as in one_node.sh
#
# NCCL chooses its network itself. If it takes the wrong one, export NCCL_SOCKET_IFNAME (NCCL_IB_HCA
# on InfiniBand), and GLOO_SOCKET_IFNAME for CPU messages. NCCL_DEBUG=INFO shows the choice.
set -euo pipefail
script=${1:?usage: NODES=2 HEAD=host:29500 RUN=name scripts/nodes.sh train_dpo.py --model DIR ...}
shift
nodes=${NODES:?NODES is missing: the number of machines}
head=${HEAD:?HEAD is missing: host:port of one of the machines}
run=${RUN:?RUN is missing: a name for this run, the same on all machines}
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# one_node.sh explains these variables.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-120}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Machines start at different times: wait ten minutes for HEAD instead of one.
conf="read_timeout=600${IS_HEAD:+,is_host=$IS_HEAD}"
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$run" --rdzv-conf "$conf" \
    --max-restarts "${RESTARTS:-3}" "$script" --resume auto "$@"
