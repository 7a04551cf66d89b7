"""Deliberately wrong verifiers: what the distribution tests must be able to see.

wrong_q        drafts are drawn from a sharper distribution than the one reported to the verifier.
residual_is_p  a rejected draft is replaced by a draw from p instead of the positive part of p - q.
bonus_from_q   when all drafts are accepted, the last token comes from the draft distribution, unverified.
stop_by_token  a draft ends before a token because that token turned out unlikely: it is dropped instead of verified.
biased_draft   drafts are drawn from a distorted distribution that is reported truthfully: not an error, must pass.
accept_all     every draft is committed, as if acceptance were 1: wrong tokens, the target's logprobs.
accept_none    no draft is committed, as if acceptance were 0: not an error.

The functions work on tensors and serve the unit tests. `install` puts them into a real server (environment variable
SGLANG_ER_TEST_HOOK), where POST /er/policy takes six more keys: "mutant" (a name or null), "stop" (a confidence below
which drafts end early, whatever the policy, or null), "trace" (true: GET /er/state shows draft length and accept
length of every step of every request, by request id), "write_weights" (a checkpoint that is written into the
parameters behind the back of every update call, as a trainer in the same process might do it), "garble_next_twin"
(true: the next time that the twin is remade it comes out useless, the time after that right), and "forget" ("all":
released memory comes back full of garbage, as from a GPU's memory saver; "backup": all but the policy's weights).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from sglang_er.sampling.chain import ChainResult, sample_rows, verify_chain
from support.memory_saver import garble

BROKEN = ("wrong_q", "residual_is_p", "bonus_from_q", "stop_by_token")
FORCED = ("accept_all", "accept_none")
MUTANTS = (*BROKEN, "biased_draft", *FORCED)
SHARPEN = 1.5
# Rows whose confidence ends a draft: few, so that what happens to them depends on it.
STOP_ROWS = 4


def distorted(probs: torch.Tensor) -> torch.Tensor:
    """probs [..., V] sharpened; the support stays."""
    powered = probs**SHARPEN
    return powered / powered.sum(dim=-1, keepdim=True)


def draft_with(mutant: str | None, q: torch.Tensor, generator: torch.Generator | None = None) -> tuple[Any, Any]:
    """(token drawn [R], q reported [R, V]) of one draft under a mutant."""
    drawn = distorted(q) if mutant in ("wrong_q", "biased_draft") else q
    return sample_rows(drawn, generator), drawn if mutant == "biased_draft" else q


def verify_with(
    mutant: str | None,
    p: torch.Tensor,
    q: torch.Tensor,
    drafts: torch.Tensor,
    generator: torch.Generator | None = None,
) -> ChainResult:
    """verify_chain under a mutant: same arguments, same shapes."""
    if mutant == "residual_is_p":
        return _residual_is_p(p, q, drafts, generator)
    if mutant == "bonus_from_q":
        return _bonus_from_q(p, q, drafts, generator)
    if mutant == "stop_by_token":
        return _stop_by_token(p, q, drafts, generator)
    if mutant in FORCED:
        return _forced(p, drafts, drafts.shape[1] if mutant == "accept_all" else 0, generator)
    return verify_chain(p, q, drafts, generator)


def _residual_is_p(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, generator: torch.Generator | None
) -> ChainResult:
    tokens, accept_lens = verify_chain(p, q, drafts, generator)
    last = accept_lens.to(torch.int64)[:, None] - 1
    rows = torch.arange(p.shape[0])
    redrawn = sample_rows(p[rows, last.squeeze(1)], generator)
    return ChainResult(tokens.scatter(1, last, redrawn[:, None]), accept_lens)


def _bonus_from_q(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, generator: torch.Generator | None
) -> ChainResult:
    """The chain without its last draft, which then stands in for the bonus token: drawn from q at its place."""
    batch, gamma = drafts.shape
    if gamma == 1:
        return ChainResult(drafts.repeat(1, 2), torch.ones(batch, dtype=torch.int32))
    tokens, accept_lens = verify_chain(p[:, :gamma], q[:, : gamma - 1], drafts[:, : gamma - 1], generator)
    bonus = torch.where(accept_lens == gamma, drafts[:, -1], tokens[:, -1])
    tokens = torch.cat([tokens[:, :-1], bonus[:, None], drafts[:, :1]], dim=1)
    return ChainResult(tokens, accept_lens)


def _stop_by_token(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, generator: torch.Generator | None
) -> ChainResult:
    """The chain ends before the first draft of less than half of the largest probability; p makes its last token."""
    gamma = drafts.shape[1]
    unlikely = q.gather(-1, drafts[..., None]).squeeze(-1) < 0.5 * q.amax(dim=-1)
    ends = torch.where(unlikely.any(dim=1), unlikely.int().argmax(dim=1), gamma)
    tokens, accept_lens = verify_chain(p, q, drafts, generator)
    reached = accept_lens - 1 >= ends
    rows = torch.arange(p.shape[0])
    drawn = sample_rows(p[rows, ends], generator)
    last = torch.where(reached, drawn, tokens[rows, ends])
    lens = torch.where(reached, ends + 1, accept_lens).to(torch.int32)
    return ChainResult(tokens.scatter(1, ends[:, None], last[:, None]), lens)


def _forced(p: torch.Tensor, drafts: torch.Tensor, count: int, generator: torch.Generator | None) -> ChainResult:
    """`count` drafts of every row, and a token drawn from p at the place behind them."""
    drawn = sample_rows(p[:, count], generator)
    tokens = torch.cat([drafts, drafts[:, :1]], dim=1)
    tokens[:, count] = drawn
    return ChainResult(tokens, torch.full((p.shape[0],), count + 1, dtype=torch.int32))


def install(worker: Any) -> None:
    """Called in the scheduler process with the worker once it is built."""
    samplers = {None: worker.sampler_cls, **{name: sampler_class(name) for name in MUTANTS}}
    trace: dict[str, list[tuple[int, int]]] | None = None
    stop: float | None = None
    garble = False
    forget = Forgetful(worker)
    set_policy, step, describe = worker.set_policy, worker.forward_batch_generation, worker.describe
    requantize = worker.twin.requantize

    def set_policy_or_mutant(changes: dict[str, Any]) -> None:
        nonlocal trace, stop, garble
        rest = dict(changes)
        forget.what = rest.pop("forget", forget.what)
        garble = rest.pop("garble_next_twin", garble)
        stop = rest.pop("stop", stop)
        chosen = samplers[rest.pop("mutant")] if "mutant" in rest else worker.sampler_cls
        tracing = rest.pop("trace", None)
        checkpoint = rest.pop("write_weights", None)
        set_policy(rest)
        worker.sampler_cls = chosen
        stop_below(worker.controller, stop)
        if checkpoint is not None:
            worker.model_runner.model.load_weights(load_file(f"{checkpoint}/model.safetensors").items())
        if tracing is not None:
            trace = {} if tracing else None

    def requantize_or_garble() -> None:
        nonlocal garble
        requantize()
        for layer in worker.twin.layers if garble else ():
            layer.packed.scales_zeros.zero_()
        garble = False

    def traced_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        decode = batch.forward_mode.is_decode() and not batch.is_extend_in_batch
        ids = [req.rid for req in batch.reqs] if decode and trace is not None else []
        result = step(batch, *args, **kwargs)
        if ids:
            for rid, accepted in zip(ids, result.accept_lens.tolist(), strict=True):
                trace.setdefault(rid, []).append((result.speculative_num_draft_tokens - 1, accepted))
        return result

    worker.set_policy = set_policy_or_mutant
    worker.twin.requantize = requantize_or_garble
    worker.forward_batch_generation = traced_step
    worker.describe = lambda: {**describe(), **({} if trace is None else {"trace": trace})}


class Forgetful:
    """Makes SGLang's saver that does nothing lose, at a resume, what a real one would have unmapped."""

    def __init__(self, worker: Any) -> None:
        from sglang.srt.utils.torch_memory_saver_adapter import _TorchMemorySaverAdapterNoop

        self.what: str | None = None
        self._worker = worker
        _TorchMemorySaverAdapterNoop.resume = lambda _, tag: self._resume(tag)

    def _resume(self, tag: str) -> None:
        for tensor in self._of(tag) if self.what else ():
            garble(tensor)

    def _of(self, tag: str) -> list[torch.Tensor]:
        runner, drafter = self._worker.model_runner, self._worker.drafter
        if tag == "weights":
            packed = [layer.packed for layer in self._worker.twin.layers]
            ours = [tensor for weight in packed for tensor in (weight.packed, weight.scales_zeros)]
            return ours + ([parameter.data for parameter in runner.model.parameters()] if self.what == "all" else [])
        if tag == "kv_cache":
            shadow = drafter.shadow()
            parts = [] if shadow is None else [shadow.valid]
            for layer in () if shadow is None else shadow.layers:
                parts += [layer.keys, layer.values, layer.key_scales, layer.value_scales]
            pool = runner.token_to_kv_pool
            return [*parts, *pool.k_buffer, *pool.v_buffer]
        loop = drafter._loop
        return [] if loop is None or loop._probs is None else [loop._probs]


