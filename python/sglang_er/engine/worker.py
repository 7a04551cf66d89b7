"""The speculative worker: one policy, its twin, one KV pool, and a draft length chosen at every step."""

from __future__ import annotations

import importlib
import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_er.config import from_env
from sglang_er.engine import compat, forward, kernel_table, rows, saved_memory, seeding, standard_rows
from sglang_er.engine.controller import Controller
from sglang_er.engine.drafter import make_drafter
from sglang_er.engine.dual_precision import install_twin
from sglang_er.engine.identity import device_name, measured_on
from sglang_er.engine.provenance import Provenance
from sglang_er.engine.ranks import Ranks
from sglang_er.engine.sampler import DraftedChain, StepSampler
from sglang_er.engine.saved_memory import WEIGHTS, SavedMemory
from sglang_er.engine.spec_inputs import DraftState
from sglang_er.engine.stats import LaunchedStep, StepStats
from sglang_er.engine.step_state import step_state
from sglang_er.engine.target_attention import TargetAttention, host_lengths
from sglang_er.engine.target_graphs import TargetGraphs
from sglang_er.engine.weight_sync import WeightSync
from sglang_er.twin.kv_shadow import check_shadow

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker

logger = logging.getLogger(__name__)

# Tests put deliberately broken verifiers into a real server through this; nothing in the product sets it.
TEST_HOOK_ENV = "SGLANG_ER_TEST_HOOK"

ADAPTER = compat.adapter()
WorkerBase: Any = ADAPTER.worker_base()


