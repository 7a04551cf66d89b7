"""`sglang-er bench rollout` against one server: closed-loop blocks of plain decode and of a policy in turn, and probes
of what a step costs at every batch size and draft length, which the policy need not visit by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from sglang_er.config import SWITCHABLE
from sglang_er.rollout import oracle
from sglang_er.rollout.client import Client, Response
from sglang_er.rollout.measure import PLAIN, Block, Comparison, alternate, jobs_of, run_jobs, send_all
from sglang_er.rollout.prompts import Request
from sglang_er.rollout.steps import Steps
from sglang_er.rollout.timeline import Gauge, Row, Sampler

PROBE_SIZES = (1, 2, 4, 8, 16, 32, 64)
PROBE_GAMMAS = (0, 1, 2, 3, 5, 7, 9, 12, 16)
# Steps of a probe, twice (before and after the blocks), and the acceptance that their number is reckoned with.
PROBE_STEPS = 8
PROBE_ACCEPTANCE = 0.9

OnProgress = Callable[[str, str, bool], None]


@dataclass(frozen=True)
class Settings:
    """`batches`: one list of requests per seed; pair i measures batch i, over and over. `at_once`: requests in flight.

    `cold`: the prefix cache is emptied before every block, so that prefill is part of it. `probe`: measure costs for
    the oracle. `sample_seconds`: between two looks for the timeline, 0 for none.
    """

    batches: Sequence[Sequence[Request]]
    at_once: int
    blocks: int
    temperature: float
    policy: Mapping[str, Any]
    cold: bool = False
    probe: bool = False
    sample_seconds: float = 0.0

    @property
    def pairs(self) -> int:
        return self.blocks // 2

    def batch_of(self, pair: int) -> Sequence[Request]:
        return self.batches[pair % len(self.batches)]


@dataclass
class Result:
    """`policy`: as the server describes it. `timelines[pair]`: arm -> rows. `probed`: all steps of the probes."""

    settings: Settings
    policy: Mapping[str, Any]
    comparison: Comparison
    timelines: list[dict[str, list[Row]]] = field(default_factory=list)
    probed: Steps = field(default_factory=Steps.none)

    def drafting_steps(self) -> Steps:
        """All that tells the acceptance: speculative blocks and probes."""
        return sum((block.steps for block in self.comparison.speculative), self.probed)

    def all_steps(self) -> Steps:
        return sum((block.steps for block in self.comparison.plain), self.drafting_steps())

    def saving(self) -> oracle.Saving | None:
        """Measured makespans against the oracle's; None without probes."""
        if not self.settings.probe:
            return None
        batches = [
            [request.output_tokens for request in self.settings.batch_of(pair)]
            for pair in range(len(self.comparison.plain))
        ]
        return oracle.saving(
            batches,
            self.settings.at_once,
            self.all_steps().costs,
            self.drafting_steps().alpha_by_offset,
            sum(block.seconds for block in self.comparison.plain),
            sum(block.seconds for block in self.comparison.speculative),
        )


def probe_sizes(most: int) -> list[int]:
    """Batch sizes between which costs are interpolated; the ends are measured."""
    return [*(size for size in PROBE_SIZES if size < most), most]


def switchable(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the server's policy is set to, as POST /er/policy takes it."""
    values = state["config"]["values"]
    return {name: values[name] for name in sorted(SWITCHABLE) if values.get(name) is not None}


def policy_of(state: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The policy to measure: the server's own with `changes`. Raises ValueError if that is plain decode."""
    policy = {**switchable(state), **changes}
    if policy.get("policy") == PLAIN["policy"] and policy.get("gamma") == PLAIN["gamma"]:
        raise ValueError("the policy to measure is plain decode itself: choose --policy or --gamma")
    return policy


def measure_rollouts(
    client: Client, settings: Settings, on_progress: OnProgress, cpu_clock: Callable[[], float]
) -> Result:
    """Warm up, probe, alternate, probe again. The server's policy is as before when this returns or raises."""
    before = client.state()
    result = Result(settings, {}, Comparison([], []))
    try:
        client.set_policy(settings.policy)
        result.policy = client.state()["policy"]
        run = _Run(client, settings, result, cpu_clock)
        gammas = [gamma for gamma in PROBE_GAMMAS if gamma <= before["config"]["values"]["gamma_max"]]
        # The first drafting block makes the twin and whatever is allocated at first use.
        run.warm(settings.batch_of(0), settings.policy)
        if settings.probe:
            run.probe(gammas, on_progress)
        result.comparison = alternate(run.block, settings.policy, settings.pairs, float("inf"), on_progress)
        if settings.probe:
            run.probe(gammas[::-1], on_progress)
    finally:
        client.set_policy(switchable(before))
    return result


class _Run:
    def __init__(self, client: Client, settings: Settings, result: Result, cpu_clock: Callable[[], float]) -> None:
        self._client, self._settings, self._result, self._cpu_clock = client, settings, result, cpu_clock

    def _jobs(self, batch: Sequence[Request], tokens: int | None = None) -> list[Callable[[], Response]]:
        return jobs_of(self._client, batch, self._settings.temperature, tokens)

    def warm(self, batch: Sequence[Request], policy: Mapping[str, Any]) -> None:
        """Prompts into the prefix cache: then both blocks of a pair find them there."""
        self._client.set_policy(policy)
        send_all(self._jobs(batch, tokens=2), at_once=self._settings.at_once)

    def block(self, pair: int, changes: Mapping[str, Any], tell: Callable[[str], None]) -> Block:
        batch = self._settings.batch_of(pair)
        timelines = self._result.timelines
        if len(timelines) <= pair:
            timelines.append({})
            if not self._settings.cold:
                self.warm(batch, changes)
        self._client.set_policy(changes)
        if self._settings.cold:
            self._client.flush_cache()
        gauge = Gauge()
        jobs = [gauge.around(job) for job in self._jobs(batch)]
        interval = self._settings.sample_seconds
        sampler = Sampler(self._client.state, gauge, interval) if interval else None
        with sampler or nullcontext():
            block, _ = run_jobs(self._client, changes, jobs, self._settings.at_once, tell, self._cpu_clock)
        if sampler is not None:
            timelines[pair]["plain" if changes is PLAIN else "speculative"] = sampler.rows()
        return block

    def probe(self, gammas: Sequence[int], on_progress: OnProgress) -> None:
        """A few steps at every batch size and draft length."""
        batch = self._settings.batch_of(0)
        most = min(self._settings.at_once, len(batch))
        self.warm(batch, self._settings.policy)
        for size in probe_sizes(most):
            for gamma in gammas:
                tokens = gamma + round(PROBE_STEPS * oracle.expected_tokens(gamma, [PROBE_ACCEPTANCE]))
                jobs = self._jobs(batch[:size], tokens)
                on_progress("probe", f"{size} requests, gamma {gamma}", False)
                block, _ = run_jobs(self._client, {"policy": "fixed", "gamma": gamma}, jobs, size)
                self._result.probed = self._result.probed + block.steps
        on_progress("probe", f"costs at up to {most} requests", True)
