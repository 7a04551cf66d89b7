"""Provenance changes no token and no logprob, has one entry per output token however a request ends, and is true.

True: the sources are what every step's draft and accept length imply and what SGLang's counters say; the twin's
logprobs are those of a reference twin that shares no code with the server's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import requests as http
import torch
from support.equality import assert_same, greedy, ids, retractions
from support.exact_model import ExactModel
from support.prompts import mixed_prompts
from support.provenance import (
    ASKING,
    DRAFT_LOGPROBS,
    KEYS,
    SOURCES,
    assert_absent,
    assert_aligned,
    assert_counts_agree,
    draft_runs,
    provenance,
    sources_of,
)
from support.server import Server

pytestmark = pytest.mark.server

PROMPTS = mixed_prompts(8, seed=71, longest=60)
SAMPLED = {"temperature": 1.0, "max_new_tokens": 48, "ignore_eos": True}


@pytest.fixture
def asked(spec: Server) -> Iterator[Server]:
    """`spec`, where requests may ask."""
    with provenance(spec, "request"):
        yield spec


def test_off_means_nothing(spec: Server, plain: Server) -> None:
    """The default. Who asks is told how to switch it on; a server without us ignores it, as any custom parameter."""
    spec.cycle()
    assert spec.state()["config"]["values"]["provenance"] == "off"
    assert_absent(spec.generate(PROMPTS[0], greedy(16)))
    body = {"input_ids": PROMPTS[0], "sampling_params": {**greedy(16), **ASKING}}
    refused = spec.request("POST", "/generate", json=body)
    assert refused.status_code == 400 and "--er-provenance" in refused.text
    assert_absent(plain.generate(PROMPTS[0], {**greedy(16), **ASKING}))


@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
def test_on_changes_no_token_and_no_logprob(spec: Server, gamma: int) -> None:
    """Greedy in fp32, one at a time: exactly the same numbers. The counts agree with SGLang's."""
    spec.fixed(gamma)
    fields = {"return_logprob": True, "top_logprobs_num": 2}
    expected = spec.generate_all(PROMPTS, greedy(48), concurrency=1, **fields)
    with provenance(spec):
        replies = spec.generate_all(PROMPTS, greedy(48), concurrency=1, **fields)
    for mine, theirs in zip(replies, expected, strict=True):
        assert mine["output_ids"] == theirs["output_ids"]
        for key in ("output_token_logprobs", "output_top_logprobs"):
            assert mine["meta_info"][key] == theirs["meta_info"][key]
        assert_absent(theirs)
        assert_counts_agree(mine)
    found = Counter(source for reply in replies for source in reply["meta_info"][SOURCES])
    # With drafts too, a last token that no draft could follow is plain.
    assert set(found) - {"plain"} == ({"prefill", "draft", "bonus", "resampled"} if gamma else {"prefill"})
    assert (found["plain"] > len(PROMPTS)) == (gamma == 0), found


def test_seeded_tokens_are_plain_decodes(server: Callable[[str], Server], plain: Server) -> None:
    sampling = [{**SAMPLED, "sampling_seed": 300 + i, "top_k": 40} for i in range(8)]
    expected = ids(plain.generate_all(PROMPTS, sampling, concurrency=8))
    seeded = server("seeded")
    seeded.cycle()
    with provenance(seeded):
        replies = seeded.generate_all(PROMPTS, sampling, concurrency=8)
    assert_same(ids(replies), expected, "seeded with provenance")
    for reply in replies:
        assert_counts_agree(reply)


@pytest.mark.parametrize("sampling", [greedy(48), SAMPLED], ids=["greedy", "T=1"])
def test_sources_are_what_the_steps_did(spec: Server, sampling: dict[str, Any]) -> None:
    """Against a trace of every step's draft and accept length, eight requests at a time, one of them never drafted."""
    spec.set_policy(policy="cycle", gamma_schedule=[0, 3, 1, 7, 5, 2], trace=True)
    try:
        with provenance(spec):
            body = {"input_ids": PROMPTS, "sampling_params": sampling, "rid": [f"traced-{i}" for i in range(8)]}
            replies = spec.post("/generate", body)
            steps = spec.state()["trace"]
    finally:
        spec.set_policy(trace=False)
    for reply in replies:
        assert_counts_agree(reply)
        assert reply["meta_info"][SOURCES] == sources_of(steps[reply["meta_info"]["id"]], len(reply["output_ids"]))