class EfficientRolloutWorker(WorkerBase):
    """Spec V2 worker (facts: forward_batch_generation contract). The scheduler sees it as the model worker."""

    def __init__(
        self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: TpModelWorker, **_rest: Any
    ) -> None:
        super().__init__()
        self.config = from_env()
        self._target_worker = target_worker
        self._draft_worker = None
        self.model_runner = target_worker.model_runner
        self.device = target_worker.device
        self.speculative_num_steps = self.config.gamma_max
        self.speculative_num_draft_tokens = self.config.gamma_max + 1
        self.ranks = Ranks(*ADAPTER.tensor_parallel_groups())
        if self.device != "cpu":  # tries them, which must not happen while a graph is recorded
            kernel_table.install(self.config.kernel_table, device_name(str(self.device)), self.ranks)
            chosen = kernel_table.chosen(self.device, self.model_runner.dtype)
            logger.info("sglang-er: kernels: %s", ", ".join(f"{op} {name}" for op, name in chosen.items()))
        self.target_graphs = TargetGraphs(self.model_runner)
        self._records = self.device == "cuda" and bool(ADAPTER.decode_graphs())
        if self._records:
            from sglang_er.engine.cuda import graph_runners

            graph_runners.prepare(self.model_runner, self.config.gamma_max)
        # Before the KV pool is sized, so that its profiling sees the packed weights.
        self.memory = SavedMemory(self.model_runner)
        self.twin = install_twin(
            self.model_runner.model,
            self.config.group_size,
            self.config.quantize_lm_head,
            partial(self.memory.region, WEIGHTS),
            self.config.clip_search,
        )
        self.drafter = make_drafter(self.model_runner, self.twin, self.config, self.memory, self.ranks)
        engine = measured_on(self.model_runner, self.ranks.count)
        self.controller = Controller(self.config, engine, self.ranks, self.device == "cpu")
        self.sync = WeightSync(self.model_runner, self.twin, self.config, self.controller, self.memory)
        self.stats = StepStats()
        self.provenance = Provenance(self.twin, self.config)
        self.sampler_cls: type[StepSampler] = StepSampler
        self.context_len = int(self.model_runner.model_config.context_len)
        if hook := os.environ.get(TEST_HOOK_ENV):
            module, _, name = hook.partition(":")
            logger.warning("sglang-er: %s=%s is active: this server is for tests only", TEST_HOOK_ENV, hook)
            getattr(importlib.import_module(module), name)(self)

    # -- what the scheduler asks of a speculative worker ---------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "_target_worker":
            raise AttributeError(name)
        return getattr(self._target_worker, name)

    @property
    def draft_worker(self) -> None:
        return None

    @property
    def spec_v2_attn_backends(self) -> tuple[Any, ...]:
        """Whoever may read lengths on the host."""
        return (self.model_runner.attn_backend, *self.target_graphs.attentions)

    def weight_update_runners(self) -> list[tuple[str, Any]]:
        """The draft owns no weights of its own: updates go to the target, the watch sees them."""
        return []

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """Called once per processed decode step, in launch order, with accepted drafts per request."""
        outcome = self.stats.finish_step(num_correct_drafts_per_req)
        if outcome is not None:
            self.controller.observe(outcome)

    def clear_cache_pool(self) -> None:
        self.stats.forget_pending()

    def init_cuda_graphs(self) -> None:
        """The last thing that is built: from here on forwards cost what they will cost."""
        attention = None if self.device == "cpu" else TargetAttention(self.model_runner)
        super().init_cuda_graphs()
        if attention is not None:
            self.target_graphs = self._make_target_graphs(attention)
        with torch.no_grad():
            self.target_graphs.record(self.config.gamma_max, ADAPTER.decode_graphs(), self.ranks)
            self.drafter.record(self.config.graph_seconds)
        if self.config.seed_seconds > 0 and not self.config.cost_file:
            began = time.perf_counter()
            with torch.no_grad():  # what is made at first use must not be an inference tensor
                timings = seeding.time_forwards(
                    self.model_runner,
                    self.drafter,
                    self.target_graphs,
                    self.config.gamma_max,
                    self.config.seed_seconds,
                    self.ranks,
                )
            self.controller.seed(timings, time.perf_counter() - began)

    def _make_target_graphs(self, attention: TargetAttention) -> TargetGraphs:
        logger.info("sglang-er: the target attends through %s", attention)
        if not self._records:
            return TargetGraphs(self.model_runner, attention=attention.unrecorded)
        from sglang_er.engine.cuda import graph_runners

        return graph_runners.target_graphs(self.model_runner, self.config, attention)

    # -- steps ---------------------------------------------------------------------------------------------------

    def forward_batch_generation(
        self,
        batch: ScheduleBatch,
        on_publish: Callable[[torch.Tensor], None] | None = None,
        grammar_barrier: object = None,
        pp_proxy_tensors: object = None,
        **_: object,
    ) -> GenerationBatchResult:
        if not batch.forward_mode.is_decode() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish)
        started = time.perf_counter()
        speculating = rows.speculating_rows(batch)
        state = step_state(batch, speculating, self.config.gamma_max, self.context_len)
        gamma, drafted = 0, DraftedChain()
        if state.speculative_rows and state.gamma_limit > 0:  # alike on all ranks, which choose together
            gamma = self.controller.choose(state, self.sync.ready())
        if gamma:
            reach, context = self.controller.reach(gamma), state.context_tokens
            result, drafted = self._speculative_step(batch, reach, speculating, context)
        else:
            result = self._plain_step(batch)
        self.provenance.attach(batch, result, "plain", drafted, speculating)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        ended, gamma = time.perf_counter(), len(drafted.tokens)
        since_last = self.stats.forward_ended(ended, (state.batch_size, gamma))
        step = LaunchedStep(state, gamma, speculating, ended - started, since_last)
        self.stats.launch_step(step._replace(draft_seconds=drafted.seconds, confidences=drafted.confidences))
        return result

    def _prefill(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        result = self._target_worker.forward_batch_generation(batch)
        self.drafter.written(batch.out_cache_loc)
        self.provenance.attach(batch, result, "prefill")
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = DraftState(result.next_token_ids.reshape(-1), batch.seq_lens)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        self.stats.forward_ended(time.perf_counter())
        return result

    def _plain_step(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """gamma = 0: SGLang's own decode step. `batch` may be changed: the scheduler restores it."""
        committed = batch.seq_lens
        indices = batch.req_pool_indices.to(torch.int64)
        batch.input_ids = batch.spec_info.bonus_tokens.to(torch.int64)
        batch.out_cache_loc = self.model_runner.req_to_token_pool.req_to_token[indices, committed].to(torch.int64)
        batch.seq_lens = committed + 1
        if batch.seq_lens_cpu is not None:
            batch.seq_lens_cpu = batch.seq_lens_cpu + 1
            batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        batch.spec_info = None
        result = self._target_worker.forward_batch_generation(batch)
        self.drafter.written(batch.out_cache_loc)
        if batch.return_logprob:
            output = result.logits_output
            output.next_token_logprobs = output.next_token_logprobs.view(len(batch.reqs), 1)
        result.accept_lens = torch.ones(len(batch.reqs), dtype=torch.int32, device=committed.device)
        result.new_seq_lens = batch.seq_lens
        result.speculative_num_draft_tokens = 1
        result.next_draft_input = DraftState(result.next_token_ids.reshape(-1), batch.seq_lens)
        return result

    def _speculative_step(
        self, batch: ScheduleBatch, reach: int, rows_to_draft: list[int] | None, context_tokens: int
    ) -> tuple[GenerationBatchResult, DraftedChain]:
        """Draft 1..reach tokens per request, verify them, commit."""
        speculating = None
        if rows_to_draft is not None:
            speculating = torch.tensor(rows_to_draft, dtype=torch.int64).to(batch.seq_lens.device, non_blocking=True)
        committed = batch.seq_lens.to(torch.int64)
        bonus = batch.spec_info.bonus_tokens.to(torch.int64)
        on_host = host_lengths(self.model_runner, batch)
        chain = forward.make_chain(self.model_runner, batch.req_pool_indices, committed, reach, on_host)
        sampler = self.sampler_cls(batch.sampling_info, speculating)
        sampler.scores = self.provenance.wanted(batch)

        to_draft, tokens = chain, bonus
        if rows_to_draft is not None:
            to_draft, tokens = chain.rows(rows_to_draft, speculating), bonus[speculating]
        drafted = self._draft_pass(to_draft, tokens, sampler, context_tokens)
        chain, gamma = chain.first(len(drafted.tokens)), len(drafted.tokens)
        drafts = torch.stack(drafted.tokens, dim=1)
        if not self.ranks.alone:
            drafted.tokens = list(self.ranks.share(drafts).unbind(dim=1))
        if speculating is not None:
            # Rows that do not speculate verify copies of their bonus token; only position 0 is used.
            filled = bonus[:, None].repeat(1, gamma)
            filled[speculating] = drafts
            drafts = filled
        verify_batch = forward.make_verify_batch(self.model_runner, chain, torch.cat([bonus[:, None], drafts], dim=1))
        ADAPTER.forget_read_event(self.model_runner)
        with self.target_graphs.verifying(gamma + 1, len(batch.reqs)):
            result = self._target_worker.forward_batch_generation(None, forward_batch=verify_batch, is_verify=True)
        self.drafter.written(verify_batch.out_cache_loc)
        return self._commit(batch, result, verify_batch, sampler, drafted, speculating), drafted

    def _draft_pass(
        self, chain: forward.Chain, tokens: torch.Tensor, sampler: StepSampler, context_tokens: int
    ) -> DraftedChain:
        """As many tokens as the chain has slots for, or fewer. A stop may depend on what was drafted, because all of it
        is verified, and on q; a token once sampled is never taken back."""
        self.twin.about_to_draft()
        drafted, began = DraftedChain(chain.slots.shape[1] - 1), time.perf_counter()
        if not (self.controller.stops_early or sampler.scores):
            whole = self.drafter.whole_pass(chain, tokens, sampler, context_tokens)
            if whole is not None:
                return whole
        with self.drafter.draft_pass(chain):
            for step in range(chain.slots.shape[1] - 1):
                logits = self.drafter.logits(chain, step, tokens)
                tokens = sampler.draft(logits, chain.committed + step, drafted)
                if sampler.scores:
                    sampler.score(logits, drafted)
                if self.controller.stops_early and not self.controller.goes_on(sampler.confidences(logits, drafted)):
                    break
        if self.device == "cpu":  # elsewhere the device works behind the host's back
            drafted.seconds = time.perf_counter() - began
        return drafted

    def _commit(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        verify_batch: Any,
        sampler: StepSampler,
        drafted: DraftedChain,
        speculating: torch.Tensor | None,
    ) -> GenerationBatchResult:
        """Accept, resample, and fill in what the scheduler reads of a decode result."""
        output = result.logits_output
        width = len(drafted.tokens) + 1
        logits = output.next_token_logits
        positions = verify_batch.positions
        standard = None
        if speculating is not None:
            standard = standard_rows.sample(self.model_runner, batch, logits.view(len(batch.reqs), width, -1)[:, 0])
            logits = logits.view(len(batch.reqs), width, -1)[speculating].reshape(-1, logits.shape[-1])
            positions = positions.view(-1, width)[speculating].reshape(-1)
        tokens, accept_lens = sampler.verify(logits, positions, drafted, in_place=not batch.return_logprob)
        if standard is not None:
            tokens, accept_lens = standard_rows.merge(standard, tokens, accept_lens, speculating)
        if not self.ranks.alone:
            committed = self.ranks.share(torch.cat([tokens, accept_lens[:, None].to(tokens.dtype)], dim=1))
            tokens, accept_lens = committed[:, :-1].contiguous(), committed[:, -1].to(accept_lens.dtype)
        if batch.return_logprob:
            ADAPTER.compute_logprobs(batch, output, tokens.reshape(-1), width)
            if standard is not None:
                standard_rows.merge_logprobs(standard, output, batch, width)
        bonus = tokens.gather(1, accept_lens[:, None].to(torch.int64) - 1).squeeze(1)
        result.next_token_ids = tokens.reshape(-1)
        result.accept_lens = accept_lens
        result.new_seq_lens = batch.seq_lens + accept_lens.to(batch.seq_lens.dtype)
        result.speculative_num_draft_tokens = width
        result.next_draft_input = DraftState(bonus, result.new_seq_lens)
        result.extra_keep_alive_refs = [verify_batch, drafted]
        return result

    # -- administration ------------------------------------------------------------------------------------------

    def set_policy(self, changes: dict[str, Any]) -> None:
        """Switch policy fields (the server is idle). Raises ConfigError on a bad value; nothing changes then."""
        config = self.config.changed(changes)
        check_shadow(config, str(self.device))
        self.provenance.configure(config)
        self.controller.configure(config)
        self.config = config
        self.drafter.configure(config)
        self.sync.configure(config)

    def describe(self) -> dict[str, Any]:
        """What /server_info and /er/state show."""
        return {
            "config": self.config.describe(),
            **self.controller.describe(),
            "twin": self.sync.describe(),
            "steps": self.stats.describe(),
            "forwards": self.drafter.forwards(),
            "kv_shadow": self.drafter.describe_shadow(),
            "memory": saved_memory.describe(self),
            "kernels": kernel_table.chosen(self.device, self.model_runner.dtype),
            "graphs": {"draft": self.drafter.describe_graphs(), "verify": self.target_graphs.describe()},
        }
