"""The unmodified `openai` client against the OpenAI-compatible endpoints, with speculation on."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from support.server import Server

pytestmark = pytest.mark.server

PROMPT = "The rollout goes on"


@pytest.fixture(scope="module")
def spec(server: Callable[[str], Server]) -> Server:
    shared = server("spec")
    shared.cycle()
    return shared


@pytest.fixture(scope="module")
def client(spec: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=spec.url + "/v1", api_key="none")


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_completion_equals_the_native_endpoint(client: openai.OpenAI, model: str, spec: Server) -> None:
    reply = client.completions.create(model=model, prompt=PROMPT, max_tokens=32, temperature=0)
    native = spec.generate(PROMPT, {"temperature": 0, "max_new_tokens": 32})
    assert reply.choices[0].text == native["text"]
    assert reply.usage is not None and reply.usage.completion_tokens == len(native["output_ids"])


def test_completion_logprobs(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=1, logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert reply.usage is not None
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == reply.usage.completion_tokens
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)


def test_chat_and_its_stream_agree(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces, usage = [], None
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage is not None and whole.usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_chat_logprobs_and_several_choices(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=12,
        temperature=1,
        n=3,
        logprobs=True,
        top_logprobs=2,
    )
    assert len(reply.choices) == 3
    for choice in reply.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_a_bad_request_is_a_client_error(client: openai.OpenAI, model: str, spec: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=-2)
    assert spec.alive()
