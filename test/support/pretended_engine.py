"""An engine that is not there: true costs and true chance for a policy, in closed loop and without a clock."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass

from sglang_er.policy import TRACKED_ROWS, Policy, StepOutcome, StepState

GAMMA_MAX = 7


@dataclass
class Engine:
    """A plain step takes 10 ms until arithmetic bounds it. What changes between two `run`s is assigned."""

    policy: Policy
    alpha: float = 0.9
    draft: float = 0.3  # of a plain step
    knee: float = 32.0  # rows from which arithmetic bounds the target
    noise: float = 0.02
    seed: int = 0
    pace: float = 1.0  # of the machine: factor on all seconds
    late: int = 0  # steps until an outcome is told
    named: bool = False  # requests are told by name where the batch is small; each lives for some 50 steps

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.seconds = 0.0
        self.tokens = 0
        self.steps = 0
        self._outcomes: deque[StepOutcome] = deque()

    def target(self, rows: int) -> float:
        return 0.01 * self.pace * max(1.0, rows / self.knee)

    def cost(self, rows: int, gamma: int) -> float:
        return self.target(rows * (gamma + 1)) + gamma * self.draft * self.target(rows)

    def rate(self, rows: int, gamma: int) -> float:
        return rows * sum(self.alpha**i for i in range(gamma + 1)) / self.cost(rows, gamma)

    def best(self, rows: int) -> int:
        return max(range(GAMMA_MAX + 1), key=lambda gamma: self.rate(rows, gamma))

    def step(self, rows: int) -> int:
        """Of `rows` requests; the draft length."""
        names = tuple((row, (self.steps + 7 * row) // 50) for row in range(rows)) if self.named else ()
        state = StepState(rows, rows * 500, GAMMA_MAX, rows, names if rows <= TRACKED_ROWS else ())
        gamma = self.policy.choose(state)
        lens = []
        for _ in range(rows):
            count = 1
            while count <= gamma and self.rng.random() < self.alpha:
                count += 1
            lens.append(count)
        draft = gamma * self.draft * self.target(rows) * self.rng.gauss(1, self.noise)
        target = self.target(rows * (gamma + 1)) * self.rng.gauss(1, self.noise)
        self.seconds += draft + target
        self.tokens += sum(lens)
        self.steps += 1
        self._outcomes.append(StepOutcome(state, gamma, lens, draft + target, draft if gamma else math.nan))
        if len(self._outcomes) > self.late:
            self.policy.observe(self._outcomes.popleft())
        return gamma

    def run(self, rows: int, steps: int) -> Counter[int]:
        """How often each draft length was chosen."""
        return Counter(self.step(rows) for _ in range(steps))


def regret(engine: Engine, chosen: Counter[int], rows: int) -> float:
    """Of the mean rate, against the best draft length."""
    seconds = sum(count * engine.cost(rows, gamma) for gamma, count in chosen.items())
    tokens = sum(count * engine.cost(rows, gamma) * engine.rate(rows, gamma) for gamma, count in chosen.items())
    assert seconds
    return 1.0 - tokens / seconds / engine.rate(rows, engine.best(rows))
