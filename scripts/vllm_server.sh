#!/usr/bin/env bash
# Run vLLM with the calls that load new weights, on all GPUs it sees, or on the CPU without any.
#
#   scripts/vllm_server.sh --model sft/final --port 8000 [flags of vLLM]
#   scripts/vllm_server.sh --wait http://node1:8000 [URL ...]       until all of them answer
#
# SERVER_PYTHON  interpreter that has vLLM; its environment may be another than plumb's [python]
# SERVER_WAIT    seconds that --wait waits [900]
# PYTHON         interpreter of --wait [python]
#
# Whoever reaches the port can load weights: keep it on a private address.
set -euo pipefail
: "${1:?usage: scripts/vllm_server.sh --model DIR [flags of vLLM], or --wait URL ...}"

if [ "$1" = --wait ]; then
    shift
    deadline=$((SECONDS + ${SERVER_WAIT:-900}))
    for url in "$@"; do
        until "${PYTHON:-python}" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" \
            "$url/v1/models" 2>/dev/null; do
            if ((SECONDS >= deadline)); then
                echo "vllm_server.sh: $url did not answer within ${SERVER_WAIT:-900} s: see its output, or raise SERVER_WAIT" >&2
                exit 1
            fi
            sleep 1
        done
    done
    exit 0
fi

export VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
if gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null) && [ -n "$gpus" ]; then
    visible=${CUDA_VISIBLE_DEVICES:-$(paste -sd, <<<"$gpus")}
    flags=(--tensor-parallel-size "$(tr , '\n' <<<"$visible" | wc -l)")
else
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    flags=(--dtype float32 --enforce-eager)
fi
exec "${SERVER_PYTHON:-python}" -m vllm.entrypoints.openai.api_server "${flags[@]}" "$@"
