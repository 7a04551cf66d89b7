"""A server that is only counters, for tests of what measures it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from sglang_er.rollout.client import Response
from sglang_er.rollout.measure import PLAIN


class CountingServer:
    """Stands in for `Client`. A plain step takes a second and commits one token, any other commits gamma + 1."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "policy": "fixed", "gamma": 3, "gamma_max": 3, "thresholds": [[2, 3]], "gamma_schedule": None,
            "requantize": True, "cpu_threads": 1,
        }  # fmt: skip
        self.policies: list[dict[str, Any]] = []
        self.requests: list[tuple[int, int]] = []  # gamma, tokens
        self.flushed = 0
        self.by_gamma: dict[int, int] = {}
        self.committed = 0
        self.lock = threading.Lock()

    def set_policy(self, changes):
        self.policies.append(dict(changes))
        self.values |= changes

    def flush_cache(self):
        self.flushed += 1

    def gamma(self) -> int:
        return int(self.values["gamma"])

    def generate(self, prompt: str | Sequence[int], sampling: dict[str, Any], top_logprobs: int = 0) -> Response:
        tokens = sampling["max_new_tokens"]
        with self.lock:
            gamma = self.gamma()
            self.requests.append((gamma, tokens))
            self.by_gamma[gamma] = self.by_gamma.get(gamma, 0) + -(-tokens // (gamma + 1))
            self.committed += tokens
        return Response("", tokens, "length")

    def state(self):
        drafted = sum(gamma * count for gamma, count in self.by_gamma.items())
        steps = sum(self.by_gamma.values())
        costs = {str(g): {"steps": n, "seconds": n * (1.0 + 0.5 * g)} for g, n in self.by_gamma.items()}
        most = max((gamma for gamma in self.by_gamma), default=0)
        return {
            "config": {"values": dict(self.values)},
            "policy": {"policy": self.values["policy"], "gamma": self.values["gamma"]},
            "steps": {
                "steps_by_gamma": {str(g): n for g, n in self.by_gamma.items()},
                "request_steps": steps,
                "committed_tokens": self.committed,
                "accepted_drafts": drafted,
                "speculating_request_steps": steps - self.by_gamma.get(0, 0),
                "drafted_at": [drafted] * most,
                "accepted_at": [drafted] * most,
                "costs": {"1": costs, "2": costs},
            },
        }

    def plain_requests(self) -> list[int]:
        return [tokens for gamma, tokens in self.requests if gamma == PLAIN["gamma"]]
