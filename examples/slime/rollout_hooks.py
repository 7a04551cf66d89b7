"""A reward and a log line for slime. Nothing here knows of speculation, except that the log line reads its counters.

    --custom-rm-path rollout_hooks.reward
    --custom-rollout-log-function-path rollout_hooks.log_rollout

with this folder on the PYTHONPATH of the Ray job. Samples are slime's own (`slime.utils.types.Sample`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


async def reward(args: Any, sample: Any, **_: Any) -> float:
    """1 if the response ended by itself and the last number in it is the label."""
    del args
    numbers = NUMBER.findall(sample.response.replace(",", ""))
    return float(sample.status.value == "completed" and bool(numbers) and numbers[-1] == str(sample.label))


def speculation(samples: Sequence[Any]) -> str:
    """Accept length over all tokens. slime's own `spec_accept_length` is the mean of the samples' accept lengths."""
    tokens = sum(sample.spec_info.completion_token_num for sample in samples)
    steps = sum(sample.spec_info.spec_verify_ct for sample in samples)
    return f"accept length {tokens / steps:.2f} in {steps} steps" if steps else "no speculation was counted"


def log_rollout(rollout_id: int, args: Any, samples: Sequence[Any], extra_metrics: Any, rollout_time: float) -> bool:
    """One line a rollout. False: slime's own logging follows."""
    del args, extra_metrics
    tokens = sum(sample.response_length for sample in samples)
    versions = sorted({version for sample in samples for version in sample.weight_versions})
    logger.info(
        "rollout %d: %d tokens in %.1f s, weights %s, %s",
        rollout_id,
        tokens,
        rollout_time,
        ",".join(versions),
        speculation(samples),
    )
    return False
