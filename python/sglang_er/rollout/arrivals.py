"""The work of a simulated rollout: how long the responses are, and when their requests come.

closed    every request is there at time 0.
open:R    requests come one by one, R per second on average, with exponential gaps (a Poisson process).
turns:K   conversations of K turns. The next turn comes when the one before has ended and a tool or a user has taken
          its time (exponential); its context holds everything said before plus the new tokens.
waves:K,N K batches; the next one comes as soon as at most N requests are left of those before it, as an asynchronous
          trainer sends it: the load swings between N and a batch and N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sglang_er.rollout import lengths as length_files

DEFAULT_REQUESTS = 128
Draw = Callable[[int, int], list[int]]  # (how many, seed) -> lengths


@dataclass(frozen=True)
class Lengths:
    """`draw(count, seed)`. `batches`: those of a file, which are replayed whole where no number of requests is asked
    for."""

    text: str
    draw: Draw
    batches: Sequence[Sequence[int]] = ()

    def take(self, count: int | None, seed: int) -> list[int]:
        if count is None and self.batches:
            return list(self.batches[seed % len(self.batches)])
        return self.draw(count or DEFAULT_REQUESTS, seed)


def parse_lengths(text: str) -> Lengths:
    """Raises ValueError or OSError in one line."""
    if text.startswith("lognormal:"):
        return Lengths(text, _lognormal(text))
    batches = length_files.load(None if text == "longtail" else Path(text))
    pool = np.concatenate([np.asarray(batch) for batch in batches])

    def from_pool(count: int, seed: int) -> list[int]:
        rng = np.random.default_rng([seed, 2])
        chosen: list[int] = rng.choice(pool, count, replace=count > len(pool)).tolist()
        return chosen

    return Lengths(text, from_pool, batches)


def _lognormal(text: str) -> Draw:
    """lognormal:mean,sigma,cap[,share]. `mean` and `sigma` (of the logarithm) are those before the cut at `cap`;
    `share` of the responses run into the cap, as those do that never end by themselves."""
    try:
        mean, sigma, cap, *rest = (float(part) for part in text.partition(":")[2].split(","))
        (share,) = rest or [0.0]
        if not (1 <= mean < math.inf and 0 <= sigma < 10 and cap >= 1 and 0 <= share <= 1):
            raise ValueError
        cap = int(cap)
    except (ValueError, OverflowError):
        raise ValueError(
            f"--lengths {text}: must be lognormal:MEAN,SIGMA,CAP or lognormal:MEAN,SIGMA,CAP,SHARE"
        ) from None

    def draw(count: int, seed: int) -> list[int]:
        rng = np.random.default_rng([seed, 2])
        values = np.exp(rng.normal(math.log(mean) - sigma**2 / 2, sigma, count))
        values[rng.random(count) < share] = cap
        found: list[int] = np.clip(np.rint(values), 1, cap).astype(int).tolist()
        return found

    return draw


@dataclass(frozen=True)
class Arrivals:
    """`kind`: closed, open, turns or waves. `rate`: requests per second of open; `turns` of each conversation; `waves`,
    the next of which comes when `left` requests are left."""

    kind: str = "closed"
    rate: float = 0.0
    turns: int = 1
    think_seconds: float = 5.0
    turn_tokens: int = 128
    waves: int = 1
    left: int = 0

    def text(self) -> str:
        values = {"open": f":{self.rate:g}", "turns": f":{self.turns}", "waves": f":{self.waves},{self.left}"}
        return self.kind + values.get(self.kind, "")


def parse_arrivals(text: str, think_seconds: float = 5.0, turn_tokens: int = 128) -> Arrivals:
    kind, _, value = text.partition(":")
    try:
        if kind == "closed" and not value:
            return Arrivals()
        if kind == "open" and 0 < float(value) < math.inf:
            return Arrivals(kind, rate=float(value))
        if kind == "turns" and int(value) >= 1 and 0 <= think_seconds < math.inf and turn_tokens >= 0:
            return Arrivals(kind, 0.0, int(value), think_seconds, turn_tokens)
        if kind == "waves":
            waves, left = (int(part) for part in value.split(","))
            if waves >= 1 and left >= 0:
                return Arrivals(kind, waves=waves, left=left)
    except ValueError:
        pass
    raise ValueError(f"--arrivals {text}: must be closed, open:RATE, turns:K or waves:K,LEFT, with numbers above 0")


@dataclass(frozen=True)
class Work:
    """One entry per request. `arrival`: seconds, infinite where a request waits for the one before it."""

    lengths: list[int]  # response tokens
    prompts: list[int]  # context before the first of them
    new_tokens: list[int]  # of the prompt, those to prefill; the rest was said in the turns before
    arrival: list[float]
    following: list[int]  # the request that the end of this one brings, -1 for none
    delay: list[float]  # seconds from that end to its arrival
    waves: Sequence[Sequence[int]] = ()  # requests that come together, one wave after the other
    left: int = 0  # the next wave comes when so many requests are there at most


def make_work(lengths: Lengths, count: int | None, prompt: int, arrivals: Arrivals, seed: int) -> Work:
    """`count`: requests, of `turns` conversations, of `waves` in each; None: as many as the length file has."""
    rng = np.random.default_rng([seed, 3])
    if arrivals.kind == "turns":
        return _conversations(lengths, count or DEFAULT_REQUESTS, prompt, arrivals, seed, rng)
    if arrivals.kind == "waves":
        return _waves(lengths, count or DEFAULT_REQUESTS, prompt, arrivals, seed)
    sizes = lengths.take(count, seed)
    n = len(sizes)
    arrival = [0.0] * n
    if arrivals.kind == "open":
        arrival = np.cumsum(rng.exponential(1 / arrivals.rate, n)).tolist()
    return Work(sizes, [prompt] * n, [prompt] * n, arrival, [-1] * n, [0.0] * n)


def _waves(lengths: Lengths, count: int, prompt: int, arrivals: Arrivals, seed: int) -> Work:
    n = count * arrivals.waves
    waves = [range(first, first + count) for first in range(0, n, count)]
    arrival = [0.0] * count + [math.inf] * (n - count)
    sizes = lengths.take(n, seed)
    return Work(sizes, [prompt] * n, [prompt] * n, arrival, [-1] * n, [0.0] * n, waves[1:], arrivals.left)


def _conversations(
    lengths: Lengths, count: int, prompt: int, arrivals: Arrivals, seed: int, rng: np.random.Generator
) -> Work:
    turns = arrivals.turns
    sizes: npt.NDArray[np.int64] = np.asarray(lengths.take(count * turns, seed), dtype=np.int64).reshape(count, turns)
    said = np.cumsum(sizes + arrivals.turn_tokens, axis=1) - (sizes + arrivals.turn_tokens)
    first = np.arange(turns) == 0
    following = np.arange(count * turns) + 1
    following[turns - 1 :: turns] = -1
    return Work(
        sizes.ravel().tolist(),
        (prompt + said).ravel().tolist(),
        np.tile(np.where(first, prompt, arrivals.turn_tokens), count).tolist(),
        np.tile(np.where(first, 0.0, np.inf), count).tolist(),
        following.tolist(),
        rng.exponential(arrivals.think_seconds, count * turns).tolist(),
    )
