"""C22, C23, C28: the frameworks' own loops, replayed request by request, and the metrics they compute."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Check, NotHere, expect
from sglang_er.rollout.conformance.interruption import until_interrupted
from sglang_er.rollout.conformance.replies import Reply
from sglang_er.rollout.conformance.session import Session

GROUPS, WANTED, SAMPLES = 6, 3, 2
RESUBMITS = 20


@dataclass
class Sample:
    """One response that may take several requests. Versions are tagged by the client, as AReaL does."""

    prompt: list[int]
    budget: int
    tokens: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    done: bool = False
    parts: int = 0

    def body(self, **sampling: Any) -> Mapping[str, Any]:
        return bodies.slime([*self.prompt, *self.tokens], self.budget - len(self.tokens), ignore_eos=True, **sampling)

    def take(self, reply: Reply, version: int = 0) -> None:
        replies.aligned(reply, "a part of a response", self.budget - len(self.tokens))
        added = replies.output_ids(reply)
        self.tokens += added
        self.versions += [version] * len(added)
        self.parts += bool(added)
        self.done = replies.finish(reply) != "abort"


def partial_rollout(session: Session) -> str | None:
    """C22: slime's over-sampling: once enough groups are complete the rest is aborted, kept, and continued later."""
    session.draft()
    groups = [
        [Sample(session.prompt(100 + g), session.long // (1 + (g * SAMPLES + s) % 4)) for s in range(SAMPLES)]
        for g in range(GROUPS)
    ]
    rounds = 0
    while any(not sample.done for group in groups for sample in group):
        rounds += 1
        expect(rounds <= GROUPS, "L4", f"{rounds} rounds, and groups are still not complete")
        _one_round(session, groups)
    for number, group in enumerate(groups):
        for sample in group:
            got = len(sample.tokens)
            expect(got == sample.budget, "L3", f"group {number}: {got} of {sample.budget} tokens after {rounds} rounds")
    most = max(sample.parts for group in groups for sample in group)
    return f"{GROUPS} groups in {rounds} rounds, a response in up to {most} parts; without slime itself"


def _one_round(session: Session, groups: list[list[Sample]]) -> None:
    missing = [sample for group in groups for sample in group if not sample.done]
    open_groups = sum(not all(sample.done for sample in group) for group in groups)
    target = min(WANTED, open_groups)
    futures: dict[Future[Reply], Sample] = {session.start(sample.body()): sample for sample in missing}
    complete_before = sum(all(sample.done for sample in group) for group in groups)
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            futures[future].take(future.result())
        complete = sum(all(sample.done for sample in group) for group in groups)
        if pending and complete - complete_before >= target:
            _abort_until_idle(session)


def _abort_until_idle(session: Session) -> None:
    """slime repeats the abort until its servers report no request."""
    for _ in range(20):
        session.post("/abort_request", {"abort_all": True})
        if not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in session.loads()):
            return
        time.sleep(0.1)
    session.wait_idle("L1")


def interrupted_generation(session: Session) -> str | None:
    """C23: AReaL's loop: a pause aborts, the partial response is sent again with what is left of its budget."""
    session.draft()
    budget = session.long // 2
    notes: list[str] = []

    def one() -> int:
        sample, version = Sample(session.prompt(120), budget), 0
        running = session.begin(bodies.areal(sample.prompt, budget, ignore_eos=True))
        running.begun.wait(10)
        with session.paused():
            version += 1
            sample.take(running.reply.result())
            first = len(sample.tokens)
            resent = None if sample.done else session.start(sample.body())
            time.sleep(0.2)
            expect(resent is None or not resent.done(), "L4", "re-sent while paused, and answered before continue")
        for _ in range(RESUBMITS):
            if resent is None:
                break
            sample.take(resent.result(), version)
            resent = None if sample.done else session.start(sample.body())
        expect(len(sample.tokens) == budget, "L3", f"{len(sample.tokens)} of {budget} tokens after a re-submission")
        notes[:] = [f"{first} tokens of version 0, {budget - first} of version 1; without AReaL itself"]
        return int(0 < first < budget)

    until_interrupted(one)
    return notes[0]


def metrics(session: Session) -> str | None:
    """C28: slime reads the oldest names of SGLang's speculative metrics, verl too; newer ones must be there as well."""
    if not session.speculates():
        raise NotHere("the server does not speculate")
    session.draft(min(3, session.gamma_max()))
    got = session.all([bodies.slime(session.prompt(130 + i), 48, ignore_eos=True) for i in range(8)])
    wanted = ("spec_verify_ct", "spec_accept_length", "spec_num_correct_drafts", "spec_num_proposed_drafts")
    old = ("spec_accept_token_num", "spec_draft_token_num")
    for names, whose in ((wanted, "SGLang 0.5.21's"), (old, "slime's and verl's")):
        missing = [name for name in names if name not in got[0]["meta_info"]]
        expect(not missing, "contract", f"meta_info lacks {', '.join(missing)} ({whose} names)")
    accepted, drafted = (sum(int(reply["meta_info"][name]) for reply in got) for name in old)
    expect(0 < accepted <= drafted, "contract", f"slime computes spec_accept_rate from {accepted} of {drafted}")
    correct = sum(int(reply["meta_info"]["spec_num_correct_drafts"]) for reply in got)
    expect(correct == accepted, "contract", f"spec_accept_token_num says {accepted}, spec_num_correct_drafts {correct}")
    return f"spec_accept_rate {accepted / drafted:.2f}"


CHECKS = (
    Check("C22", "slime's partial rollout with over-sampling", partial_rollout),
    Check("C23", "AReaL's interruptible generation", interrupted_generation),
    Check("C28", "old and new names of speculative metrics", metrics),
)
