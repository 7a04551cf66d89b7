"""Records of steps become one entry per committed token, whatever was trimmed, for the requests that ask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.managers.auxiliary_output import CommittedTokens

from sglang_er.config import RolloutConfig
from sglang_er.engine import provenance, provenance_http
from sglang_er.engine.provenance import DRAFT_LOGPROBS, EPOCHS, KEYS, REQUEST_KEY, SOURCES, VERSIONS, StepRecord
from sglang_er.engine.sampler import DraftedChain, StepSampler
from sglang_er.twin.twin import Twin


def request(asks: bool = True) -> Any:
    params = SimpleNamespace(custom_params={REQUEST_KEY: asks})
    return SimpleNamespace(sampling_params=params, customized_info=None)


def batch_of(*requests: Any) -> Any:
    return SimpleNamespace(reqs=list(requests))


def committed(index: int, count: int) -> CommittedTokens:
    return CommittedTokens(index, tuple(range(count)))


def drafted_record(accept_lens: list[int], gamma: int, rows: list[int] | None = None, **fields: Any) -> StepRecord:
    """Logprob of draft j of speculating row i: -(10 i + j)."""
    count = len(accept_lens if rows is None else rows)
    logprobs = -(10.0 * torch.arange(count)[:, None] + torch.arange(gamma))
    record = StepRecord(True, "plain", 4, "v4", rows, logprobs, torch.tensor(accept_lens, dtype=torch.int32))
    return provenance.replace(record, **fields)


@pytest.mark.parametrize(
    ("accept_len", "gamma", "sources"),
    [
        (1, 1, ["resampled"]),
        (2, 1, ["draft", "bonus"]),
        (1, 3, ["resampled"]),
        (3, 3, ["draft", "draft", "resampled"]),
        (4, 3, ["draft", "draft", "draft", "bonus"]),
    ],
)
def test_the_last_token_of_a_chain_says_whether_a_draft_was_rejected(accept_len: int, gamma: int, sources: list[str]):
    assert provenance.chain_sources(accept_len, gamma) == sources


def test_tokens_behind_a_stop_leave_no_entry():
    """Three rows accept all, two of three and none; the first one stops after two tokens."""
    reqs = [request() for _ in range(3)]
    drafted_record([4, 3, 1], gamma=3).consume(batch_of(*reqs), [committed(0, 2), committed(0, 3), committed(0, 1)])
    assert [req.customized_info[SOURCES] for req in reqs] == [
        ["draft", "draft"],
        ["draft", "draft", "resampled"],
        ["resampled"],
    ]
    assert [req.customized_info[DRAFT_LOGPROBS] for req in reqs] == [[0.0, -1.0], [-10.0, -11.0, None], [None]]
    assert [len(req.customized_info[key]) for req in reqs for key in KEYS] == [2] * 4 + [3] * 4 + [1] * 4


def test_rows_that_were_not_drafted_for_are_plain():
    reqs = [request() for _ in range(3)]
    record = drafted_record([1, 3, 1], gamma=2, rows=[1])
    record.consume(batch_of(*reqs), [committed(5, 1), committed(0, 3), committed(0, 1)])
    assert [req.customized_info[SOURCES] for req in reqs] == [["plain"], ["draft", "draft", "bonus"], ["plain"]]
    assert reqs[1].customized_info[DRAFT_LOGPROBS] == [0.0, -1.0, None]


def test_every_token_keeps_the_version_it_was_sampled_under():
    req = request()
    StepRecord(True, "prefill", 1, "one").consume(batch_of(req), [committed(0, 1)])
    drafted_record([2], gamma=3, epoch=1, version="one").consume(batch_of(req), [committed(1, 2)])
    StepRecord(True, "prefill", 3, "two").consume(batch_of(req), [committed(3, 1)])
    assert req.customized_info[SOURCES] == ["prefill", "draft", "resampled", "prefill"]
    assert req.customized_info[EPOCHS] == [1, 1, 1, 3]
    assert req.customized_info[VERSIONS] == ["one", "one", "one", "two"]


def test_tokens_that_a_retraction_discards_are_overwritten():
    """SGLang restarts a retracted request that was given embeddings from nothing."""
    req = request()
    StepRecord(True, "prefill", 1, "one").consume(batch_of(req), [committed(0, 1)])
    StepRecord(True, "plain", 1, "one").consume(batch_of(req), [committed(1, 1)])
    StepRecord(True, "prefill", 2, "two").consume(batch_of(req), [committed(0, 1)])
    assert req.customized_info == {SOURCES: ["prefill"], DRAFT_LOGPROBS: [None], EPOCHS: [2], VERSIONS: ["two"]}


def test_only_requests_that_ask_get_entries_and_always_get_lists():
    asking, other = request(), request(asks=False)
    record = StepRecord(False, "prefill", 1, "default")
    record.consume(batch_of(asking, other), [None, committed(0, 1)])
    assert other.customized_info is None
    assert asking.customized_info == {key: [] for key in KEYS}


def test_tensors_of_a_record_are_copied_by_sglang():
    copied: list[torch.Tensor] = []
    record = drafted_record([2, 1], gamma=1).copy_to_host(lambda tensor: copied.append(tensor) or tensor.clone())
    assert [tensor.shape for tensor in copied] == [(2, 1), (2,)]
    assert record.logprobs is not copied[0] and record.accept_lens is not copied[1]
    plain = StepRecord(True, "plain", 1, "default")
    assert plain.copy_to_host(lambda tensor: pytest.fail("nothing to copy")) is plain


@pytest.mark.parametrize(("mode", "wanted"), [("off", [False, False]), ("request", [False, True]), ("all", [True] * 2)])
def test_the_option_decides_who_is_recorded(mode: str, wanted: list[bool], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime_context, "get_serving", lambda: SimpleNamespace(weight_version="7"))
    recorder = provenance.Provenance(Twin(weight_epoch=9), RolloutConfig(provenance=mode))
    for batch, expected in zip((batch_of(request(False)), batch_of(request(False), request())), wanted):
        result: Any = SimpleNamespace(logits_output=SimpleNamespace(auxiliary_device_output=None))
        recorder.attach(batch, result, "plain")
        record = result.logits_output.auxiliary_device_output
        assert (record is not None) == recorder.wanted(batch) == expected
        if expected:
            assert (record.undrafted, record.epoch, record.version) == ("plain", 9, "7")


def sampler(temperatures: list[float], greedy: bool = False, top_k: int = 1 << 30) -> StepSampler:
    rows = len(temperatures)
    info: Any = SimpleNamespace(
        is_all_greedy=greedy,
        temperatures=torch.tensor(temperatures)[:, None],
        top_ps=torch.ones(rows),
        top_ks=torch.full((rows,), top_k, dtype=torch.int32),
        min_ps=torch.zeros(rows),
        need_top_p_sampling=False,
        need_top_k_sampling=top_k < 1 << 30,
        need_min_p_sampling=False,
        sampling_seed=None,
    )
    return StepSampler(info, None)


def scored(sampler: StepSampler, logits: torch.Tensor) -> tuple[torch.Tensor, DraftedChain]:
    drafted = DraftedChain()
    sampler.draft(logits, torch.zeros(len(logits), dtype=torch.int64), drafted)
    sampler.score(logits, drafted)
    return drafted.logprobs[0], drafted


def test_the_score_of_a_draft_is_its_logprob_under_what_it_was_drawn_from():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * 3
    found, drafted = scored(sampler([0.7] * 32 + [1.3] * 32), logits)
    temperatures = torch.tensor([0.7] * 32 + [1.3] * 32)[:, None]
    expected = torch.log_softmax(logits / temperatures, dim=-1).gather(1, drafted.tokens[0][:, None]).squeeze(1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found, drafted.probs[0].gather(1, drafted.tokens[0][:, None]).log().squeeze(1), atol=1e-5)


def test_filters_do_not_change_the_score():
    """As in the logprobs that SGLang returns: p and q can be compared whatever the request filters."""
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(2)) * 3
    found, drafted = scored(sampler([0.8] * 64, top_k=5), logits)
    expected = torch.log_softmax(logits / 0.8, dim=-1).gather(1, drafted.tokens[0][:, None]).squeeze(1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, drafted.probs[0].gather(1, drafted.tokens[0][:, None]).log().squeeze(1), atol=0.01)


def test_greedy_drafts_are_scored_without_temperature():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    found, _ = scored(sampler([0.5] * 8, greedy=True), logits)
    assert torch.allclose(found, torch.log_softmax(logits, dim=-1).amax(dim=-1), atol=1e-5)


class Manager:
    """What the hooks read of SGLang's TokenizerManager."""

    def __init__(self, state: Any) -> None:
        self.rid_to_state = {"r": state}


