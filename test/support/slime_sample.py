"""What slime's hooks get: the attributes of its Sample that hooks may read, filled from replies as its rollout fills
them: tokens and logprobs from `output_token_logprobs`, the status from the finish reason, counters summed."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"


FINISHED = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
# the keys that slime reads: SGLang's before 0.5.11
COUNTERS = ("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct")


def from_reply(prompt_ids: list[int], label: str, reply: dict[str, Any]) -> SimpleNamespace:
    """A sample that one request generated."""
    meta = reply["meta_info"]
    chosen = meta["output_token_logprobs"]
    counted = {name: meta.get(name, 0) for name in COUNTERS}
    return SimpleNamespace(
        label=label,
        tokens=[*prompt_ids, *(token for _, token, _ in chosen)],
        response=reply["text"],
        response_length=len(chosen),
        rollout_log_probs=[logprob for logprob, _, _ in chosen],
        status=FINISHED[meta["finish_reason"]["type"]],
        weight_versions=[meta["weight_version"]],
        spec_info=SimpleNamespace(**counted, completion_token_num=meta["completion_tokens"]),
    )
