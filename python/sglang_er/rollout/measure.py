"""Plain and speculative decoding measured in one server, in alternating blocks, so that whatever disturbs the machine
disturbs both. A block sends one whole batch at once and ends with its last response.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sglang_er.models import task, tokenizer
from sglang_er.rollout.client import Client, Response
from sglang_er.rollout.prompts import Request
from sglang_er.rollout.steps import Steps
from sglang_er.rollout.workload import Rollout

PLAIN: Mapping[str, Any] = {"policy": "fixed", "gamma": 0}
POLL_S = 1.0

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Block:
    """One batch under one policy. `rewards` are one per response; `cut`: responses that met their token limit.

    `cpu_seconds` is the server's processor time: on a busy machine it says more than the clock on the wall.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    rewards: list[float]
    cut: int
    steps: Steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds if self.cpu_seconds else 0.0


def send(client: Client, rollout: Rollout, temperature: float) -> Response:
    """One rollout, over the endpoint that it names."""
    if rollout.endpoint == "openai":
        return client.chat(rollout.prompt.prompt, rollout.max_tokens, temperature)
    text = tokenizer.chat_text(rollout.prompt.prompt)
    return client.generate(text, {"temperature": temperature, "max_new_tokens": rollout.max_tokens})


def run_block(
    client: Client,
    policy: Mapping[str, Any],
    batch: Sequence[Rollout],
    temperature: float = 1.0,
    on_progress: OnProgress | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Block:
    """Switch the policy, send the batch at once, wait for all of it, judge the responses."""
    jobs = [partial(send, client, rollout, temperature) for rollout in batch]
    block, responses = run_jobs(client, policy, jobs, len(jobs), on_progress, cpu_clock)
    rewards = [task.verify(rollout.prompt, response.text) for rollout, response in zip(batch, responses)]
    return replace(block, rewards=rewards)


def jobs_of(
    client: Client, requests: Sequence[Request], temperature: float, tokens: int | None = None
) -> list[Callable[[], Response]]:
    """What `run_jobs` and `send_all` take; `tokens`: of every response, None for the requests' own lengths."""
    if tokens is not None:
        requests = [replace(request, output_tokens=tokens) for request in requests]
    return [partial(client.generate, request.input_ids, request.sampling(temperature)) for request in requests]


def run_jobs(
    client: Client,
    policy: Mapping[str, Any],
    jobs: Sequence[Callable[[], Response]],
    at_once: int,
    on_progress: OnProgress | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> tuple[Block, list[Response]]:
    """Switch the policy, keep `at_once` jobs in flight, wait for the last one. The block has no rewards.

    `cpu_clock`: processor time of the server.
    """
    client.set_policy(policy)
    before = Steps.total(client.state())
    started, cpu_started = time.perf_counter(), cpu_clock()
    responses = send_all(jobs, _Progress(client, before, on_progress).report, at_once)
    seconds, cpu_seconds = time.perf_counter() - started, cpu_clock() - cpu_started
    # Switching waits until the server is idle: only then has it counted the last step.
    client.set_policy(policy)
    block = Block(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        tokens=sum(response.tokens for response in responses),
        rewards=[],
        cut=sum(response.finish == "length" for response in responses),
        steps=Steps.total(client.state()).since(before),
    )
    return block, responses


@dataclass(frozen=True)
class _Progress:
    """Tokens so far, from the engine's counters, as one short line."""

    client: Client
    before: Steps
    show: OnProgress | None

    def report(self, done: int, total: int, seconds: float) -> None:
        if self.show is not None:
            tokens = Steps.total(self.client.state()).since(self.before).committed_tokens
            self.show(f"{done}/{total} responses, {tokens} tokens, {tokens / seconds:.1f} tokens/s")


def send_all(
    jobs: Sequence[Callable[[], Response]],
    report: Callable[[int, int, float], None] | None = None,
    at_once: int | None = None,
) -> list[Response]:
    """Run the jobs, `at_once` in flight (default: all); replies in their order.

    `report(done, total, seconds)` is called once a second.
    """
    pool = ThreadPoolExecutor(at_once or len(jobs))
    started = time.perf_counter()
    try:
        futures = [pool.submit(job) for job in jobs]
        open_ones: set[Future[Response]] = set(futures)
        while open_ones:
            finished, open_ones = wait(open_ones, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()  # raises what the request raised, without waiting for the others
            if report is not None and not finished:
                report(len(jobs) - len(open_ones), len(jobs), time.perf_counter() - started)
        return [future.result() for future in futures]
    finally:
        # Not `with`: after an error or Ctrl-C it would wait for requests that only end with the server.
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Comparison:
    """Blocks of one policy against blocks of plain decode, pair by pair."""

    plain: list[Block]
    speculative: list[Block]

    @property
    def speed_up(self) -> float:
        """Median over pairs: the two blocks of a pair saw the same machine."""
        return statistics.median(self.speed_ups)

    @property
    def speed_ups(self) -> list[float]:
        return [s.tokens_per_second / p.tokens_per_second for p, s in zip(self.plain, self.speculative, strict=True)]

    @property
    def cpu_speed_up(self) -> float | None:
        """The same in processor time; None where that was not measured."""
        pairs = zip(self.plain, self.speculative, strict=True)
        quotients = [s.tokens_per_cpu_second / p.tokens_per_cpu_second for p, s in pairs if p.tokens_per_cpu_second]
        return statistics.median(quotients) if quotients else None


def compare(
    client: Client,
    policy: Mapping[str, Any],
    batch: Sequence[Rollout],
    pairs: int,
    budget_s: float,
    on_progress: Callable[[str, str, bool], None],
    cpu_clock: Callable[[], float] = time.process_time,
) -> Comparison:
    """Pairs of blocks of the same batch, fewer than `pairs` where the next would not fit into `budget_s` seconds."""

    def run(pair: int, changes: Mapping[str, Any], tell: OnProgress) -> Block:
        return run_block(client, changes, batch, on_progress=tell, cpu_clock=cpu_clock)

    return alternate(run, policy, pairs, budget_s, on_progress)


def alternate(
    run: Callable[[int, Mapping[str, Any], OnProgress], Block],
    policy: Mapping[str, Any],
    pairs: int,
    budget_s: float,
    on_progress: Callable[[str, str, bool], None],
) -> Comparison:
    """Blocks of plain decode and of `policy` in turn; `run(pair, changes, tell)` measures one.

    The order within a pair turns every time, so that a drift of the machine favours nobody.
    `on_progress(block, text, done)` is told what is going on.
    """
    started = time.monotonic()
    arms = {"plain": (PLAIN, list[Block]()), "speculative": (policy, list[Block]())}
    for pair in range(pairs):
        elapsed = time.monotonic() - started
        if pair and not _worth_another(pair, elapsed, budget_s):
            break
        for name in list(arms)[:: 1 if pair % 2 == 0 else -1]:
            changes, blocks = arms[name]
            label = f"pair {pair + 1}, {name}"
            block = run(pair, changes, partial(_tell, on_progress, label))
            blocks.append(block)
            figures = f"{block.tokens} tokens in {block.seconds:.1f} s, {block.tokens_per_second:.1f} tokens/s"
            on_progress(label, figures, True)
    return Comparison(arms["plain"][1], arms["speculative"][1])


def _worth_another(pairs_done: int, elapsed_s: float, budget_s: float) -> bool:
    """Another pair if it fits; for the second one, without which nothing is known about the noise, the budget twice."""
    expected = elapsed_s * (pairs_done + 1) / pairs_done
    return expected <= (2 * budget_s if pairs_done == 1 else budget_s)


def _tell(on_progress: Callable[[str, str, bool], None], label: str, text: str) -> None:
    on_progress(label, text, False)
