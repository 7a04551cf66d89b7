"""C12-C16: weights as trainers send them, and the draft after them."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sglang_er.rollout.conformance import bodies, replies, sender
from sglang_er.rollout.conformance.check import Check, NotHere, expect
from sglang_er.rollout.conformance.generation import exact_greedy, own_logprobs
from sglang_er.rollout.conformance.session import Measured, Session

UPDATES = 5
# Accepted drafts per step, as a share of what they were before: the same weights again, and other weights.
RECOVERED, KEPT = 0.9, 0.5
# Below this the draft is of no use even when fresh, and its loss cannot be seen.
LEAST_GAIN = 0.2


def gain(measured: Measured) -> float:
    """Accepted drafts per step; 0 where the server does not speculate."""
    return 0.0 if measured.accept_length is None else measured.accept_length - 1


def is_own_again(session: Session, what: str) -> str:
    """The server answers and drafts as it did on its own weights before any update."""
    fresh, now = session.measure_own(), session.measure()
    if session.tolerance < 0.01:
        expect(now.ids == fresh.ids, "L6", f"{what}: greedy answers are not those of these weights")
    else:
        for index, output in enumerate(now.ids):
            exact_greedy(session, session.prompt(900 + index, 20), output, what)
    if gain(fresh) < LEAST_GAIN:
        return "the accept length says nothing here"
    expect(
        gain(now) >= RECOVERED * gain(fresh),
        "L8",
        f"{what}: accept length {now.accept_length:.2f}, {fresh.accept_length:.2f} when these weights were fresh",
    )
    return f"accept length {now.accept_length:.2f}, fresh {fresh.accept_length:.2f}"


def from_other_to_own(session: Session, send: Callable[[Path, str], None], what: str) -> str:
    """The server is brought to the other weights, draft included; `send` brings its own back."""
    other, own = session.other_weights(), session.local_weights(session.own_weights)
    fresh = session.measure_own()
    session.load(other, "conformance-other")
    moved = session.measure()
    expect(moved.ids != fresh.ids, "L6", "update_weights_from_disk changed nothing (are both checkpoints the same?)")
    version = f"conformance-{uuid.uuid4().hex[:6]}"
    with session.paused():
        session.flush_paused()
        send(own, version)
    expect(session.version() == version, "L6", f"{what}: weight_version is {session.version()}, {version} was sent")
    return is_own_again(session, what)


def send_tensors(session: Session, folder: Path, version: str, wanted: Callable[[int], bool] = bool) -> None:
    """A checkpoint as flattened buckets, an empty one first. `wanted(i)`: whether the i-th tensor (from 1) is sent."""
    by = session.sender()
    session.touch()
    copies = int(session.info.get("tp_size") or 1)

    def post(bucket: sender.NamedTensors) -> None:
        body = {
            "serialized_named_tensors": [by.bucket(bucket)] * copies,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": version,
        }
        reply = session.post("/update_weights_from_tensor", body)
        expect(reply.get("success") is True, "contract", f"/update_weights_from_tensor: {reply}")

    post([])
    count = 0
    for bucket in sender.buckets_of(folder):
        chosen = [pair for i, pair in enumerate(bucket, start=count + 1) if wanted(i)]
        count += len(bucket)
        if chosen:
            post(chosen)


def broadcast(session: Session, folder: Path, version: str, group: str) -> None:
    """A checkpoint over a gloo group, in buckets: init, broadcasts, destroy."""
    by = session.sender()
    session.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = int(session.info.get("tp_size") or 1)
    if ranks > 1:
        raise NotHere(f"--tp-size {ranks}: this program brings one rank for one rank of the server")
    where = {"master_address": "127.0.0.1", "master_port": str(port), "rank_offset": 1, "world_size": 2}
    joined = session.call("/init_weights_update_group", {**where, "group_name": group, "backend": "gloo"})
    _not_refused(session, joined)
    mine = by.group(group, port)
    _succeeded(joined.result())
    for bucket in sender.buckets_of(folder):
        body = {**sender.described(bucket), "group_name": group, "flush_cache": False, "weight_version": version}
        received = session.call("/update_weights_from_distributed", body)
        _not_refused(session, received)
        by.broadcast(mine, bucket)
        _succeeded(received.result())
    left = session.call("/destroy_weights_update_group", {"group_name": group})
    by.leave(mine)
    _succeeded(left.result())


def _not_refused(session: Session, answer: Future[Any]) -> None:
    """Nobody would receive what is sent to a server that refused at once, and the sender would wait for long."""
    if session.settled(answer, seconds=0.5):
        _succeeded(answer.result())


def _succeeded(reply: Any) -> None:
    expect(reply.get("success") is True, "contract", f"weights over a process group: {reply}")


def tensor_session(session: Session) -> str | None:
    """C12."""

    def send(folder: Path, version: str) -> None:
        session.post("/begin_weight_update", {"selector": "target"})
        send_tensors(session, folder, version)
        session.post("/end_weight_update")

    return from_other_to_own(session, send, "tensors in a session")


def tensors_alone(session: Session) -> str | None:
    """C13."""
    return from_other_to_own(
        session,
        lambda folder, version: send_tensors(session, folder, version),
        "tensors without begin_weight_update, as slime and AReaL send them",
    )


def distributed(session: Session) -> str | None:
    """C14."""
    group = f"slime-pp_{uuid.uuid4().hex[:4]}"

    def send(folder: Path, version: str) -> None:
        for _ in range(2):  # the group's name can be used again
            session.post("/begin_weight_update", {"selector": "target"})
            broadcast(session, folder, version, group)
            session.post("/end_weight_update")

    return from_other_to_own(session, send, "broadcast over gloo")


def draft_follows(session: Session) -> str | None:
    """C15."""
    other, fresh = session.other_weights(), session.measure_own()
    if not session.speculates():
        raise NotHere("the server does not speculate")
    if gain(fresh) < LEAST_GAIN:
        raise NotHere(f"accept length {fresh.accept_length} on fresh weights: the draft is of no use here")
    lengths = [fresh.accept_length]
    for update in range(1, UPDATES + 1):
        back = update % 2 == 0
        session.load(session.own_weights if back else other, f"conformance-{update}")
        now = session.measure()
        lengths.append(now.accept_length)
        expect(
            gain(now) >= (RECOVERED if back else KEPT) * gain(fresh),
            "L8",
            f"accept length {fresh.accept_length:.2f} before, {now.accept_length:.2f} after update {update}: "
            "the draft does not follow the policy",
        )
    return "accept lengths " + ", ".join(f"{length:.2f}" for length in lengths if length)


def partial(session: Session) -> str | None:
    """C16."""
    other = session.local_weights(session.other_weights())
    fresh = session.measure_own()
    with session.paused():
        session.flush_paused()
        session.post("/begin_weight_update", {"selector": "target"})
        send_tensors(session, other, "conformance-half", lambda i: i % 2 == 0)
        session.post("/end_weight_update")
    now = session.measure()
    expect(now.ids != fresh.ids, "L6", "half of the other checkpoint's tensors changed nothing")
    for index, output in enumerate(now.ids):
        exact_greedy(session, session.prompt(900 + index, 20), output, "half of the tensors updated")
    prompt = session.prompt(9)
    reply = session.generate(bodies.slime(prompt, 48, ignore_eos=True))
    replies.aligned(reply, "half of the tensors updated", 48)
    own_logprobs(session, prompt, reply, "half of the tensors updated")
    return None


CHECKS = (
    Check("C12", "tensors in flattened buckets, within a session", tensor_session),
    Check("C13", "the same without begin and end", tensors_alone),
    Check("C14", "broadcast to a process group, twice", distributed),
    Check("C15", f"the draft follows {UPDATES} updates", draft_follows),
    Check("C16", "half of the tensors updated", partial),
)
