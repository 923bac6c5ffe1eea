#!/usr/bin/env bash
# Trains on several machines: the same command on each, within ten minutes, --out on a disk that they share.
#
#   NODES=2 HEAD=node0:29500 RUN=dpo1 scripts/nodes.sh train_dpo.py --model sft/final --data prefs.jsonl --out dpo
#
# NODES      how many machines
# HEAD       host:port of one of them, reachable from all; the processes meet there
# RUN        a name that no other run at HEAD has
# IS_HEAD    1 on the machine that HEAD names and 0 on the others, where torch cannot tell from the name (aliases)
# PROCESSES, RESTARTS [3], GRACE, PYTHON  as in one_node.sh
#
# NCCL finds its network by itself. Where it takes the wrong one, export NCCL_SOCKET_IFNAME (NCCL_IB_HCA on InfiniBand)
# for it and GLOO_SOCKET_IFNAME for the CPU's messages; NCCL_DEBUG=INFO shows what it took.
set -euo pipefail
script=${1:?usage: NODES=2 HEAD=host:29500 RUN=name scripts/nodes.sh train_dpo.py --model DIR ...}
shift
nodes=${NODES:?NODES is missing: how many machines} head=${HEAD:?HEAD is missing: host:port of one of the machines}
run=${RUN:?RUN is missing: a name for this run, the same on all machines}
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# Why these three are set is said in one_node.sh.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-120}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Machines come up at different times: a client waits ten minutes for HEAD, not one.
conf="read_timeout=600${IS_HEAD:+,is_host=$IS_HEAD}"
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$run" --rdzv-conf "$conf" \
    --max-restarts "${RESTARTS:-3}" "$script" --resume auto "$@"