def waiting(asks: bool, tokens: int, entries: int) -> Any:
    """The HTTP side's state of a request of which this much has arrived."""
    return SimpleNamespace(
        obj=SimpleNamespace(sampling_params={"custom_params": {REQUEST_KEY: True}} if asks else {}),
        output_ids=list(range(tokens)),
        customized_info_accumulated={key: list(range(entries)) for key in KEYS} if entries else {},
        out_list=[],
    )


@pytest.mark.parametrize(("tokens", "entries", "expected"), [(0, 0, []), (3, 3, [0, 1, 2]), (1, 3, [2])])
def test_an_abort_in_the_queue_has_entries_for_what_it_returns(
    tokens: int, entries: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
):
    """With incremental streaming SGLang returns the last token only."""
    monkeypatch.setattr(provenance_http, "_in_force", lambda: "request")
    for asks in (True, False):
        state = waiting(asks, tokens, entries)

        def finish(manager: Any, aborted: Any, state: Any = state) -> None:
            del manager.rid_to_state[aborted.rid]
            state.out_list.append({"output_ids": state.output_ids, "meta_info": {"id": aborted.rid}})

        provenance_http._complete_abort(finish, Manager(state), SimpleNamespace(rid="r"))
        meta = state.out_list[0]["meta_info"]
        assert {key: meta[key] for key in KEYS if key in meta} == (dict.fromkeys(KEYS, expected) if asks else {})


def test_padding_of_a_neighbours_entries_is_removed(monkeypatch: pytest.MonkeyPatch):
    for mode, asks, kept in (("request", False, False), ("request", True, True), ("all", False, True)):
        monkeypatch.setattr(provenance_http, "_in_force", lambda mode=mode: mode)
        state, meta = waiting(asks, 2, 2), {"id": "r", **{key: [None, None] for key in KEYS}}
        provenance_http._remove_padding(None, Manager(state), meta, state, {}, 0, None)
        assert all((key in meta) == (key in state.customized_info_accumulated) == kept for key in KEYS)


def test_asking_where_it_is_off_is_refused(monkeypatch: pytest.MonkeyPatch):
    asking, other = waiting(True, 0, 0).obj, waiting(False, 0, 0).obj
    for mode in ("off", "request", "all", None):  # None: a server without us
        monkeypatch.setattr(provenance_http, "_in_force", lambda mode=mode: mode)
        provenance_http._refuse_where_off(None, None, other)
        if mode == "off":
            with pytest.raises(ValueError, match="--er-provenance"):
                provenance_http._refuse_where_off(None, None, asking)
        else:
            provenance_http._refuse_where_off(None, None, asking)
