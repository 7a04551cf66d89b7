"""C01-C06: what a request gets back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Check, NotHere, expect
from sglang_er.rollout.conformance.session import Session

TOKENS = 48
CONCURRENT = 64


def exact_greedy(session: Session, prompt: Sequence[int], output: Sequence[int], what: str) -> None:
    """Every token is the policy's most likely one, up to the rounding between decoding and scoring."""
    short = [best - own for own, best in zip(*session.score(prompt, output))]
    worst = max(range(len(short)), key=lambda i: short[i])
    expect(
        short[worst] <= session.tolerance,
        "exact",
        f"{what}: greedy token {worst} is {short[worst]:.3f} nats less likely than the best one",
    )


def own_logprobs(session: Session, prompt: Sequence[int], reply: replies.Reply, what: str) -> None:
    """The logprobs of a reply at temperature 1 are those that scoring gives."""
    returned = replies.logprobs(reply)
    scored, _ = session.score(prompt, replies.output_ids(reply))
    gaps = [abs(a - b) for a, b in zip(returned, scored)]
    worst = max(range(len(gaps)), key=lambda i: gaps[i])
    expect(
        gaps[worst] <= session.tolerance,
        "L2",
        f"{what}: the logprob of token {worst} is {returned[worst]:.4f}, scored {scored[worst]:.4f}",
    )


def tempered_logprobs(
    session: Session, prompt: Sequence[int], reply: replies.Reply, temperature: float, what: str
) -> None:
    """Scoring knows no temperature, but a token's distance to the best one is 1/T of what it is at T = 1."""
    returned = replies.logprobs(reply)
    tops = [float(entry[0][0]) for entry in reply["meta_info"]["output_top_logprobs"]]
    scored, best = session.score(prompt, replies.output_ids(reply))
    for index, (own, top, own_1, top_1) in enumerate(zip(returned, tops, scored, best)):
        got, due = top - own, (top_1 - own_1) / temperature
        expect(
            abs(got - due) <= 2 * session.tolerance / temperature,
            "L2",
            f"{what}: token {index} is {got:.4f} nats below the best one, {due:.4f} by scoring",
        )


def rollout_requests(session: Session) -> str | None:
    """C01."""
    prompt = session.prompt(1)
    session.draft()
    for name, body in (
        ("slime's request", bodies.slime(prompt, TOKENS)),
        ("AReaL's request", bodies.areal(prompt, TOKENS)),
    ):
        replies.aligned(session.generate(body), name, TOKENS)
    for seed in (1, 2, 3):
        prompt = session.prompt(seed)
        session.draft()
        reply = session.generate(bodies.greedy(prompt, TOKENS))
        replies.aligned(reply, "AReaL's greedy request", TOKENS)
        expect(replies.finish(reply) == "length", "contract", f"ignore_eos, yet finished by {replies.finish(reply)}")
        exact_greedy(session, prompt, replies.output_ids(reply), "AReaL's greedy request")
        session.draft(0)
        plain = session.generate(bodies.greedy(prompt, TOKENS))
        exact_greedy(session, prompt, replies.output_ids(plain), "plain decode")
        if session.tolerance < 0.01:
            same = replies.output_ids(plain) == replies.output_ids(reply)
            expect(same, "exact", "greedy decoding with and without drafts differs")
    return None


def scoring(session: Session) -> str | None:
    """C02."""
    prompt = session.prompt(4, 40)
    session.wait_idle()
    before = session.counters()
    reply = session.generate(bodies.scoring(prompt))
    meta = reply["meta_info"]
    scored = meta["input_token_logprobs"]
    expect(len(scored) == len(prompt), "L11", f"{len(scored)} input_token_logprobs for {len(prompt)} tokens")
    expect(scored[0][0] is None, "L11", f"the first token has a logprob: {scored[0]}")
    expect([entry[1] for entry in scored] == prompt, "L11", "input_token_logprobs are of other tokens")
    expect(not reply.get("output_ids") and meta["completion_tokens"] == 0, "L11", "scoring generated tokens")
    expect(not meta.get("spec_verify_ct"), "L11", f"scoring took {meta.get('spec_verify_ct')} verify steps")
    after = session.counters()
    if before and after:
        expect(after["drafted_tokens"] == before["drafted_tokens"], "L11", "scoring made drafts")
    return None


def rescored(session: Session) -> str | None:
    """C03."""
    gammas: tuple[int | None, ...] = (0, min(7, session.gamma_max()), None) if session.ours else (None,)
    for gamma in gammas:
        session.wait_idle()
        session.draft(gamma)
        drafts = "changing drafts" if gamma is None else f"drafts of {gamma}"
        for index in range(3):
            prompt = session.prompt(30 + index, 10 + 9 * index)
            reply = session.generate(bodies.slime(prompt, TOKENS, ignore_eos=True))
            replies.aligned(reply, f"T = 1, {drafts}", TOKENS)
            own_logprobs(session, prompt, reply, f"T = 1, {drafts}")
            body = bodies.slime(prompt, TOKENS, temperature=0.7, ignore_eos=True) | {"top_logprobs_num": 1}
            reply = session.generate(body)
            replies.aligned(reply, f"T = 0.7, {drafts}", TOKENS)
            tempered_logprobs(session, prompt, reply, 0.7, f"T = 0.7, {drafts}")
    return None


