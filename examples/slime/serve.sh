#!/usr/bin/env bash
# Starts the rollout engines that slime attaches to: one server for each GPU in GPUS, in the environment of sglang-er.
#   MODEL=/models/Qwen3-4B GPUS="0 1 2 3" examples/slime/serve.sh [more flags of sglang serve]
# README.md has the variables. It runs until it is stopped or one server ends.
set -euo pipefail

: "${MODEL:?the Hugging Face folder that slime gets as --hf-checkpoint}"
read -r -a gpus <<< "${GPUS:-0}"
host=${HOST:-0.0.0.0}
port=${PORT:-10090}

case ${LAUNCHER:-sglang-er} in
    sglang-er) launch=(sglang-er serve) ;;
    sglang) launch=("${PYTHON:-python3}" -m sglang.launch_server --speculative-algorithm EFFICIENT_ROLLOUT) ;;
    *)
        echo "LAUNCHER is $LAUNCHER: choose sglang-er or sglang" >&2
        exit 2
        ;;
esac

# No --enable-memory-saver: slime asks external engines for the value of its --offload-rollout, which is off.
flags=(
    --model-path "$MODEL"
    --trust-remote-code
    --enable-metrics
    --mem-fraction-static "${MEM_FRACTION:-0.8}"
)
if [[ -n ${CONTEXT_LENGTH:-} ]]; then
    flags+=(--context-length "$CONTEXT_LENGTH")
fi

if [[ -z ${DRY_RUN:-} ]]; then
    trap 'jobs -p | xargs -r kill 2> /dev/null || true; wait' EXIT
    trap 'exit 130' INT TERM
fi
for gpu in "${gpus[@]}"; do
    command=("${launch[@]}" "${flags[@]}" --host "$host" --port "$port" "$@")
    port=$((port + 1))
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
        continue
    fi
    CUDA_VISIBLE_DEVICES=$gpu "${command[@]}" &
done
if [[ -z ${DRY_RUN:-} ]]; then
    wait -n
fi