@pytest.fixture(scope="module")
def models(flat_model: Callable[[str, int], Any]) -> Iterator[tuple[ExactModel, ExactModel]]:
    """The policy and its twin. One thread: with the server's, two would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = flat_model("qwen3", 0)
    yield ExactModel(path), ExactModel(path, twin=True)
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 0}], ids=str)
def test_draft_logprobs_are_a_reference_twins(
    spec: Server, models: tuple[ExactModel, ExactModel], kind: dict[str, Any]
) -> None:
    """transformers computes them from dequantized weights and the policy's KV; they are not the policy's logprobs."""
    spec.set_policy(policy="fixed", gamma=5, draft_activations="exact")
    prompts, sampling = PROMPTS[:4], {**SAMPLED, **kind}
    try:
        with provenance(spec):
            replies = spec.generate_all(prompts, sampling, concurrency=4, return_logprob=True)
    finally:
        spec.set_policy(draft_activations="int8")
    policy, twin = models
    errors, distances = [], []
    for prompt, reply in zip(prompts, replies, strict=True):
        meta, tokens = reply["meta_info"], [*prompt, *reply["output_ids"]]
        for first, end in draft_runs(meta[SOURCES]):
            at = slice(len(prompt) + first, len(prompt) + end)
            expected = twin.draft_logprobs(policy, tokens[: at.start], tokens[at], sampling["temperature"] or 1.0)
            found = torch.tensor(meta[DRAFT_LOGPROBS][first:end])
            errors += (found - expected).abs().tolist()
            p = torch.tensor([entry[0] for entry in meta["output_token_logprobs"][first:end]])
            distances += (found - p).abs().tolist()
    distance = sum(distances) / len(distances)
    print(f"{len(errors)} drafts, largest error {max(errors):.2e}, mean distance to p {distance:.3f}")
    assert len(errors) > 50 and max(errors) < 1e-4
    assert distance > 0.02


@pytest.mark.parametrize("gamma", [3, 7])
def test_every_end_of_a_request(spec: Server, gamma: int) -> None:
    """Limits 0 to gamma + 2, and a stop at each of six tokens of an answer, by id and by text."""
    spec.fixed(gamma)
    with provenance(spec):
        full = spec.generate(PROMPTS[1], greedy(48))
        assert_counts_agree(full)
        for length in range(1, gamma + 3):
            reply = spec.generate(PROMPTS[1], greedy(length))
            assert len(reply["output_ids"]) == length
            assert_counts_agree(reply)
        scored = spec.generate(PROMPTS[1], {"max_new_tokens": 0}, return_logprob=True)
        assert scored["output_ids"] == [] and all(scored["meta_info"][key] == [] for key in KEYS)
        tokens = full["output_ids"]
        seen_first = [i for i, token in enumerate(tokens) if token not in tokens[:i] and token < 250][:6]
        for index in seen_first:
            for stop in ({"stop_token_ids": [tokens[index]]}, {"stop": [full["text"][index]]}):
                reply = spec.generate(PROMPTS[1], {**greedy(48), "ignore_eos": False, **stop})
                assert reply["output_ids"] == tokens[: len(reply["output_ids"])]
                assert_counts_agree(reply)
                assert reply["meta_info"][SOURCES] == full["meta_info"][SOURCES][: len(reply["output_ids"])]


def test_requests_that_are_not_drafted_for(asked: Server) -> None:
    """A grammar, a JSON schema and a bias among requests that are drafted for, half of which ask."""
    asked.cycle()
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    kinds = [{"regex": "(ab|cd){4,9}"}, {"json_schema": schema}, {"logit_bias": {"65": 100.0}}, {}]
    sampling = [{"temperature": 0, "max_new_tokens": 40, **kinds[i % 4], **(ASKING if i < 4 else {})} for i in range(8)]
    for reply, params in zip(asked.generate_all(PROMPTS, sampling, concurrency=8), sampling, strict=True):
        if "custom_params" not in params:
            assert_absent(reply)
            continue
        assert_counts_agree(reply)
        if len(params) > 3:
            assert reply["meta_info"][SOURCES] == ["prefill", *["plain"] * (len(reply["output_ids"]) - 1)]
        else:
            assert "draft" in reply["meta_info"][SOURCES]


def test_every_chunk_of_a_stream_is_aligned(asked: Server) -> None:
    asked.fixed(3)
    whole = asked.generate(PROMPTS[2], {**greedy(40), **ASKING})
    body = {"input_ids": PROMPTS[2], "sampling_params": {**greedy(40), **ASKING}, "stream": True}
    chunks = []
    with http.post(asked.url + "/generate", json=body, stream=True, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                chunks.append(json.loads(line[6:]))
    assert len(chunks) > 1
    for chunk in chunks:
        assert_aligned(chunk)
    assert [chunks[-1]["meta_info"][key] for key in KEYS] == [whole["meta_info"][key] for key in KEYS]


def test_several_samples_and_a_batch(asked: Server) -> None:
    """n = 3 of one prompt; two prompts of which one asks."""
    asked.cycle()
    for reply in asked.post("/generate", {"input_ids": PROMPTS[3], "sampling_params": {**SAMPLED, **ASKING, "n": 3}}):
        assert_counts_agree(reply)
    body = {"input_ids": PROMPTS[:2], "sampling_params": [{**SAMPLED, **ASKING}, SAMPLED]}
    asking, other = asked.post("/generate", body)
    assert_counts_agree(asking)
    assert_absent(other)


@pytest.mark.parametrize("name", ["paged", "moe", "areal", pytest.param("dp", marks=pytest.mark.last)])
def test_other_servers(server: Callable[[str], Server], name: str) -> None:
    """No overlap and page 16 with forced retraction, two engines, exact experts, no tokenizer: nothing is lost."""
    other = server(name)
    other.cycle()
    sampling = [greedy(100) if i % 2 else {**SAMPLED, "max_new_tokens": 60 + 5 * i} for i in range(8)]
    with provenance(other):
        replies = other.generate_all(PROMPTS, sampling, concurrency=8)
    for reply in replies:
        assert_counts_agree(reply)
        assert set(reply["meta_info"][SOURCES]) >= {"prefill", "draft"}
    if name in ("paged", "dp"):
        assert retractions(replies) > 0
        again = [Counter(reply["meta_info"][SOURCES])["prefill"] - 1 for reply in replies]
        assert sum(again) > 0
        for reply, count in zip(replies, again):
            # Under overlap the step in flight may end a request that was just retracted: no second prefill then.
            assert retractions([reply]) - (name == "dp") <= count <= retractions([reply])


def test_openai_clients(asked: Server) -> None:
    """Chat has it in meta_info, which SGLang gives on request and not in streams; completions have no meta_info."""
    asked.fixed(3)
    client = openai.OpenAI(base_url=asked.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    extra = {"return_meta_info": True, **ASKING}
    messages: Any = [{"role": "user", "content": "The rollout goes on"}]
    chat = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, temperature=0, n=2, extra_body=extra
    )
    for choice in chat.choices:
        meta = choice.model_dump()["meta_info"]
        assert [len(meta[key]) for key in KEYS] == [meta["completion_tokens"]] * 4
        assert "draft" in meta[SOURCES]
    completion = client.completions.create(
        model=model, prompt="The rollout", max_tokens=8, temperature=0, extra_body=dict(ASKING)
    )
    assert not any(key in json.dumps(completion.model_dump()) for key in KEYS)
