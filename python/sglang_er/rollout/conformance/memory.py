"""C17 and C18: sleeping and waking."""

from __future__ import annotations

import time

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Check, expect
from sglang_er.rollout.conformance.session import Session
from sglang_er.rollout.conformance.weight_sync import is_own_again
from sglang_er.rollout.errors import RolloutError

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


def sleep_and_wake(session: Session) -> str | None:
    """C17: slime's order, in which generation continues before KV pool and graphs are back."""
    session.other_weights()  # the user agrees to a change of weights: those that wake up may be garbage
    session.measure_own()
    session.wait_idle()
    session.flush()
    session.touch()
    session.post(RELEASE)
    session.post(RELEASE, promise="L8")
    session.post(RESUME, {"tags": ["weights"]}, "L8")
    with session.paused():
        session.flush_paused()
        session.load(session.own_weights, "conformance-awake")
    session.post(RESUME, {"tags": ["kv_cache", "cuda_graph"]}, "L8")
    notes = [is_own_again(session, "after sleep, update and wake")]
    if session.options.destructive or session.ours:
        session.survives(lambda: session.post(RESUME, {}, "L8"), "L8", "a second resume ended the server")
    else:
        notes.append("resume twice not tried: it ends a stock server (--destructive)")
    if not session.info.get("enable_memory_saver"):
        notes.append("no memory saver: only the order of the calls was seen")
    return "; ".join(notes)


def release_while_busy(session: Session) -> str | None:
    """C18."""
    session.draft()
    running = session.begin(bodies.greedy(session.prompt(7), session.long))
    running.begun.wait(10)

    def release() -> int:
        status = session.send("POST", RELEASE, {}).status_code
        time.sleep(1.0)
        return status

    status = session.survives(release, "L8", "release_memory_occupation while a request ran ended the server")
    if status == 200:
        # It was late: nothing ran any more, and the memory is released.
        session.post(RESUME)
    reply = running.reply.result()
    replies.aligned(reply, "the request that ran", session.long)
    expect(status != 200 or replies.finish(reply) == "length", "L8", "release answered 200 and cut a request")
    try:
        session.generate(bodies.greedy(session.prompt(7), 4))
    except RolloutError as error:
        expect(False, "L8", f"the server does not answer after a refused release: {error}")
    return f"answered {status}"


CHECKS = (
    Check("C17", "release, resume weights, update, continue, resume the rest", sleep_and_wake),
    Check("C18", "release while a request runs", release_while_busy, destructive=True),
)