def stop_below(controller: Any, confidence: float | None) -> None:
    """End drafts where the first rows' mean confidence is below this; None: as the controller decides."""
    for name in ("goes_on", "reach"):
        vars(controller).pop(name, None)
    if confidence is not None:
        controller.stops_early = True
        controller.reach = lambda gamma: gamma
        controller.goes_on = lambda values: sum(values[:STOP_ROWS]) / len(values[:STOP_ROWS]) >= confidence


def sampler_class(mutant: str) -> type[Any]:
    """StepSampler with the mutant in its rejection rule; greedy and seeded sampling stay right."""
    from sglang_er.engine.sampler import DraftedChain, StepSampler
    from sglang_er.sampling.filters import filtered_probs

    class MutantSampler(StepSampler):
        def draft(self, logits: torch.Tensor, positions: torch.Tensor, drafted: DraftedChain) -> torch.Tensor:
            if self.rule != "rejection":
                return super().draft(logits, positions, drafted)
            tokens, reported = draft_with(mutant, filtered_probs(logits, self.params))
            drafted.tokens.append(tokens)
            drafted.probs.append(reported)
            return tokens

        def verify(
            self, logits: torch.Tensor, positions: torch.Tensor, drafted: DraftedChain, in_place: bool = False
        ) -> ChainResult:
            if self.rule != "rejection":
                return super().verify(logits, positions, drafted, in_place)
            drafts = torch.stack(drafted.tokens, dim=1)
            batch, gamma = drafts.shape
            p = filtered_probs(logits, self.params.repeat(gamma + 1)).view(batch, gamma + 1, -1)
            return verify_with(mutant, p, torch.stack(drafted.probs, dim=1), drafts)

    return MutantSampler
