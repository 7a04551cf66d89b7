"""What each adapter does in its version's way: on the installed SGLang, and on stand-ins of another's shape."""

from __future__ import annotations

import sys
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_er.engine import compat
from sglang_er.engine.versions import v0_5_15, v0_5_21, v0_5_23
from sglang_er.engine.weight_watch import OPENER, WRITERS, WatchedWeightUpdater

OLD, PINNED, NEW = v0_5_15.Sglang0515(), v0_5_21.Sglang0521(), v0_5_23.Sglang0523()


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """`name` is importable and holds this, whatever is installed."""
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        monkeypatch.setattr(sys.modules[parent], last, made, raising=False)


class Runner:
    """0.5.15's ModelRunner as far as updates go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.written: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in v0_5_15.WRITERS or name in object.__getattribute__(self, "__dict__"):
            return object.__getattribute__(self, name)

        def write(*_: object, **__: object) -> str:
            self.written.append(name)
            if self.error is not None:
                raise self.error
            return name

        return write


# -- 0.5.15.post1 ----------------------------------------------------------------------------------------------------


def test_0515_a_tensor_update_of_the_worker_reaches_the_target() -> None:
    """The scheduler calls the speculative worker instead of the target's; without forwarding the policy stays old."""
    worker, asked = v0_5_15.TargetUpdates(), []
    worker._target_worker = SimpleNamespace(
        update_weights_from_tensor=lambda request: (asked.append(request), (True, "Success"))[1]
    )
    assert worker.update_weights_from_tensor("bucket") == (True, "Success")
    assert asked == ["bucket"]


@pytest.mark.parametrize("way", ["update_weights_from_disk", "update_weights_from_ipc"])
def test_0515_other_updates_do_not_reach_it_twice(way: str) -> None:
    worker = v0_5_15.TargetUpdates()
    worker._target_worker = None
    success, message = getattr(worker, way)("request")
    assert success and message


@pytest.mark.parametrize("way", v0_5_15.WRITERS)
@pytest.mark.parametrize("fails", [False, True])
def test_0515_every_writer_of_the_runner_is_noticed(way: str, fails: bool) -> None:
    runner, changes = Runner(ValueError("half written") if fails else None), []
    watch = OLD.watch_weights(runner, lambda: changes.append(1))
    if fails:
        with pytest.raises(ValueError, match="half written"):
            getattr(runner, way)("argument")
    else:
        assert getattr(runner, way)("argument") == way
    assert (runner.written, changes, watch.session_open) == ([way], [1], False)


def test_0515_a_runner_without_these_methods_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"update_weights_from_disk.*unsupported version"):
        OLD.watch_weights(object(), lambda: None)


@pytest.mark.parametrize("patched", [False, True])
def test_0515_logprobs_of_a_chain_are_taken_row_by_row(monkeypatch: pytest.MonkeyPatch, patched: bool) -> None:
    """Also with the argument that slime's patch adds."""
    given: dict[str, Any] = {}

    def stock(batch: Any, output: Any, predict: Any, accept_index: Any, speculative_num_steps: int) -> None:
        given.update(index=accept_index, steps=speculative_num_steps, predict=predict)

    def slimes(batch: Any, output: Any, predict: Any, accept_index: Any, speculative_num_steps: int,
               accept_lens: Any) -> None:  # fmt: skip
        stock(batch, output, predict, accept_index, speculative_num_steps)
        given.update(lens=accept_lens)

    module(monkeypatch, "sglang.srt.layers.utils.logprob", compute_spec_v2_logprobs=slimes if patched else stock)
    tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    OLD.compute_logprobs("batch", "output", tokens, width=3)
    assert given["index"].tolist() == list(range(6)) and given["steps"] == 2 and given["predict"] is tokens
    assert not patched or given["lens"].tolist() == [3, 3]


def test_0515_arguments_are_read_as_plain_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(
        speculative_algorithm="EFFICIENT_ROLLOUT",
        enable_deterministic_inference=True,
        page_size=16,
        max_running_requests=8,
        max_total_tokens=None,
        weight_version="7",
        get_model_config=lambda: "model",
    )
    module(monkeypatch, "sglang.srt.runtime_context", get_server_args=lambda: arguments)
    module(monkeypatch, "sglang.srt.mem_cache.common", get_alloc_reserve_per_decode=lambda: 12)
    assert OLD.served_algorithm() == "EFFICIENT_ROLLOUT" and OLD.deterministic()
    assert OLD.row_reserve() == 12 + 15
    assert OLD.weight_version(SimpleNamespace(server_args=arguments)) == "7"
    assert OLD.model_config(arguments) == "model"
    assert OLD.request_limits() == (8, None)
    OLD.resolve(arguments)


