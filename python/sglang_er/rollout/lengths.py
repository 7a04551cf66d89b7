"""Response lengths of whole rollout batches, with the long tail that makes a rollout wait for its last response."""

from __future__ import annotations

import json
import math
import random
import statistics
from importlib import resources
from pathlib import Path

PER_BATCH = 32
# Most responses are within a factor of two of the middle, one in eight belongs to a tail that falls by a power law.
_MIDDLE = 64.0
_SPREAD = 0.5
_TAIL_FROM = 160.0
_TAIL_POWER = 1.1
_LONGEST = 1024
_TAIL = PER_BATCH // 8
LEAST_TAIL = 8.0


def draw(seed: int) -> list[int]:
    """One batch; drawn again until its longest response is at least `LEAST_TAIL` times its median."""
    rng = random.Random(f"lengths/{seed}")
    while True:
        body = [_MIDDLE * math.exp(rng.gauss(0.0, _SPREAD)) for _ in range(PER_BATCH - _TAIL)]
        tail = [_TAIL_FROM * (1.0 - rng.random()) ** (-1.0 / _TAIL_POWER) for _ in range(_TAIL)]
        lengths = [max(8, round(length)) for length in (*body, *tail)]
        rng.shuffle(lengths)
        if tail_ratio(lengths) >= LEAST_TAIL and max(lengths) <= _LONGEST:
            return lengths


def tail_ratio(lengths: list[int]) -> float:
    return max(lengths) / statistics.median(lengths)


def load(path: Path | None = None) -> list[list[int]]:
    """The batches of a file, the committed one without a path. Raises ValueError or OSError in one line."""
    source = resources.files(__package__) / "assets" / "lengths_longtail.json" if path is None else path
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    batches = content.get("batches") if isinstance(content, dict) else None
    if not isinstance(batches, list) or not batches or not all(map(_is_batch, batches)):
        raise ValueError(f'{path}: must be {{"batches": [[length, ...], ...]}} with whole numbers of at least 1')
    return [list(batch) for batch in batches]


def _is_batch(batch: object) -> bool:
    return isinstance(batch, list) and bool(batch) and all(type(value) is int and value >= 1 for value in batch)
