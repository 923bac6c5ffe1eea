#!/usr/bin/env bash
# Start vLLM on some GPUs (or on the CPU), train on the others, and end the server on every way out.
#
#   SERVER_GPUS=0,1 scripts/with_vllm.sh train_reinforce.py --model sft/final --data x.jsonl --out run ...
#   SERVER_PYTHON=engine/bin/python scripts/with_vllm.sh train_reinforce.py --model sft/final ...
#
# SERVER_GPUS    GPUs of the server, by number [the last one; none without GPUs]
# SERVER_PORT    port on this machine [8000]
# SERVER_ARGS    more flags of vLLM, for example "--max-model-len 4096 --enable-lora"
# SERVER_LOG     file for its output [vllm.log]
# SERVER_PYTHON, SERVER_WAIT: as for scripts/vllm_server.sh
# PYTHON, PROCESSES, RESTARTS, GRACE: as for scripts/one_node.sh, which trains
set -euo pipefail
: "${1:?usage: scripts/with_vllm.sh train_reinforce.py --model DIR --data FILE --out DIR ...}"
here=$(dirname "$0")
url=http://127.0.0.1:${SERVER_PORT:-8000}
log=${SERVER_LOG:-vllm.log}
model=""
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    if [ "${!i}" = --model ]; then
        model=${!next}
    fi
done
: "${model:?with_vllm.sh: --model DIR is missing: the server starts on it}"
if SERVER_WAIT=0 "$here/vllm_server.sh" --wait "$url" 2>/dev/null; then
    echo "with_vllm.sh: something answers at $url already: give another SERVER_PORT" >&2
    exit 1
fi

gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)
server_gpus="" rest=""
if [ -n "$gpus" ]; then
    server_gpus=${SERVER_GPUS:-${gpus##*,}}
    rest=$(tr , '\n' <<<"$gpus" | grep -vxF "$(tr , '\n' <<<"$server_gpus")" | paste -sd, || true)
    : "${rest:?with_vllm.sh: no GPU is left to train on: give fewer SERVER_GPUS}"
fi

server="" waiting="" training=""
# A signal ends the wait for the server, or is passed on to the training, which saves.
pass_on() {
    if [ -z "$training" ]; then
        exit "$2"
    fi
    kill "-$1" "$training" 2>/dev/null || true
    signalled=yes
}
finish() {
    trap - EXIT
    if [ -n "$waiting" ]; then
        kill "$waiting" 2>/dev/null || true
    fi
    if [ -n "$server" ]; then
        kill -TERM -- "-$server" 2>/dev/null || true
        for _ in $(seq 20); do
            kill -0 -- "-$server" 2>/dev/null || break
            sleep 0.5
        done
        kill -KILL -- "-$server" 2>/dev/null || true
    fi
}
trap finish EXIT
trap 'pass_on INT 130' INT
trap 'pass_on TERM 143' TERM
set -m # a process group of its own: vLLM's workers end with it
# Fine without quotes: SERVER_ARGS are words.
# shellcheck disable=SC2086
CUDA_VISIBLE_DEVICES=$server_gpus "$here/vllm_server.sh" --model "$model" --host 127.0.0.1 \
    --port "${SERVER_PORT:-8000}" ${SERVER_ARGS:-} >"$log" 2>&1 &
server=$!
set +m

echo "waiting for vLLM at $url; its output is in $log"
"$here/vllm_server.sh" --wait "$url" &
waiting=$!
while kill -0 "$waiting" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null; then
        tail -n 5 "$log" >&2
        echo "with_vllm.sh: vLLM ended before it answered: the reason is in $log" >&2
        exit 1
    fi
    sleep 0.5
done
wait "$waiting"

if [ -n "$rest" ]; then
    export CUDA_VISIBLE_DEVICES=$rest
fi
# In the background, so that a signal reaches this shell at once.
"$here/one_node.sh" "$@" --rollout-url "$url" &
training=$!
while true; do
    signalled="" status=0
    wait "$training" || status=$?
    if [ -z "$signalled" ]; then # else the signal ended the wait, and not the training
        exit "$status"
    fi
done
