"""The claim: from one and the same policy, plain decode and speculation sample rollouts of one distribution.

For each checkpoint of a run both sides answer the same prompts equally often, in alternating blocks of one server.
Reward, length, sum of logprobs and the position of the first difference from the greedy response are compared within
prompts (grpo.permutation), all p-values of all checkpoints together by Holm's procedure at LEVEL.

A test that cannot fail proves nothing: verifiers that are deliberately wrong (support/mutants.py of the test suite, put
in through SGLANG_ER_TEST_HOOK) must be rejected by it. They verify the drafts of a stale twin, that of the run's first
checkpoint, where rejections are frequent enough to matter; the right verifier with that same twin must pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from grpo.permutation import holm, permutation_p
from grpo.rollout import NativeSampler, Policy, Rollout, roll_out
from grpo.settings import DRAFT, FROZEN, PLAIN, REMADE
from sglang_er.models import task
from sglang_er.rollout.client import Client
from sglang_er.rollout.steps import Steps

LEVEL = 0.01
PROMPTS, SAMPLES, BLOCKS = 64, 64, 4
OPERANDS = (2, 6)
MAX_NEW_TOKENS = 640
#: Draft length cycles, plain steps included, so that every length is tested; broken verifiers always draft.
CYCLE: Mapping[str, Any] = {"policy": "cycle", "gamma_schedule": [3, 1, 7, 0, 5, 2]}
BROKEN = ("accept_all", "wrong_q", "stop_by_token", "residual_is_p", "bonus_from_q")
STATISTICS = ("reward", "length", "sum of logprobs", "first difference")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """Statistic -> values [prompts, samples]; what the engine did for them."""

    values: dict[str, np.ndarray]
    accept_length: float | None
    alpha: float | None
    tokens: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        means = {name: float(values.mean()) for name, values in self.values.items()}
        return {
            "rollouts": int(self.values["reward"].size),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "alpha": self.alpha,
            "accept_length": self.accept_length,
            "mean": means,
        }


class FixedPolicyTest:
    """Runs on a server that was started with the tests' hook and that nobody else uses."""

    def __init__(self, client: Client, say: Say, prompts: int = PROMPTS, samples: int = SAMPLES) -> None:
        self._client, self._say, self._policy = client, say, Policy(client)
        self._samples = samples
        rng = random.Random("grpo/fixed policy")
        self._prompts = [task.make_prompt(rng, rng.randint(*OPERANDS), "fixed policy") for _ in range(prompts)]
        self._greedy: list[tuple[int, ...]] = []

    def run(self, checkpoints: Sequence[Path], broken: Sequence[str] = BROKEN) -> dict[str, Any]:
        """The whole test, as JSON takes it; `checkpoints` from first to last."""
        compared: dict[str, dict[str, float]] = {}
        sides: dict[str, Any] = {}
        plain = None
        for path in checkpoints:
            self._load(path)
            plain, drafted = self._both(path.stem)
            sides[path.stem] = {"plain": plain.summary(), "speculation": drafted.summary()}
            compared[path.stem] = _p_values(plain, drafted)
        assert plain is not None
        controls: dict[str, dict[str, float]] = {}
        self._load(checkpoints[0])
        self._collect({**DRAFT}, 1, self._prompts[:1])  # the twin is made at a draft
        self._load(checkpoints[-1], frozen=True)
        for name in (None, *broken):
            label = name or "right verifier"
            side = self._merged([self._collect({**DRAFT, "mutant": name}, self._samples, self._prompts)])
            self._say(f"stale twin, {label}: {side.summary()}")
            sides[f"stale twin, {label}"] = side.summary()
            controls[label] = _p_values(plain, side)
        self._client.set_policy({**PLAIN, **REMADE, "mutant": None})
        right = controls.pop("right verifier")
        return judged({**compared, "stale twin": right}, controls) | {"sides": sides}

    def _load(self, path: Path, frozen: bool = False) -> None:
        self._client.set_policy({**PLAIN, **(FROZEN if frozen else REMADE), "mutant": None})
        self._policy.push(load_file(path).items(), path.stem)
        if not frozen or not self._greedy:
            greedy = roll_out(NativeSampler(self._client, temperature=0.0), self._prompts, 1, MAX_NEW_TOKENS)
            self._greedy = [one.ids for one in greedy]

    def _both(self, name: str) -> tuple[Side, Side]:
        plain: list[_Block] = []
        drafted: list[_Block] = []
        for block in range(BLOCKS):
            arms: list[tuple[Mapping[str, Any], list[_Block]]] = [(PLAIN, plain), (CYCLE, drafted)]
            for policy, found in arms if block % 2 == 0 else arms[::-1]:
                found.append(self._collect(policy, self._samples // BLOCKS, self._prompts))
            self._say(f"{name}: block {block + 1} of {BLOCKS} on either side")
        return self._merged(plain), self._merged(drafted)

    def _collect(self, policy: Mapping[str, Any], samples: int, prompts: Sequence[task.Prompt]) -> _Block:
        self._client.set_policy(policy)
        before, started = Steps.total(self._client.state()), time.perf_counter()
        # A group at a time would leave the batch to its stragglers; a few at once keep it full.
        rollouts = list(
            chain.from_iterable(
                roll_out(NativeSampler(self._client), prompts[i : i + 16], samples, MAX_NEW_TOKENS)
                for i in range(0, len(prompts), 16)
            )
        )
        seconds = time.perf_counter() - started
        self._client.set_policy(policy)
        return _Block(rollouts, Steps.total(self._client.state()).since(before), seconds)

    def _merged(self, blocks: Sequence[_Block]) -> Side:
        steps = sum((block.steps for block in blocks), Steps.none())
        tables = [self._table(block.rollouts) for block in blocks]
        values = {name: np.concatenate([table[name] for table in tables], axis=1) for name in STATISTICS}
        tokens = sum(len(one.ids) for block in blocks for one in block.rollouts)
        return Side(values, steps.accept_length, steps.alpha, tokens, sum(block.seconds for block in blocks))

    def _table(self, rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
        rows = len(self._prompts)
        samples = len(rollouts) // rows
        greedy = list(chain.from_iterable([ids] * samples for ids in self._greedy))
        columns = {
            "reward": [one.reward for one in rollouts],
            "length": [float(len(one.ids)) for one in rollouts],
            "sum of logprobs": [sum(one.logprobs) for one in rollouts],
            "first difference": [float(first_difference(one.ids, ids)) for one, ids in zip(rollouts, greedy)],
        }
        return {name: np.array(column).reshape(rows, samples) for name, column in columns.items()}


@dataclass(frozen=True)
class _Block:
    rollouts: list[Rollout]
    steps: Steps
    seconds: float


def first_difference(ids: Sequence[int], other: Sequence[int]) -> int:
    """Index of the first token that differs; the shorter one's length where one begins with the other."""
    for index, (mine, theirs) in enumerate(zip(ids, other)):
        if mine != theirs:
            return index
    return min(len(ids), len(other))


def _p_values(plain: Side, other: Side) -> dict[str, float]:
    return {name: permutation_p(plain.values[name], other.values[name]) for name in STATISTICS}


def judged(compared: Mapping[str, Mapping[str, float]], controls: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Holm over everything that must pass together, and over each broken verifier's statistics."""
    together = holm({f"{where}: {name}": value for where, row in compared.items() for name, value in row.items()})
    seen = {broken: min(holm(row).values()) for broken, row in controls.items()}
    return {
        "level": LEVEL,
        "passes": min(together.values()) > LEVEL,
        "adjusted_p": together,
        "p": {where: dict(row) for where, row in compared.items()},
        "broken_p": {broken: dict(row) for broken, row in controls.items()},
        "broken_adjusted_p": seen,
        "broken_rejected": {broken: value <= LEVEL for broken, value in seen.items()},
    }


def describe(result: Mapping[str, Any]) -> Iterable[str]:
    """The verdict in lines."""
    smallest = min(result["adjusted_p"].items(), key=lambda item: item[1])
    yield f"plain against speculation: {'passes' if result['passes'] else 'FAILS'} at {result['level']}"
    yield f"  {len(result['adjusted_p'])} tests, smallest adjusted p {smallest[1]:.3g} ({smallest[0]})"
    for name, rejected in result["broken_rejected"].items():
        yield f"  {name}: {'rejected' if rejected else 'not seen'} (adjusted p {result['broken_adjusted_p'][name]:.3g})"