def test_0515_a_configuration_with_a_state_per_request_is_seen() -> None:
    class Hybrid:
        mamba2_cache_params = None

    assert OLD.has_recurrent_layers(SimpleNamespace(hf_text_config=Hybrid()))
    assert not OLD.has_recurrent_layers(SimpleNamespace(hf_text_config=object()))


def test_0515_our_worker_has_no_draft_pool() -> None:
    """SGLang would read it through a draft worker that ours does not have."""
    assert v0_5_15.no_draft_pool(lambda **_: "pool", draft_worker=v0_5_15.TargetUpdates(), server_args=1) is None
    assert v0_5_15.no_draft_pool(lambda **given: given, draft_worker="eagle", server_args=1) == {
        "draft_worker": "eagle",
        "server_args": 1,
    }


def test_0515_a_grammar_masks_the_logits_of_a_cpu() -> None:
    """As later versions do; its own code knows no CPU."""
    logits = torch.zeros(1, 32)
    v0_5_15.apply_grammar_mask(lambda *_: None, None, logits, torch.tensor([[0b101]], dtype=torch.int32))
    assert logits.isfinite().nonzero()[:, 1].tolist() == [0, 2]


def test_0515_knows_no_sessions() -> None:
    assert not OLD.has_sessions and OLD.bind_threads is None


# -- 0.5.21 ----------------------------------------------------------------------------------------------------------


def test_0521_the_runners_updater_is_watched() -> None:
    updater = SimpleNamespace(**{name: lambda: None for name in WRITERS | {OPENER}})
    runner, changes = SimpleNamespace(weight_updater=updater), []
    watch = PINNED.watch_weights(runner, lambda: changes.append(1))
    assert runner.weight_updater is watch and isinstance(watch, WatchedWeightUpdater)
    runner.weight_updater.load_weights_from_distributed()
    assert changes == [1]


@pytest.mark.parametrize("paused", [False, True])
def test_what_waits_in_a_pause_counts_where_sglangs_flush_counts_it(paused: bool) -> None:
    scheduler = SimpleNamespace(_engine_paused=paused)
    updater = SimpleNamespace(scheduler=scheduler, is_fully_idle=lambda ignore_waiting=False: ignore_waiting)
    assert PINNED.is_idle(updater) == paused
    assert not OLD.is_idle(updater)


class Scheduler:
    """Holds batches of requests that say whether they are finished, and a result for each batch under way."""

    def __init__(
        self,
        running: list[bool],
        last: list[bool] | None,
        waiting: int = 0,
        overlap: bool = True,
        grammars: bool = False,
    ) -> None:
        def batch(finished: list[bool]) -> SimpleNamespace:
            return SimpleNamespace(reqs=[SimpleNamespace(finished=lambda done=done: done) for done in finished])

        self.running_batch = batch(running)
        self.last_batch = None if last is None else batch(last)
        self.waiting_queue, self.chunked_req, self.enable_overlap = [None] * waiting, None, overlap
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: grammars)
        self.processed: list[object] = []
        if overlap:
            self.result_queue = deque([] if last is None else [(self.last_batch, "result")])

    def get_next_batch_to_run(self, running_batch: SimpleNamespace, last_batch: object) -> SimpleNamespace:
        assert running_batch.reqs and all(req.finished() for req in running_batch.reqs)
        return SimpleNamespace(running_batch=SimpleNamespace(reqs=[]), batch_to_run=None)

    def process_batch_result(self, batch: object, result: object) -> None:
        self.processed.append((batch, result))


@pytest.mark.parametrize("overlap", [False, True])
def test_0521_what_is_left_of_finished_requests_is_brought_to_its_end(overlap: bool) -> None:
    scheduler = Scheduler([True, True], [True], overlap=overlap)
    last = scheduler.last_batch
    PINNED.settle(SimpleNamespace(scheduler=scheduler))
    assert scheduler.last_batch is None and scheduler.running_batch.reqs == []
    assert scheduler.processed == ([(last, "result")] if overlap else [])


@pytest.mark.parametrize(
    "held", [([True, False], [True]), ([], [False]), ([], None, 1), ([], None), ([True], None, 0, True, True)]
)
def test_0521_requests_that_run_or_wait_are_left_alone(held: tuple[Any, ...]) -> None:
    scheduler = Scheduler(*held)
    before = scheduler.running_batch, scheduler.last_batch
    PINNED.settle(SimpleNamespace(scheduler=scheduler))
    PINNED.settle(SimpleNamespace(scheduler=None))
    assert (scheduler.running_batch, scheduler.last_batch) == before and not scheduler.processed


