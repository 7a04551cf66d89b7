"""Which drafted tokens are accepted: chance that is the same for every policy.

The token at position t of request r is accepted as a draft if u(seed, r, t) < alpha(r, t, j), j being its offset in the
draft. u is a hash of a counter, so it does not depend on what a policy drafted before: two policies that draft the same
token have the same luck with it (common random numbers), and differences between policies are theirs alone.

  alpha(r, t, j) = a_r * (1 - decay)^(t / 1000) * (1 - offset_decay)^j

a_r is drawn per request from Beta(mean * c, (1 - mean) * c), which has the variance mean * (1 - mean) / (c + 1).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the step of a Weyl sequence
PER_TOKENS = 1000  # the decay with position is per so many tokens


@dataclass(frozen=True)
class Acceptance:
    """`mean`: of alpha; or the alphas themselves, dealt out to the requests in turn. `concentration`: 0 is no spread.
    `change`: (mean from then on, share of all tokens after which); a request keeps its rank among the others."""

    mean: float | tuple[float, ...]
    concentration: float = 50.0
    decay: float = 0.0
    offset_decay: float = 0.0
    change: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        alphas = self.mean if isinstance(self.mean, tuple) else (self.mean,)
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
            raise ValueError("--alpha must be between 0 and 1")
        if not 0 <= self.concentration < float("inf"):
            raise ValueError(f"--alpha-concentration must be at least 0, got {self.concentration:g}")
        for name, value in (("--alpha-decay", self.decay), ("--alpha-offset-decay", self.offset_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value:g}")
        if self.change is not None and not (0 <= self.change[0] <= 1 and 0 <= self.change[1] <= 1):
            raise ValueError("--alpha-change must be ALPHA@FRACTION, both between 0 and 1")


def parse_alpha(text: str) -> float | tuple[float, ...]:
    """A number, or a JSON file with a list of numbers. Raises ValueError in one line."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"--alpha {text}: neither a number nor a JSON file") from None
    if not isinstance(found, list) or not found or not all(type(value) in (int, float) for value in found):
        raise ValueError(f"--alpha {text}: must be a JSON list of numbers")
    return tuple(float(value) for value in found)


def parse_change(text: str) -> tuple[float, float]:
    alpha, _, fraction = text.partition("@")
    try:
        return float(alpha), float(fraction)
    except ValueError:
        raise ValueError(f"--alpha-change {text}: must be ALPHA@FRACTION") from None


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64: every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniforms(seed: int, requests: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """u(seed, r, t) in [0, 1), element by element."""
    start = np.uint64((seed * _GOLDEN + 1) & _MASK)
    keys = _mix(_mix(requests.astype(np.uint64) + start))
    mixed = _mix(keys + positions.astype(np.uint64) * np.uint64(_GOLDEN))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Luck:
    """Everything that chance decides in a rollout, for all requests behind each other: request r begins at `start[r]`.

    `runs[k][i]`: how many drafts in a row are accepted from token i on, before (k = 0) and after (k = 1) the change.
    `alphas[k][i]`: the true acceptance of token i as a first draft. Runs may reach into the next request; whoever
    reads them ends at the tokens that are left.
    """

    def __init__(self, acceptance: Acceptance, lengths: Sequence[int], gamma_max: int, seed: int) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        self.start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.factors = np.power(1.0 - acceptance.offset_decay, np.arange(gamma_max), dtype=np.float64)
        request = np.repeat(np.arange(len(sizes)), sizes)
        position = np.arange(len(request)) - self.start[request]
        chance = uniforms(seed, request, position)
        fade = (1.0 - acceptance.decay) ** (position / PER_TOKENS)
        self.alphas, self.runs = [], []
        for of_request in _request_alphas(acceptance, len(sizes), seed):
            alpha = of_request[request] * fade
            self.alphas.append(alpha)
            self.runs.append(_runs(chance, alpha, self.factors))


def _runs(
    chance: npt.NDArray[np.float64], alpha: npt.NDArray[np.float64], factors: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    runs = np.zeros(len(chance), dtype=np.int64)
    going = np.ones(len(chance), dtype=bool)
    for offset, factor in enumerate(factors):
        accepted = np.zeros(len(chance), dtype=bool)
        accepted[: len(chance) - offset] = chance[offset:] < alpha[offset:] * factor
        going &= accepted
        runs += going
    return runs


def _request_alphas(acceptance: Acceptance, count: int, seed: int) -> list[npt.NDArray[np.float64]]:
    rng = np.random.default_rng([seed, 1])
    if isinstance(acceptance.mean, tuple):
        before = np.resize(np.asarray(acceptance.mean), count)
    else:
        before = _beta(acceptance.mean, acceptance.concentration, count, rng)
    if acceptance.change is None:
        return [before]
    after = np.sort(_beta(acceptance.change[0], acceptance.concentration, count, rng))
    return [before, after[np.argsort(np.argsort(before))]]


def _beta(mean: float, concentration: float, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    if concentration == 0 or not 0 < mean < 1:
        return np.full(count, mean)
    return rng.beta(mean * concentration, (1 - mean) * concentration, count)
