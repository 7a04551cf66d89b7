"""Every kind of request at once: nothing lost, nothing leaked, every row under its own rule."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests as http
from support.processors import ForbidEven
from support.server import Server

pytestmark = pytest.mark.server

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


def prompt(seed: int, length: int = 12) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


# name -> (sampling parameters, top-level fields). All greedy: each has one right answer, that of plain decode.
STANDARD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frequency_penalty": ({"frequency_penalty": 1.5}, {}),
    "presence_penalty": ({"presence_penalty": 1.5}, {}),
    "repetition_penalty": ({"repetition_penalty": 1.7}, {}),
    "min_new_tokens": ({"min_new_tokens": 8, "ignore_eos": False}, {}),
    "logit_bias": ({"logit_bias": {"65": 100.0}}, {}),
    "regex": ({"regex": "(ab|cd){4,9}", "ignore_eos": False}, {}),
    "json_schema": (
        {"json_schema": json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})}
        | {"ignore_eos": False},
        {},
    ),
    "custom_processor": ({}, {"custom_logit_processor": ForbidEven.to_str()}),
}


@pytest.fixture(scope="module")
def spec(server: Callable[[str], Server]) -> Server:
    return server("spec")


def run_one(server: Server, name: str, seed: int = 5) -> dict[str, Any]:
    sampling, fields = STANDARD_ROWS[name]
    return server.generate(prompt(seed), {**GREEDY, **sampling}, return_logprob=True, top_logprobs_num=2, **fields)


# Under overlap scheduling SGLang's penalties lag by a step whenever a batch changes, and a retraction forgets them, in
# plain decode as well: they are comparable only without either.
PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens")
CASES = [("moe", name) for name in STANDARD_ROWS] + [("spec", name) for name in STANDARD_ROWS if name not in PENALTIES]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_standard_row_beside_speculating_rows_equals_plain_decode(
    server: Callable[[str], Server], where: str, name: str
) -> None:
    """A row that cannot be drafted for takes its tokens from the standard sampler, while the batch speculates.

    Reference: the same request alone at gamma 0 (SGLang's own decode step). Tokens equal, logprobs and top
    logprobs (of the penalized or masked distribution) within 1e-4; the neighbours still speculate.
    """
    spec = server(where)
    spec.fixed(0)
    expected = run_one(spec, name)
    neighbours = [prompt(100 + i, 20) for i in range(3)]
    expected_neighbours = [spec.generate(p, {**GREEDY, "max_new_tokens": 48}) for p in neighbours]
    spec.cycle((3, 5, 2))
    before = spec.state()["steps"]["accepted_drafts"]
    replies: dict[int, dict[str, Any]] = {}
    threads = [
        threading.Thread(
            target=lambda i=i, p=p: replies.update({i: spec.generate(p, {**GREEDY, "max_new_tokens": 48})})
        )
        for i, p in enumerate(neighbours)
    ]
    for thread in threads:
        thread.start()
    actual = run_one(spec, name)
    for thread in threads:
        thread.join()
    assert actual["output_ids"] == expected["output_ids"]
    assert actual["meta_info"]["finish_reason"] == expected["meta_info"]["finish_reason"]
    assert len(actual["meta_info"]["output_token_logprobs"]) == len(actual["output_ids"])
    for key in ("output_token_logprobs", "output_top_logprobs"):
        for mine, theirs in zip(actual["meta_info"][key], expected["meta_info"][key], strict=True):
            pairs = [(mine, theirs)] if key == "output_token_logprobs" else list(zip(mine, theirs, strict=True))
            assert all(abs(a[0] - b[0]) < 1e-4 or a[0] == b[0] for a, b in pairs)
    assert [replies[i]["output_ids"] for i in range(3)] == [r["output_ids"] for r in expected_neighbours]
    assert spec.state()["steps"]["accepted_drafts"] > before, "the neighbours did not speculate"


def test_features_show_in_the_output(spec: Server) -> None:
    """The rules above do something: otherwise the equality would prove nothing."""
    spec.fixed(3)
    assert run_one(spec, "logit_bias")["output_ids"] == [65] * 24
    assert all(token % 2 for token in run_one(spec, "custom_processor")["output_ids"])
    assert set(run_one(spec, "regex")["text"]) <= set("abcd")
    plain = spec.generate(prompt(5), GREEDY)["output_ids"]
    assert run_one(spec, "frequency_penalty")["output_ids"] != plain


@pytest.mark.parametrize("gamma", [3, 7])
def test_every_length_ends_where_it_should(spec: Server, gamma: int) -> None:
    """max_new_tokens in 1..gamma+2: exactly that many tokens, the prefix of the long answer."""
    spec.fixed(0)
    full = spec.generate(prompt(8), GREEDY)["output_ids"]
    spec.fixed(gamma)
    for length in range(1, gamma + 3):
        reply = spec.generate(prompt(8), {**GREEDY, "max_new_tokens": length}, return_logprob=True)
        assert reply["output_ids"] == full[:length]
        assert len(reply["meta_info"]["output_token_logprobs"]) == length


def test_stop_tokens_and_strings_inside_an_accepted_run(spec: Server) -> None:
    """Stop at each token of a greedy answer in turn, by id and by text: same ids, text and reason as plain decode."""
    spec.fixed(0)
    full = spec.generate(prompt(9), GREEDY)
    tokens = full["output_ids"]
    first_seen = [i for i, token in enumerate(tokens) if token not in tokens[:i] and token < 250][:6]
    assert len(first_seen) >= 4
    for index in first_seen:
        sampling = {"temperature": 0, "max_new_tokens": 24, "stop_token_ids": [tokens[index]]}
        spec.fixed(0)
        expected = spec.generate(prompt(9), sampling)
        spec.fixed(5)
        actual = spec.generate(prompt(9), sampling)
        assert actual["output_ids"] == expected["output_ids"]
        assert actual["text"] == expected["text"]
        assert actual["meta_info"]["finish_reason"] == expected["meta_info"]["finish_reason"]
    text = spec.generate(prompt(9), GREEDY)["text"]
    stop = text[len(text) // 2 :][:2]
    spec.fixed(0)
    expected = spec.generate(prompt(9), {**GREEDY, "stop": [stop]})
    spec.fixed(5)
    actual = spec.generate(prompt(9), {**GREEDY, "stop": [stop]})
    assert (actual["text"], actual["output_ids"]) == (expected["text"], expected["output_ids"])


def test_streaming_is_the_same_answer_in_pieces(spec: Server) -> None:
    spec.fixed(3)
    expected = spec.generate(prompt(10), GREEDY)
    body = {"input_ids": prompt(10), "sampling_params": GREEDY, "stream": True}
    chunks = []
    with http.post(spec.url + "/generate", json=body, stream=True, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                chunks.append(json.loads(line[6:]))
    assert chunks[-1]["text"] == expected["text"]
    assert len(chunks) > 1
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 24


def test_scoring_and_several_samples(spec: Server) -> None:
    """max_new_tokens 0 scores the prompt; n = 4 at temperature 1 gives four answers that are not all the same."""
    spec.fixed(3)
    scored = spec.generate(prompt(11), {"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0)
    assert len(scored["meta_info"]["input_token_logprobs"]) == 12
    body = {"input_ids": prompt(11), "sampling_params": {"temperature": 1, "max_new_tokens": 16, "n": 4}}
    replies = spec.post("/generate", body)
    assert len(replies) == 4
    assert len({tuple(reply["output_ids"]) for reply in replies}) > 1


def test_pause_and_continue_lose_nothing(spec: Server) -> None:
    """pause_generation(retract) in the middle of a batch, then continue: the answers are plain decode's."""
    spec.fixed(0)
    prompts = [prompt(200 + i) for i in range(6)]
    sampling = {**GREEDY, "max_new_tokens": 160}
    expected = [reply["output_ids"] for reply in spec.generate_all(prompts, sampling, 6)]
    for mode in ("retract", "in_place"):
        spec.cycle()
        replies: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda out=replies: out.extend(spec.generate_all(prompts, sampling, 6)))
        thread.start()
        time.sleep(0.3)
        spec.post("/pause_generation", {"mode": mode})
        time.sleep(0.2)
        spec.post("/continue_generation", {})
        thread.join()
        assert [reply["output_ids"] for reply in replies] == expected, mode