def test_0521_small_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SimpleNamespace(shared_read_done_event="event")
    PINNED.forget_read_event(runner)
    assert runner.shared_read_done_event is None
    assert PINNED.weight_version(SimpleNamespace(config_value=lambda name: (name, "3"))) == ("weight_version", "3")
    schedule = SimpleNamespace(max_running_requests=None, max_total_tokens=4096)
    module(monkeypatch, "sglang.srt.runtime_context", get_schedule=lambda: schedule)
    assert PINNED.request_limits() == (None, 4096)
    resolved = []
    PINNED.resolve(SimpleNamespace(resolve_once=lambda: resolved.append(1)))
    assert resolved == [1] and PINNED.has_sessions
    given: dict[str, Any] = {}
    module(
        monkeypatch,
        "sglang.srt.layers.logprob_processor",
        compute_spec_logprobs=lambda *args, **kwargs: given.update(args=args, **kwargs),
    )
    PINNED.compute_logprobs("batch", "output", torch.tensor([1, 2]), width=2)
    assert given["chain_stride"] == 2 and given["args"][:2] == ("batch", "output")


# -- 0.5.23 ----------------------------------------------------------------------------------------------------------


def test_0523_ranks_and_shards_are_read_from_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "sglang.srt.runtime_context", get_parallel=lambda: SimpleNamespace(tp_rank=1, dp_rank=None))
    assert NEW.ranks(runner=None) == (1, None)
    assert NEW.shards(SimpleNamespace(tp_group=None)) == 1
    assert NEW.shards(SimpleNamespace(tp_group=SimpleNamespace(world_size=2))) == 2
    for other in (OLD, PINNED):
        assert other.ranks(SimpleNamespace(tp_rank=0, dp_rank=3)) == (0, 3)
        assert other.shards(SimpleNamespace(tp_size=4)) == 4


def test_0515_tells_the_width_by_the_arguments_of_the_server() -> None:
    arguments = SimpleNamespace(speculative_num_steps=7, speculative_num_draft_tokens=8)
    with OLD.verify_width(SimpleNamespace(server_args=arguments), 3):
        assert vars(arguments) == {"speculative_num_steps": 2, "speculative_num_draft_tokens": 3}
    assert vars(arguments) == {"speculative_num_steps": 7, "speculative_num_draft_tokens": 8}


def test_0523_is_0521_in_the_rest() -> None:
    assert isinstance(NEW, v0_5_21.Sglang0521) and NEW.required == PINNED.required


# -- the installed version -------------------------------------------------------------------------------------------


def test_installed_borrowed_types_say_what_is_verified() -> None:
    from sglang_er.engine.spec_inputs import DraftState, VerifyInput

    tokens = torch.tensor([1, 2])
    assert not DraftState(tokens, tokens).is_verify_input()
    verify = VerifyInput(positions=tokens, draft_token_num=2, slot_table=tokens[None])
    assert verify.is_verify_input() and not verify.is_draft_input()


@pytest.mark.parametrize("other", [{"new_indices_cpu": None}, {"has_been_filtered": False}])
def test_installed_carried_state_is_filtered_as_every_version_asks(other: dict[str, Any]) -> None:
    from sglang_er.engine.spec_inputs import DraftState

    state = DraftState(torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3]))
    state.filter_batch(new_indices=torch.tensor([0, 2]), **other)
    assert state.bonus_tokens.tolist() == [5, 7] and state.new_seq_lens.tolist() == [1, 3]


def test_installed_backend_name_is_put_on_the_lists_once() -> None:
    from sglang.srt.arg_groups import choices

    adapter = compat.adapter()
    before = list(choices.ATTENTION_BACKEND_CHOICES)
    try:
        adapter.allow_attention_backend("of_this_test")
        adapter.allow_attention_backend("of_this_test")
        assert choices.ATTENTION_BACKEND_CHOICES.count("of_this_test") == 1
    finally:
        for known in (
            choices.ATTENTION_BACKEND_CHOICES,
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        ):
            known.remove("of_this_test")
    assert before == choices.ATTENTION_BACKEND_CHOICES


def test_installed_recurrent_configurations_are_seen() -> None:
    from sglang.srt.configs.qwen3_next import Qwen3NextConfig
    from transformers import Qwen3Config

    def of(config: Any) -> Any:
        return SimpleNamespace(hf_config=config, hf_text_config=config, is_draft_model=False)

    assert compat.adapter().has_recurrent_layers(of(Qwen3NextConfig()))
    assert not compat.adapter().has_recurrent_layers(of(Qwen3Config(architectures=["Qwen3ForCausalLM"])))


def test_installed_command_is_answered() -> None:
    assert compat.adapter().state_request_done(True).updated is True
