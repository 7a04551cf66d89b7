#!/usr/bin/env bash
# slime's training job with engines that slime starts itself: sglang-er must be installed in slime's environment, on
# every node, and support the SGLang that is there (docs/slime.md says which combination that needs).
#   ROLLOUT_GPUS=8 ... examples/slime/train_inside.sh [flags of train.py]
set -euo pipefail

# shellcheck source=examples/slime/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

train+=(--rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static "${MEM_FRACTION:-0.7}")
if [[ -n ${COLOCATE:-} ]]; then
    train+=(--colocate)
else
    train+=(--rollout-num-gpus "${ROLLOUT_GPUS:?GPUs for rollouts, or COLOCATE=1 to share the trainer\'s}")
fi
train+=("$@")

# Options of sglang-er reach the engines as variables: slime passes on no flags that SGLang does not have.
mapfile -t options < <(compgen -e | grep '^SGLANG_ER_' || true)
submit "${options[@]}" ${SGLANG_PLUGINS+SGLANG_PLUGINS}