def test_64_mixed_requests_finish_and_leave_nothing_behind(spec: Server) -> None:
    """All sampling options, aborts, client disconnects and stops at once, twice over; then an idle server whose
    whole KV pool is free again."""
    spec.cycle()
    rng = random.Random(0)
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"temperature": 0}, {}),
        ({"temperature": 1}, {"return_logprob": True, "top_logprobs_num": 3}),
        ({"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.05}, {}),
        ({"temperature": 1, "stop": ["a", "e"]}, {"return_logprob": True}),
        ({"temperature": 1, "stop_token_ids": [5, 9, 77]}, {}),
        ({"temperature": 0.5, "n": 2}, {}),
        ({"max_new_tokens": 1}, {}),
        ({"max_new_tokens": 0}, {"return_logprob": True, "logprob_start_len": 0}),
        *[({"temperature": rng.choice([0, 1]), **s}, f) for s, f in STANDARD_ROWS.values()],
    ]
    jobs = [(i, *variants[i % len(variants)]) for i in range(64)]
    outcomes: dict[int, Any] = {}

    def send(index: int, sampling: dict[str, Any], fields: dict[str, Any]) -> None:
        body = {
            "input_ids": prompt(index, rng.randrange(3, 120)),
            "sampling_params": {"max_new_tokens": 60, **sampling},
            "rid": f"mixed-{index}",
            **fields,
        }
        if sampling.get("n", 1) > 1:
            body.pop("rid")
        if index % 16 == 3:  # a client that goes away
            with contextlib.suppress(http.RequestException):
                http.post(spec.url + "/generate", json=body, timeout=0.2)
            outcomes[index] = "left"
            return
        outcomes[index] = http.post(spec.url + "/generate", json=body, timeout=300)

    threads = [threading.Thread(target=send, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    for index in (8, 24, 40):
        spec.request("POST", "/abort_request", json={"rid": f"mixed-{index}"})
    for thread in threads:
        thread.join()
    assert len(outcomes) == 64
    for index, outcome in outcomes.items():
        if outcome == "left":
            continue
        assert outcome.status_code == 200, (index, jobs[index], outcome.text[:300])
        replies = outcome.json() if isinstance(outcome.json(), list) else [outcome.json()]
        for reply in replies:
            assert reply["meta_info"]["finish_reason"]["type"] in ("length", "stop", "abort")
    wait_until_idle(spec)
    spec.flush_cache()
    load = spec.get("/v1/loads?include=all")["loads"][0]
    assert load["num_running_reqs"] == 0 and load["num_waiting_reqs"] == 0
    assert load["num_used_tokens"] == 0, load
    assert "leak" not in spec.log_text().lower()
    assert spec.alive()


def wait_until_idle(server: Server, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        load = server.get("/v1/loads?include=core")["loads"][0]
        if load["num_running_reqs"] + load["num_waiting_reqs"] == 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"still busy after {seconds} s: {load}")


BAD_BODIES: list[dict[str, Any]] = [
    {},
    {"input_ids": [1, 2], "sampling_params": {"temperature": -1}},
    {"input_ids": [1, 2], "sampling_params": {"top_p": 0}},
    {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": -3}},
    {"input_ids": [1, 2], "sampling_params": {"no_such_option": 1}},
    {"input_ids": [100000], "sampling_params": {"max_new_tokens": 2}},
    {"input_ids": [1] * 600, "sampling_params": {"max_new_tokens": 2}},
    {"text": "x", "sampling_params": {"regex": "("}},
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_malformed_requests_get_plains_answer(
    spec: Server, server: Callable[[str], Server], body: dict[str, Any]
) -> None:
    mine = spec.request("POST", "/generate", json=body)
    theirs = server("plain").request("POST", "/generate", json=body)
    assert mine.status_code == theirs.status_code
    assert spec.alive() and server("plain").alive()


def test_policy_endpoint_refuses_what_is_wrong(spec: Server, server: Callable[[str], Server]) -> None:
    """One line per mistake, the policy in force unchanged; 409 while requests run; 404 without speculation."""
    spec.fixed(3)
    for changes, part in (
        ({"gamma": 99}, "gamma"),
        ({"policy": "best"}, "policy"),
        ({"gama": 3}, "did you mean gamma"),
        ({"group_size": 64}, "fixed at start"),
    ):
        reply = spec.request("POST", "/er/policy", json=changes)
        assert reply.status_code == 400 and part in reply.json()["error"], reply.text
    assert spec.request("POST", "/er/policy", data=b"{").status_code == 400
    assert spec.state()["policy"] == {"policy": "fixed", "gamma": 3}
    thread = threading.Thread(target=spec.generate, args=(prompt(1), {**GREEDY, "max_new_tokens": 400}))
    thread.start()
    answers = set()
    while thread.is_alive():  # it may not have begun at the first, nor be running at the last
        answers.add(spec.request("POST", "/er/policy", json={"gamma": 1}).status_code)
        time.sleep(0.02)
    assert 409 in answers <= {200, 409}
    assert server("plain").request("POST", "/er/policy", json={"gamma": 1}).status_code in (400, 404)


def test_server_info_shows_config_and_epochs(spec: Server) -> None:
    shown = spec.get("/server_info")["internal_states"][0]["sglang_er"]
    assert shown["config"]["values"]["gamma_max"] == 7
    assert shown["twin"]["weight_epoch"] >= 1 and "twin_epoch" in shown["twin"]
    assert shown["twin"]["layers_kept_exact"] == []