def stops(session: Session) -> str | None:
    """C04."""
    prompt, most = session.prompt(5), max(3, session.gamma_max())
    session.draft(0)
    # SGLang's ignore_eos ignores stop tokens too: this one may end by the model's own end of text.
    full = session.generate(bodies.slime(prompt, TOKENS, temperature=0.0))
    replies.aligned(full, "slime's greedy request", TOKENS)
    tokens = replies.output_ids(full)
    session.draft(most)
    for budget in range(1, most + 3):
        reply = session.generate(bodies.greedy(prompt, budget))
        replies.aligned(reply, f"max_new_tokens {budget}", budget)
        count = reply["meta_info"]["completion_tokens"]
        expect(count == budget, "L3", f"max_new_tokens {budget}: {count} tokens, finish {replies.finish(reply)}")
        expect(replies.finish(reply) == "length", "L3", f"max_new_tokens {budget}: finish {replies.finish(reply)}")
    for stop in sorted({token: i for i, token in reversed(list(enumerate(tokens)))}.items(), key=lambda e: e[1])[:6]:
        body = bodies.slime(prompt, TOKENS, temperature=0.0, stop_token_ids=[stop[0]])
        _stopped(session.generate(body), stop[1] + 1, stop[0], f"stop token at {stop[1]}")
    return _stop_string(session, prompt, full)


def _stopped(reply: replies.Reply, count: int, matched: object, what: str) -> None:
    replies.aligned(reply, what, TOKENS)
    reason, found = reply["meta_info"]["finish_reason"], reply["meta_info"]["completion_tokens"]
    expect(reason == {"type": "stop", "matched": matched}, "L1", f"{what}: finish_reason {reason}")
    expect(found == count, "L1", f"{what}: {found} tokens, {count} up to the stop")


def _stop_string(session: Session, prompt: Sequence[int], full: replies.Reply) -> str | None:
    text = full.get("text")
    if not text:
        return "no text (no tokenizer): stop strings not tried"
    # A part of the text that appears once and whose end is a token's end is found by asking plain decode.
    stop = next((text[i : i + 2] for i in range(len(text) // 3, len(text) - 2) if _good(text, text[i : i + 2])), None)
    if stop is None:
        return "no printable text to stop at: stop strings not tried"
    for trim in (False, True):
        body = bodies.slime(prompt, TOKENS, temperature=0.0, stop=[stop], no_stop_trim=not trim)
        reply = session.generate(body)
        what = f"stop string, {'trimmed' if trim else 'kept'}"
        _stopped(reply, reply["meta_info"]["completion_tokens"], stop, what)
        ids, end = replies.output_ids(reply), text.index(stop)
        expect(ids == replies.output_ids(full)[: len(ids)], "exact", f"{what}: other tokens than without the stop")
        given, due = reply["text"], text[:end] if trim else text[: end + len(stop)]
        expect(given.startswith(text[:end]), "L1", f"{what}: the text is not the one without the stop")
        expect(not trim or given == due, "L1", f"{what}: text goes on after the stop: {given[len(due) :]!r}")
    return None


def _good(text: str, part: str) -> bool:
    return part.isascii() and part.isprintable() and text.count(part) == 1 and not part.isspace()


def concurrent(session: Session) -> str | None:
    """C05."""
    session.draft()
    kinds: list[tuple[str, Any]] = [
        ("slime", lambda p: bodies.slime(p, TOKENS)),
        ("AReaL", lambda p: bodies.areal(p, TOKENS, top_p=0.9)),
        ("greedy", lambda p: bodies.greedy(p, TOKENS)),
        ("penalised", lambda p: bodies.areal(p, TOKENS, frequency_penalty=0.7)),
    ]
    prompts = [session.prompt(50 + i, 4 + i) for i in range(CONCURRENT)]
    named = [(kinds[i % 4][0], kinds[i % 4][1](prompt)) for i, prompt in enumerate(prompts)]
    got = session.all([body for _, body in named])
    for (name, _), reply in zip(named, got):
        replies.aligned(reply, f"{name} among {CONCURRENT}", TOKENS)
    for prompt, reply in list(zip(prompts, got))[2::16]:
        exact_greedy(session, prompt, replies.output_ids(reply), f"greedy among {CONCURRENT}")
    return None


def streamed(session: Session) -> str | None:
    """C06."""
    session.draft(min(3, session.gamma_max()))
    body = bodies.slime(session.prompt(6), TOKENS, temperature=0.0, ignore_eos=True)
    whole = session.generate(body)
    before: list[Any] = []
    chunk: replies.Reply = {}
    count = 0
    for count, chunk in enumerate(session.stream(body), start=1):
        entries = [entry[:2] for entry in chunk["meta_info"]["output_token_logprobs"]]
        expect(
            entries[: len(before)] == before, "L1", f"chunk {count} does not repeat the {len(before)} tokens before it"
        )
        before = entries
    if count < 2:
        raise NotHere("the server sent the whole answer in one chunk")
    replies.aligned(chunk, "the last chunk", TOKENS)
    expect(replies.output_ids(chunk) == replies.output_ids(whole), "L1", "streamed and plain answers differ")
    return None


CHECKS = (
    Check("C01", "slime's and AReaL's requests; greedy is exact", rollout_requests),
    Check("C02", "scoring a prompt drafts nothing", scoring),
    Check("C03", "logprobs equal those of scoring, T = 1 and 0.7", rescored),
    Check("C04", "stops and budgets inside an accepted run", stops),
    Check("C05", f"{CONCURRENT} mixed requests at once", concurrent),
    Check("C06", "a stream is cumulative and ends as the plain answer", streamed),
)
