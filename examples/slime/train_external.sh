#!/usr/bin/env bash
# slime's training job, in slime's own environment, on engines that serve.sh started elsewhere.
#   ENGINES="host1:10090 host1:10091" UPDATE_DIR=/shared/updates ... examples/slime/train_external.sh [flags of train.py]
set -euo pipefail

: "${ENGINES:?host:port of every engine, separated by spaces}"
read -r -a engines <<< "$ENGINES"
# shellcheck source=examples/slime/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

train+=(--rollout-external-engine-addrs "${engines[@]}" --update-weight-mode full)
case ${SYNC:-disk} in
    disk)
        : "${UPDATE_DIR:?a folder that trainer and engines see under the same path}"
        train+=(--update-weight-transport disk --update-weight-disk-dir "$UPDATE_DIR")
        ;;
    nccl) train+=(--update-weight-transport nccl) ;;
    *)
        echo "SYNC is $SYNC: choose disk or nccl" >&2
        exit 2
        ;;
esac
train+=("$@")

if [[ -z ${DRY_RUN:-} ]]; then
    for engine in "${engines[@]}"; do
        until curl -sf -o /dev/null --max-time 60 "http://$engine/health_generate"; do
            echo "waiting for $engine" >&2
            sleep 5
        done
    done
fi
submit
