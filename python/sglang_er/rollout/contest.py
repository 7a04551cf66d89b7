"""Several policies against plain decode on the same requests of one server: every round runs all of them once, in an
order that turns, so that what disturbs the machine disturbs all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sglang_er.rollout.bench import switchable
from sglang_er.rollout.client import Client
from sglang_er.rollout.intervals import Interval, median_interval
from sglang_er.rollout.measure import PLAIN, Block, jobs_of, run_jobs, send_all
from sglang_er.rollout.prompts import Request

OnProgress = Callable[[str, str, bool], None]
PLAIN_ARM = "plain"


@dataclass(frozen=True)
class Contest:
    """`arms`: name -> policy as POST /er/policy takes it; `rounds[r]`: its requests; `at_once`: in flight."""

    arms: Mapping[str, Mapping[str, Any]]
    rounds: Sequence[Sequence[Request]]
    at_once: int
    temperature: float = 1.0


def parse_arms(names: str) -> dict[str, dict[str, Any]]:
    """`goodput,threshold,fixed:3,goodput+early_stop=false` -> policies; plain decode is always among them.

    Raises ValueError for a name that says nothing.
    """
    arms: dict[str, dict[str, Any]] = {PLAIN_ARM: dict(PLAIN)}
    for name in filter(None, (part.strip() for part in names.split(","))):
        policy, *options = name.split("+")
        kind, _, gamma = policy.partition(":")
        arm: dict[str, Any] = {"policy": kind}
        if gamma:
            if kind != "fixed" or not gamma.isdecimal():
                raise ValueError(f"--arms {name}: only fixed takes a draft length, as in fixed:3")
            arm["gamma"] = int(gamma)
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"--arms {name}: options are +name=value")
            arm[key] = value
        arms[name] = arm
    if len(arms) == 1:
        raise ValueError("--arms: name at least one policy")
    return arms


def order_of(round_number: int, arms: Sequence[str]) -> list[str]:
    """Who runs when: everybody comes first, second, ... equally often; every other time around backwards."""
    turned = round_number % len(arms)
    order = [*arms[turned:], *arms[:turned]]
    return order[::-1] if (round_number // len(arms)) % 2 else order


def run(
    client: Client, contest: Contest, on_progress: OnProgress, cpu_clock: Callable[[], float]
) -> dict[str, list[Block]]:
    """Blocks of every arm, one per round. The server's policy is as before when this returns or raises."""
    before = client.state()
    usual = switchable(before)
    blocks: dict[str, list[Block]] = {name: [] for name in contest.arms}
    try:
        for number, requests in enumerate(contest.rounds):
            _warm(client, contest, requests, usual)
            for name in order_of(number, list(contest.arms)):
                label = f"round {number + 1} of {len(contest.rounds)}, {name}"
                tell = partial(on_progress, label)
                jobs = jobs_of(client, requests, contest.temperature)
                block, _ = run_jobs(
                    client,
                    {**usual, **contest.arms[name]},
                    jobs,
                    contest.at_once,
                    lambda text, tell=tell: tell(text, False),  # type: ignore[misc]
                    cpu_clock,
                )
                blocks[name].append(block)
                tell(f"{block.tokens_per_second:.1f} tokens/s", True)
    finally:
        client.set_policy(usual)
    return blocks


def _warm(client: Client, contest: Contest, requests: Sequence[Request], usual: Mapping[str, Any]) -> None:
    """Prompts into the prefix cache, and whatever is made at the first draft."""
    client.set_policy({**usual, "policy": "fixed", "gamma": 1})
    send_all(jobs_of(client, requests, contest.temperature, tokens=4), at_once=contest.at_once)


def speed_up(blocks: Mapping[str, Sequence[Block]], name: str, other: str = PLAIN_ARM) -> Interval:
    """Median over rounds of the quotient of tokens/s, with its 95 % interval."""
    pairs = zip(blocks[name], blocks[other], strict=True)
    return median_interval([mine.tokens_per_second / theirs.tokens_per_second for mine, theirs in pairs])


def to_json(contest: Contest, blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """docs/benchmarking.md explains the fields."""
    return {
        "at_once": contest.at_once,
        "rounds": [[request.output_tokens for request in requests] for requests in contest.rounds],
        "arms": {
            name: {
                "policy": dict(contest.arms[name]),
                "speed_up": asdict(speed_up(blocks, name)),
                "tokens_per_second": [round(block.tokens_per_second, 3) for block in blocks[name]],
                "seconds": [round(block.seconds, 3) for block in blocks[name]],
                "cpu_seconds": [round(block.cpu_seconds, 3) for block in blocks[name]],
                "accept_length": [block.steps.accept_length for block in blocks[name]],
                "steps_by_gamma": [dict(block.steps.steps_by_gamma) for block in blocks[name]],
            }
            for name in contest.arms
        },
    }
