#!/usr/bin/env bash
# Start vLLM on some GPUs (or on the CPU), train on the others, and end the server on every way out.
#
#   SERVER_GPUS=0,1 scripts/with_vllm.sh train_reinforce.py --model sft/final --data x.jsonl --out run ...
#   SERVER_PYTHON=engine/bin/python scripts/with_vllm.sh train_reinforce.py --model sft/final ...
#
# SERVER_GPUS    GPUs of the server, by number [the last one; none without GPUs]
# SERVER_PYTHON  interpreter that has vLLM; its environment may be another than plumb's [python]
# SERVER_PORT    port on this machine [8000]
# SERVER_ARGS    more flags of vLLM, for example "--max-model-len 4096 --enable-lora"
# SERVER_WAIT    seconds for it to answer [900]
# SERVER_LOG     file for its output [vllm.log]
# PYTHON, PROCESSES, RESTARTS, GRACE: as for scripts/one_node.sh, which trains
set -euo pipefail
: "${1:?usage: scripts/with_vllm.sh train_reinforce.py --model DIR --data FILE --out DIR ...}"
here=$(dirname "$0")
port=${SERVER_PORT:-8000}
log=${SERVER_LOG:-vllm.log}
url=http://127.0.0.1:$port
model=""
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    if [ "${!i}" = --model ]; then
        model=${!next}
    fi
done
: "${model:?with_vllm.sh: --model DIR is missing: the server starts on it}"

answers() { "${PYTHON:-python}" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$url/v1/models" 2>/dev/null; }
if answers; then
    echo "with_vllm.sh: something answers on port $port already: give another SERVER_PORT" >&2
    exit 1
fi

gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)
flags=()
if [ -n "$gpus" ]; then
    server_gpus=${SERVER_GPUS:-${gpus##*,}}
    rest=$(tr , '\n' <<<"$gpus" | grep -vxF "$(tr , '\n' <<<"$server_gpus")" | paste -sd, || true)
    : "${rest:?with_vllm.sh: no GPU is left to train on: give fewer SERVER_GPUS}"
    flags+=(--tensor-parallel-size "$(tr , '\n' <<<"$server_gpus" | wc -l)")
else
    server_gpus="" rest=""
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    flags+=(--dtype float32 --enforce-eager)
fi

# A process group of its own: vLLM's workers end with it.
server=""
finish() {
    trap - EXIT INT TERM
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
set -m
# VLLM_SERVER_DEV_MODE has the calls that load new weights: keep the port closed to others.
CUDA_VISIBLE_DEVICES=$server_gpus VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
    "${SERVER_PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" \
    --host 127.0.0.1 --port "$port" "${flags[@]}" ${SERVER_ARGS:-} >"$log" 2>&1 &
server=$!
set +m

echo "waiting for vLLM on $url; its output is in $log"
deadline=$((SECONDS + ${SERVER_WAIT:-900}))
until answers; do
    if ! kill -0 "$server" 2>/dev/null; then
        tail -n 5 "$log" >&2
        echo "with_vllm.sh: vLLM ended before it answered: the reason is in $log" >&2
        exit 1
    fi
    if ((SECONDS > deadline)); then
        echo "with_vllm.sh: vLLM did not answer within ${SERVER_WAIT:-900} s: see $log, or raise SERVER_WAIT" >&2
        exit 1
    fi
    sleep 1
done

if [ -n "$rest" ]; then
    export CUDA_VISIBLE_DEVICES=$rest
fi
# In the background, so that a signal reaches this shell at once and is passed on to the training.
"$here/one_node.sh" "$@" --rollout-url "$url" &
training=$!
trap 'kill -INT "$training" 2>/dev/null' INT
trap 'kill -TERM "$training" 2>/dev/null' TERM
status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do # a signal ended the wait, not the training
    status=0
    wait "$training" || status=$?
done
exit "$status"
