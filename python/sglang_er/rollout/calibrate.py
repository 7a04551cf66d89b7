"""Costs of a server's steps at rising batch sizes, measured by real requests: what `sglang-er calibrate` keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_er.policy.cost_features import Step
from sglang_er.policy.cost_model import CostModel
from sglang_er.rollout import bench, oracle
from sglang_er.rollout.client import Client
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.measure import jobs_of, run_jobs, send_all
from sglang_er.rollout.prompts import Request

GAMMAS = (0, 1, 3, 7, 12)
STEPS = 6
_ACCEPTANCE = 0.9
# Twice the requests take at most about twice the time.
_GROWTH = 2.0


@dataclass(frozen=True)
class Calibrated:
    """`measured_on`: device, model and so on, as the server names them; `most`: largest batch that was measured."""

    model: CostModel
    measured_on: dict[str, str]
    most: int

    def rows(self, context: int, gammas: Sequence[int] = GAMMAS) -> list[tuple[str, ...]]:
        """Milliseconds of a step by batch size and draft length, for requests of `context` tokens."""
        head = ("requests", *(f"gamma {gamma}" for gamma in gammas))
        sizes = [size for size in bench.PROBE_SIZES if size <= self.most]
        cells = [[self.model.step(Step(size, size * context), gamma) for gamma in gammas] for size in sizes]
        return [head, *((str(n), *(f"{1e3 * seconds:.1f}" for seconds in row)) for n, row in zip(sizes, cells))]


def calibrate(client: Client, requests: Sequence[Request], seconds: float, tell: Callable[[str], None]) -> Calibrated:
    """Batches of 1, 2, 4, ... of `requests` at several draft lengths, as many as fit into `seconds`.

    Raises RolloutError if the server learnt nothing. Its policy is afterwards as it was before.
    """
    before = client.state()
    gammas = gammas_of(before)
    try:
        most = _measure(client, requests, gammas, seconds, tell)
    finally:
        client.set_policy(bench.switchable(before))
    costs = client.state()["controller"]["costs"]
    try:
        model = CostModel.from_json(costs["model"])
    except ValueError as error:
        raise RolloutError(f"the server has no costs to keep: {error}") from None
    return Calibrated(model, dict(costs["measured_on"]), most)


def gammas_of(state: Mapping[str, Any]) -> list[int]:
    """Draft lengths that tell the costs of all that this server can draft."""
    limit = int(state["config"]["values"]["gamma_max"])
    return sorted({min(gamma, limit) for gamma in GAMMAS if gamma <= limit} | {limit})


def _measure(
    client: Client, requests: Sequence[Request], gammas: Sequence[int], left: float, tell: Callable[[str], None]
) -> int:
    most = 0
    send_all(jobs_of(client, requests, 1.0, tokens=2))
    for size in (size for size in bench.PROBE_SIZES if size <= len(requests)):
        spent = 0.0
        for gamma in gammas:
            tokens = gamma + round(STEPS * oracle.expected_tokens(gamma, [_ACCEPTANCE]))
            jobs = jobs_of(client, requests[:size], 1.0, tokens)
            block, _ = run_jobs(client, {"policy": "fixed", "gamma": gamma}, jobs, size)
            spent += block.seconds
        most, left = size, left - spent
        tell(f"{size} requests, {len(gammas)} draft lengths: {spent:.1f} s")
        if left < _GROWTH * spent:
            break
    return most
