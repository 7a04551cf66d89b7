"""The whole draft pass as one function of fixed buffers: every drafted token's forward, its sampling, the next token.

Nothing in it looks at a value on the host, so that one CUDA graph holds it, for every draft length, batch bucket and
sampling rule (`graphs.py` runs it). A pass fills the buffers, runs, and hands out views of the results, which are good
until the next pass.

Rows up to the bucket are padding: they read a token of request row 0 and write KV slot 0, which SGLang keeps for that.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_er.engine.draft_attention import DraftAttention
from sglang_er.engine.ranks import ALONE, Ranks
from sglang_er.engine.sampler import DraftedChain, StepSampler
from sglang_er.engine.saved_memory import CUDA_GRAPH, SavedMemory
from sglang_er.sampling.filters import FilterParams

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.engine.forward import Chain
    from sglang_er.engine.graphs import EagerGraphs
    from sglang_er.twin.kv_shadow import ShadowPool
    from sglang_er.twin.twin import Twin

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Rows times drafted tokens of the largest pass: bounds the draft's distributions, 4 bytes a token of the vocabulary.
MOST_DRAFTS = 512
# Recorded at start-up, in this order; the rest at first use.
_GAMMAS = (3, 5, 1, 2, 7, 4, 6)


class _Key(NamedTuple):
    """What a graph is recorded for."""

    bucket: int
    gamma: int
    rule: str
    filters: tuple[bool, bool, bool]
    shadow: bool


class DraftLoop:
    """`takes` says what is drafted here; other batches go token by token."""

    def __init__(
        self,
        runner: ModelRunner,
        twin: Twin,
        graphs: EagerGraphs,
        gamma_max: int,
        memory: SavedMemory,
        ranks: Ranks = ALONE,
        shadow: ShadowPool | None = None,
    ) -> None:
        self._runner, self._twin, self._graphs, self._memory = runner, twin, graphs, memory
        self._ranks, self._shadow = ranks, shadow
        rows, device = BUCKETS[-1], runner.device
        self._attention = DraftAttention(runner, rows)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._bonus, self._committed, self._request_rows = ints(rows), ints(rows), ints(rows)
        self._slots = ints(rows, gamma_max + 1)
        self._seeds = ints(rows)
        self._temperatures = torch.ones(rows, 1, device=device)
        self._top_ps, self._min_ps = torch.ones(rows, device=device), torch.zeros(rows, device=device)
        self._top_ks = torch.ones(rows, dtype=torch.int32, device=device)
        self._tokens = ints(MOST_DRAFTS)
        self._probs: torch.Tensor | None = None

    def takes(self, rows: int, gamma: int) -> bool:
        return rows <= BUCKETS[-1] and _bucket(rows) * gamma <= MOST_DRAFTS

    def run(self, chain: Chain, bonus: torch.Tensor, sampler: StepSampler, shadow: bool = False) -> DraftedChain:
        """As many tokens as the chain has slots for; `bonus` int64 [B]: the token before them; `shadow`: read the KV
        shadow, if there is one."""
        rows, gamma = chain.slots.shape[0], chain.slots.shape[1] - 1
        bucket, params = _bucket(rows), sampler.params
        filters = (params.need_top_p, params.need_top_k, params.need_min_p)
        key = _Key(bucket, gamma, sampler.rule, filters, shadow and self._shadow is not None)
        self._fill(rows, bucket, chain, bonus, sampler)
        tokens, probs = self._run(key)
        drafted = DraftedChain()
        # The next pass overwrites the buffers, and tokens are still copied to the host then.
        drafted.tokens = list(tokens[:, :rows].clone())
        if probs is not None:
            drafted.in_one = probs[:, :rows]
            drafted.probs = list(drafted.in_one)
        return drafted

    def record(self, seconds: float) -> None:
        """Passes of greedy and of unfiltered sampling, the likeliest first, until that time is over by the first rank's
        clock; others at their first use."""
        ended = time.perf_counter() + seconds
        most = self._slots.shape[1] - 1
        shadows = (False,) if self._shadow is None else (False, True)
        for gamma in [gamma for gamma in _GAMMAS if gamma <= most]:
            for bucket in [bucket for bucket in BUCKETS if bucket * gamma <= MOST_DRAFTS]:
                for rule, shadow in product(("rejection", "greedy"), shadows):
                    if self._ranks.seconds(time.perf_counter() - ended) >= 0.0:
                        return
                    self._run(_Key(bucket, gamma, rule, (False, False, False), shadow))

    def _run(self, key: _Key) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of what is in the buffers now: tokens [gamma, bucket], and what they were drawn from."""
        tokens, probs = self._tokens[: key.bucket * key.gamma].view(key.gamma, key.bucket), self._probs_for(key)
        self._graphs.run(key, partial(self._draft, key, tokens, probs))
        return tokens, probs

    def _fill(self, rows: int, bucket: int, chain: Chain, bonus: torch.Tensor, sampler: StepSampler) -> None:
        width, params = chain.slots.shape[1], sampler.params
        filled: list[tuple[torch.Tensor, torch.Tensor | None, int | float]] = [
            (self._bonus, bonus, 0),
            (self._committed, chain.committed, 0),
            (self._request_rows, chain.req_pool_indices, 0),
            (self._slots[:, :width], chain.slots, 0),
            (self._seeds, sampler.seeds, 0),
            (self._temperatures, params.temperatures, 1.0),
            (self._top_ps, params.top_ps, 1.0),
            (self._top_ks, params.top_ks, 1),
            (self._min_ps, params.min_ps, 0.0),
        ]
        for buffer, value, padding in filled:
            if value is not None:
                buffer[:rows].copy_(value)
                buffer[rows:bucket].fill_(padding)

    def _probs_for(self, key: _Key) -> torch.Tensor | None:
        """fp32 [gamma, bucket, V]: what the drafts are drawn from, where verification asks for it."""
        if key.rule != "rejection":
            return None
        if self._probs is None:
            vocabulary = int(self._runner.model_config.vocab_size)
            with self._memory.region(CUDA_GRAPH):
                self._probs = torch.empty(MOST_DRAFTS, vocabulary, device=self._runner.device)
        return self._probs[: key.bucket * key.gamma].view(key.gamma, key.bucket, -1)

    @property
    def released_nbytes(self) -> int:
        """Bytes that lie under the tag cuda_graph; the other buffers are small, and never released."""
        return 0 if self._probs is None else self._probs.nbytes

    # -- what is recorded ----------------------------------------------------------------------------------------

    def _draft(self, key: _Key, tokens: torch.Tensor, probs: torch.Tensor | None) -> None:
        bucket = key.bucket
        params = FilterParams(
            self._temperatures[:bucket],
            self._top_ps[:bucket],
            self._top_ks[:bucket],
            self._min_ps[:bucket],
            *key.filters,
        )
        seeds = self._seeds[:bucket] if key.rule == "seeded" else None
        sampler = StepSampler.of(params, greedy=key.rule == "greedy", seeds=seeds)
        last = self._bonus[:bucket]
        self._attention.shadow = self._shadow if key.shadow else None
        for step in range(key.gamma):
            positions = self._committed[:bucket] + step
            logits = self._logits(bucket, step, last, positions)
            last = sampler.draft(logits, positions, DraftedChain(), None if probs is None else probs[step])
            tokens[step].copy_(last)

    def _logits(self, bucket: int, step: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[bucket, V] of the twin after `tokens` at `positions`."""
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=bucket,
            input_ids=tokens,
            req_pool_indices=self._request_rows[:bucket],
            seq_lens=positions + 1,
            out_cache_loc=self._slots[:bucket, step].contiguous(),
            seq_lens_sum=None,
            positions=positions,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            spec_info=None,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        with self._twin.draft_pass(), forward_context(ForwardContext(attn_backend=self._attention)):
            output = self._runner.model.forward(tokens, positions, batch)
        logits: torch.Tensor = output.next_token_logits
        return logits


def _bucket(rows: int) -> int:
    return BUCKETS[bisect_left(BUCKETS, rows)]
