"""C07-C11: aborts, pauses, and updates while requests run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import wait

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Check, NotHere, expect
from sglang_er.rollout.conformance.connection import IDLE_TIMEOUT_S, Running
from sglang_er.rollout.conformance.generation import exact_greedy, own_logprobs
from sglang_er.rollout.conformance.replies import Reply
from sglang_er.rollout.conformance.session import Session

IN_FLIGHT = 4
# A request may end before an interruption reaches it; then the same is tried again.
TRIES = 4
MOST_QUEUED = 96
NEW_VERSION = "conformance-new"


def in_flight(session: Session, prefix: str = "") -> list[Running]:
    """Long greedy requests of which some tokens are there."""
    session.draft()
    found = []
    for index in range(IN_FLIGHT):
        body = bodies.greedy(session.prompt(70 + index), session.long)
        found.append(session.begin(body | ({"rid": f"{prefix}{index}"} if prefix else {})))
    for running in found:
        running.begun.wait(IDLE_TIMEOUT_S)
    return found


def aborted(reply: Reply, what: str) -> bool:
    """Whether the request was cut short, in the shape that trainers look for."""
    replies.aligned(reply, what)
    if replies.finish(reply) != "abort":
        return False
    message = reply["meta_info"]["finish_reason"]["message"]
    expect("abort" in str(message).lower(), "contract", f"{what}: the abort says {message!r}")
    return bool(reply["meta_info"]["completion_tokens"])


def until_interrupted(attempt: Callable[[], int]) -> None:
    """`attempt` tells how many requests were interrupted with tokens; raises NotHere if it never is one."""
    for _ in range(TRIES):
        if attempt():
            return
    raise NotHere("every request ended before it could be interrupted: this server is too fast for its context length")


def abort(session: Session) -> str | None:
    """C07."""

    def one() -> int:
        prefix = uuid.uuid4().hex
        running = in_flight(session, prefix)
        session.post("/abort_request", {"rid": f"{prefix}0"})
        first = aborted(running[0].reply.result(), "abort_request by rid")
        # The others go on until they are aborted too.
        session.post("/abort_request", {"abort_all": True})
        rest = [aborted(r.reply.result(), "abort_request of all") for r in running[1:]]
        session.wait_idle("L1")
        return int(first and any(rest))

    until_interrupted(one)
    return None


def abort_queued(session: Session) -> str | None:
    """C08."""
    states = session.info.get("internal_states") or [{}]
    limit = states[0].get("effective_max_running_requests_per_dp") or session.info.get("max_running_requests") or 0
    if not limit or limit + 8 > MOST_QUEUED:
        raise NotHere(f"{limit or 'unlimited'} requests run at once: start the server with --max-running-requests 8")
    session.draft()
    futures = [session.start(bodies.slime(session.prompt(i), session.long, ignore_eos=True)) for i in range(limit + 8)]
    session.wait_running(limit)
    waiting = sum(load["num_waiting_reqs"] for load in session.loads())
    session.post("/abort_request", {"abort_all": True})
    got = [future.result() for future in futures]
    empty = 0
    for reply in got:
        replies.aligned(reply, "aborted with a full queue", session.long)
        empty += not reply["meta_info"]["completion_tokens"]
    expect(empty, "contract", f"{waiting} requests waited, yet every aborted one has tokens")
    session.wait_idle("L1")
    return f"{empty} of {len(got)} were aborted while queued"


def pause_abort(session: Session) -> str | None:
    """C09."""
    other, prompt = session.other_weights(), session.prompt(8)
    session.measure_own()
    old = session.version()
    before = replies.output_ids(session.generate(bodies.greedy(prompt, 16)))

    def one() -> int:
        running = in_flight(session)
        with session.paused():
            done = wait([r.reply for r in running], timeout=1.0)
            expect(not done.not_done, "L4", f"pause returned, and {len(done.not_done)} requests were still in flight")
            queued = session.start(bodies.greedy(prompt, 16))
            time.sleep(0.5)
            expect(not queued.done(), "L4", "a request sent while paused was answered before continue")
            session.load(other, NEW_VERSION)
        reply = queued.result()
        replies.aligned(reply, "sent while paused", 16)
        versions = replies.spans(reply, "sent while paused")
        expect([v for v, _, _ in versions] == [NEW_VERSION], "L6", f"sent while paused: versions {versions}")
        output = replies.output_ids(reply)
        exact_greedy(session, prompt, output, "first request after the update")
        expect(output != before, "L6", "the answer is that of the old weights (are both checkpoints the same?)")
        cut = [r.reply.result() for r in running]
        count = sum(aborted(reply, "in flight at a pause") for reply in cut)
        for reply in cut:
            spans = replies.spans(reply, "in flight at a pause")
            expect({v for v, _, _ in spans} <= {old}, "L6", f"aborted before the update, yet {spans}")
        session.load(session.own_weights, old)
        return count

    until_interrupted(one)
    return None


def pause_retract(session: Session) -> str | None:
    """C10."""
    return _across_an_update(session, "retract")


def pause_in_place(session: Session) -> str | None:
    """C11."""
    return _across_an_update(session, "in_place")


def _across_an_update(session: Session, mode: str) -> str | None:
    other = session.other_weights()
    session.measure_own()
    old = session.version()
    flushed = 200 if mode == "retract" else 400

    def one() -> int:
        running = in_flight(session)
        with session.paused(mode=mode):
            status = session.send("POST", "/flush_cache").status_code
            busy = any(not r.reply.done() for r in running)
            expect(status == flushed or not busy, "L5", f"flush_cache in a {mode} pause: {status}, not {flushed}")
            session.load(other, NEW_VERSION, **({} if mode == "retract" else {"flush_cache": False}))
        got = [r.reply.result() for r in running]
        crossed = [i for i, reply in enumerate(got) if _crossed(reply, session.long, old, mode)]
        if mode == "retract":
            for index in crossed:
                _new_policy_goes_on(session, session.prompt(70 + index), got[index])
        session.wait_idle()
        # Updated without a flush, the cache holds keys and values of the old weights.
        session.flush()
        session.load(session.own_weights, old)
        return len(crossed)

    until_interrupted(one)
    return None


def _crossed(reply: Reply, budget: int, old: str, mode: str) -> bool:
    """Whether both policies took part in the reply."""
    what = f"across a {mode} pause"
    replies.aligned(reply, what, budget)
    count, finish = reply["meta_info"]["completion_tokens"], replies.finish(reply)
    expect((count, finish) == (budget, "length"), "L5", f"{what}: {count} of {budget} tokens, finish {finish}")
    versions = [version for version, _, _ in replies.spans(reply, what)]
    expect(versions in ([old], [NEW_VERSION], [old, NEW_VERSION]), "L5", f"{what}: versions {versions}")
    retracted = reply["meta_info"]["num_retractions"]
    expect(mode == "retract" or not retracted, "L5", f"{what}: {retracted} retractions")
    if len(versions) < 2:
        return False
    expect(mode != "retract" or retracted, "L5", f"{what}: num_retractions is {retracted}")
    return True


def _new_policy_goes_on(session: Session, prompt: list[int], reply: Reply) -> None:
    """From the split on, tokens and logprobs are the new policy's, which is loaded now."""
    output, (_, (_, at, _)) = replies.output_ids(reply), replies.spans(reply, "across a pause")
    exact_greedy(session, prompt + output[:at], output[at:], f"after the split at token {at}")
    after = {"meta_info": {"output_token_logprobs": reply["meta_info"]["output_token_logprobs"][at:]}}
    own_logprobs(session, prompt + output[:at], after, f"after the split at token {at}")


CHECKS = (
    Check("C07", "abort by rid, abort all, then idle", abort),
    Check("C08", "abort with a full queue", abort_queued),
    Check("C09", "pause (abort), update from disk, continue", pause_abort),
    Check("C10", "pause (retract), flush, update, continue", pause_retract),
    Check("C11", "pause (in_place), update, continue", pause_in_place),
)
