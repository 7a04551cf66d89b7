"""Hypothesis: our servers keep every promise that RL trainers rely on.

Method: the suite of `sglang-er conformance`, check by check, on the shared servers. Symptom of a defect: the check's
own line, which names the promise. What a check must be able to see is in test_controls.py.
"""

from __future__ import annotations

import pytest

from sglang_er.rollout.conformance import suite
from sglang_er.rollout.conformance.check import by_id
from sglang_er.rollout.conformance.session import Session

pytestmark = pytest.mark.server

# Few requests at once, no tokenizer, and no harm if it ends.
ON_AREAL = ("C08", "C17", "C19", "C18")
# What a running server cannot show (test_launch.py), and what needs GPUs.
NOT_HERE = ("C24", "C25", "C26", "C29")
ON_SPEC = tuple(check.id for check in suite.CHECKS if check.id not in (*ON_AREAL, *NOT_HERE))


def outcome_of(session: Session, name: str) -> tuple[str, str]:
    (check,) = by_id(suite.CHECKS, [name])
    found = suite.run_one(session, check)
    print(f"{name} {found.status} in {found.seconds:.1f} s: {found.reason}")
    return found.status, found.reason


def test_the_suite_has_every_check() -> None:
    assert [check.id for check in suite.CHECKS] == [f"C{number:02d}" for number in range(1, 30)]


@pytest.mark.parametrize("name", ON_SPEC)
def test_check(on_spec: Session, name: str) -> None:
    assert outcome_of(on_spec, name)[0] == "passed"


@pytest.mark.parametrize("name", ON_AREAL)
def test_check_on_areals_server(on_areal: Session, name: str) -> None:
    assert outcome_of(on_areal, name)[0] == "passed"


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_cannot_be_seen_is_skipped_with_the_reason(on_spec: Session, name: str) -> None:
    status, reason = outcome_of(on_spec, name)
    assert status == "skipped" and reason
    if name == "C29":
        pytest.skip(reason)
