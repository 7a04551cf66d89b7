"""Hypothesis: a weight update after which drafts are useless costs a few hundred rows of drafting, not the rollout: the
server says so once, decodes plainly, and drafts again after the next update.

Method: the `spec` server drafts on seed 0 until the alarm has something to compare with, is updated to seed 1 with a
twin that does not fit, then back to seed 0. Symptom of a defect: drafts that go on after the alarm, an alarm that is
not shown, or speculation that stays off.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.equality import accept_length, greedy
from support.prompts import mixed_prompts
from support.server import Server
from support.updates import Reply, other_weights, post_weights

from sglang_er.policy.health import LEAST_ROWS, OFF_UNTIL

pytestmark = pytest.mark.server

GAMMA, AT_ONCE, TOKENS = 5, 16, 128
SAYING = "sglang-er: speculation is off"


def rollout(server: Server) -> list[Reply]:
    """Some 1,000 rows with drafts, 2,000 without."""
    prompts = mixed_prompts(AT_ONCE, seed=71, longest=40)
    replies = server.generate_all(prompts, greedy(TOKENS), concurrency=AT_ONCE)
    assert [len(reply["output_ids"]) for reply in replies] == [TOKENS] * AT_ONCE
    return replies


def metrics(server: Server) -> tuple[float, float]:
    """(speculation_off, health_alarms_total) of /metrics."""
    lines = server.request("GET", "/metrics").text.splitlines()
    shown = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("sglang_er:")}
    return shown["sglang_er:speculation_off"], shown["sglang_er:health_alarms_total"]


# A twin of the policy before, as in the control of C15; or one that was remade from the new policy, but wrongly.
@pytest.mark.parametrize("broken", [{"requantize": False}, {"garble_next_twin": True}], ids=["stale", "garbled"])
def test_useless_drafts_after_an_update_end_speculation(updated_spec: Any, broken: dict[str, bool]) -> None:
    spec: Server = updated_spec.server
    with other_weights(updated_spec):
        spec.set_policy(policy="fixed", gamma=GAMMA, weight_check_seconds=0)
        before = rollout(spec)
        spec.set_policy(**broken)
        (_, alarms), said = metrics(spec), spec.log_text().count(SAYING)

        post_weights(spec, updated_spec.checkpoints[1])
        steps = spec.state()["steps"]
        rollout(spec)
        state = spec.state()
        assert state["health"]["cause"] == "sync", state["health"]
        assert metrics(spec) == (1, alarms + 1)
        lines = [line for line in spec.log_text().splitlines() if SAYING in line][said:]
        assert len(lines) == 1 and OFF_UNTIL in lines[0] and "before the last weight update" in lines[0], lines
        # Rows of a step are counted when it has ended; under overlap the next one has begun by then.
        tried = state["steps"]["speculating_request_steps"] - steps["speculating_request_steps"]
        assert LEAST_ROWS <= tried <= LEAST_ROWS + 3 * AT_ONCE

        drafted = state["steps"]["drafted_tokens"]
        rollout(spec)
        state = spec.state()
        assert state["steps"]["drafted_tokens"] == drafted and state["health"]["alarms"] == alarms + 1
        assert state["health"]["speculation_off_for_steps"] > 0

        # Nobody touches the policy here: the update alone brings speculation back.
        post_weights(spec, updated_spec.checkpoints[0])
        after = rollout(spec)
        assert accept_length(after) == pytest.approx(accept_length(before), rel=0.1)
        assert spec.state()["health"]["cause"] is None
        assert metrics(spec) == (0, alarms + 1)
        assert spec.log_text().count(SAYING) == said + 1
