#!/usr/bin/env bash
# What train_external.sh and train_inside.sh share; they source it. Variables: README.md.

: "${SLIME_DIR:?the checkout of slime, with train.py}"
: "${MODEL:?the Hugging Face folder of the policy}"
: "${REF_LOAD:?the same model, converted for Megatron}"
: "${SAVE:?folder for checkpoints}"
: "${PROMPT_DATA:?JSON lines with a prompt and a label}"
: "${MODEL_ARGS_FILE:?a script of slime/scripts/models that sets MODEL_ARGS}"

hooks=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC1090
source "$MODEL_ARGS_FILE"

train=(
    python3 train.py
    "${MODEL_ARGS[@]}"
    --actor-num-nodes "${ACTOR_NODES:-1}"
    --actor-num-gpus-per-node "${ACTOR_GPUS:-8}"
    --hf-checkpoint "$MODEL"
    --ref-load "$REF_LOAD"
    --load "$SAVE"
    --save "$SAVE"
    --save-interval "${SAVE_INTERVAL:-20}"
    --prompt-data "$PROMPT_DATA"
    --input-key prompt
    --label-key label
    --apply-chat-template
    --rollout-shuffle
    --num-rollout "${NUM_ROLLOUT:-100}"
    --rollout-batch-size "${ROLLOUT_BATCH:-32}"
    --n-samples-per-prompt "${SAMPLES:-8}"
    --global-batch-size "${GLOBAL_BATCH:-256}"
    --rollout-max-response-len "${MAX_RESPONSE:-8192}"
    --rollout-temperature "${TEMPERATURE:-1.0}"
    --rollout-top-p 1.0
    --advantage-estimator grpo
    --lr "${LR:-1e-6}"
    --custom-rm-path rollout_hooks.reward
    --custom-rollout-log-function-path rollout_hooks.log_rollout
    # On the trainer's side this only switches slime's spec_accept_* metrics on; inside slime it is also the server's.
    --sglang-speculative-algorithm EFFICIENT_ROLLOUT
)

# runtime_env NAME...: JSON for Ray, with these variables as they are here
runtime_env() {
    python3 - "$@" << 'PYTHON'
import json, os, sys
print(json.dumps({"env_vars": {name: os.environ[name] for name in sys.argv[1:] if name in os.environ}}))
PYTHON
}

# submit VARIABLE...: the training job; with DRY_RUN only its command is printed
submit() {
    export PYTHONPATH="$hooks${MEGATRON_DIR:+:$MEGATRON_DIR}${PYTHONPATH:+:$PYTHONPATH}"
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    local command=(
        ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}"
        --runtime-env-json "$(runtime_env PYTHONPATH CUDA_DEVICE_MAX_CONNECTIONS "$@")"
        -- "${train[@]}"
    )
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    cd "$SLIME_DIR"
    exec "${command[@]}"
}
