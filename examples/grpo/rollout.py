"""The rollout's side: prompts to a running server, responses with token ids and logprobs back, weights to the server.

Nothing here knows about speculation: it is what a loop against plain SGLang does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import openai
import torch

from sglang_er.engine.weight_sender import WeightSender
from sglang_er.models import task, tokenizer
from sglang_er.rollout.client import REQUEST_TIMEOUT_S, Client
from sglang_er.rollout.errors import RolloutError

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class Rollout:
    """One response. `logprobs`: of its `ids`, as the server gave them when it sampled. `reward`: 1 right, 0 wrong."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float
    finished: bool


Sampler = Callable[[Sequence[int], int, int], list[tuple[list[int], list[float], str, bool]]]


class NativeSampler:
    """POST /generate."""

    def __init__(self, client: Client, temperature: float = 1.0) -> None:
        self._client, self._temperature = client, temperature

    def __call__(
        self, prompt_ids: Sequence[int], samples: int, max_new_tokens: int
    ) -> list[tuple[list[int], list[float], str, bool]]:
        """(ids, logprobs, text, ended by itself) of each sample."""
        sampling = {"temperature": self._temperature, "max_new_tokens": max_new_tokens, "n": samples}
        body = {"input_ids": list(prompt_ids), "sampling_params": sampling, "return_logprob": True}
        reply = self._client.send("POST", "/generate", body)
        if reply.status_code != 200:
            raise RolloutError(f"POST /generate: {reply.status_code} {reply.text[:300]}")
        replies = reply.json()
        found = []
        for one in replies if isinstance(replies, list) else [replies]:
            meta = one["meta_info"]
            chosen = meta["output_token_logprobs"]
            ended = meta["finish_reason"]["type"] == "stop"
            found.append(
                ([int(entry[1]) for entry in chosen], [float(entry[0]) for entry in chosen], one["text"], ended)
            )
        return found


class OpenAISampler:
    """POST /v1/completions through OpenAI's client."""

    def __init__(self, client: Client) -> None:
        self._openai = openai.OpenAI(
            base_url=f"{client.url}/v1", api_key="none", max_retries=2, timeout=REQUEST_TIMEOUT_S
        )

    def __call__(
        self, prompt_ids: Sequence[int], samples: int, max_new_tokens: int
    ) -> list[tuple[list[int], list[float], str, bool]]:
        """(ids, logprobs, text, ended by itself) of each sample."""
        try:
            reply = self._openai.completions.create(
                model="default",
                prompt=list(prompt_ids),
                n=samples,
                max_tokens=max_new_tokens,
                temperature=1.0,
                logprobs=0,
                # SGLang's own: the ids, which the text does not tell for certain.
                extra_body={"return_token_ids": True},
            )
        except openai.OpenAIError as error:
            raise RolloutError(f"the OpenAI endpoint failed: {error}") from error
        found = []
        for choice in reply.choices:
            ids = (choice.model_extra or {}).get("token_ids")
            if ids is None or choice.logprobs is None or choice.logprobs.token_logprobs is None:
                raise RolloutError("the OpenAI endpoint sent a choice without token ids or logprobs")
            logprobs = [float(value) for value in choice.logprobs.token_logprobs if value is not None]
            found.append((list(ids), logprobs, choice.text, choice.finish_reason == "stop"))
        return found


def sampler_of(kind: str, client: Client) -> Sampler:
    return OpenAISampler(client) if kind == "openai" else NativeSampler(client)


def roll_out(
    sampler: Sampler,
    prompts: Sequence[task.Prompt],
    samples: int,
    max_new_tokens: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rollout]:
    """`samples` responses to each prompt, prompt by prompt; all prompts at once, as an RL step sends them."""
    encoder = tokenizer.build_tokenizer()

    def one(prompt: task.Prompt) -> list[Rollout]:
        prompt_ids = encoder.encode(tokenizer.chat_text(prompt.prompt)).ids
        found = []
        for ids, logprobs, text, finished in sampler(prompt_ids, samples, max_new_tokens):
            if len(ids) != len(logprobs) or not ids:
                raise RolloutError(f"a response of {len(ids)} tokens came with {len(logprobs)} logprobs")
            reward = task.verify(prompt, text) if finished else 0.0
            found.append(Rollout(tuple(prompt_ids), tuple(ids), tuple(logprobs), reward, finished))
        return found

    groups: list[list[Rollout]] = []
    with ThreadPoolExecutor(len(prompts)) as pool:
        for group in pool.map(one, prompts):
            groups.append(group)
            on_done(len(groups), len(prompts))
    return list(chain.from_iterable(groups))


class Policy:
    """The server's weights, as a trainer sets them: flattened buckets through shared memory."""

    def __init__(self, client: Client) -> None:
        self._client, self._sender = client, WeightSender()

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: str) -> float:
        """Seconds from the first request to the last answer; making the tensors is not counted."""
        seconds = self._post("/begin_weight_update", {})
        for bucket in _buckets(tensors):
            started = time.perf_counter()
            body = {
                "serialized_named_tensors": [self._sender.bucket(bucket)],
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": version,
            }
            seconds += time.perf_counter() - started + self._post("/update_weights_from_tensor", body)
        seconds += self._post("/end_weight_update", {})
        self._client.flush_cache()
        return seconds

    def _post(self, path: str, body: Mapping[str, Any]) -> float:
        started = time.perf_counter()
        reply = self._client.send("POST", path, body)
        if reply.status_code != 200:
            raise RolloutError(f"POST {path}: {reply.status_code} {reply.text[:300]}")
        return time.perf_counter() - started


def _buckets(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[list[tuple[str, torch.Tensor]]]:
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        held.append((name, tensor))
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held
