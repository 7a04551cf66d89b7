#!/usr/bin/env python3
"""Cost of a speculative step's own Python on the CPU: policy, index building, acceptance, sampling, counters.

The engine's worker runs as it is, in this process; the model's forwards are replaced by logits that were made before,
and the time inside the replacements is subtracted. The vocabulary of the small models (320) keeps sampling small; what
sampling itself costs at a vocabulary of 151,936 is a second table, because that is arithmetic, not bookkeeping.
On a machine that is busy all the time, `--clock cpu --threads 1` counts the processor time of one thread instead.

    python scripts/bench_step.py                 # limits: 0.5 ms at batch 1, 1 ms at batch 64
    python scripts/bench_step.py --profile 64    # where the time goes at batch 64
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang_er.compat import torchvision_shim

torchvision_shim.install()  # before SGLang is imported

import torch  # noqa: E402
from sglang.srt.managers.utils import GenerationBatchResult  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter  # noqa: E402

from sglang_er.config import RolloutConfig  # noqa: E402
from sglang_er.engine.controller import Controller  # noqa: E402
from sglang_er.engine.drafter import WrappedDrafter  # noqa: E402
from sglang_er.engine.provenance import Provenance  # noqa: E402
from sglang_er.engine.sampler import StepSampler  # noqa: E402
from sglang_er.engine.saved_memory import SavedMemory  # noqa: E402
from sglang_er.engine.spec_inputs import DraftState  # noqa: E402
from sglang_er.engine.stats import StepStats  # noqa: E402
from sglang_er.engine.worker import EfficientRolloutWorker  # noqa: E402
from sglang_er.rollout import machine  # noqa: E402
from sglang_er.twin.twin import Twin  # noqa: E402

CONTEXT = 4096
COMMITTED = 512
SMALL_VOCABULARY, LARGE_VOCABULARY = 320, 151936
LIMITS_MS = {1: 0.5, 64: 1.0}


now: Callable[[], float] = time.perf_counter


class Clock:
    """Seconds spent in the forwards that stand in for the model's, and in the sampler."""

    forward = 0.0
    sampler = 0.0

    @classmethod
    def reset(cls) -> None:
        cls.forward = cls.sampler = 0.0


class TimedSampler(StepSampler):
    """The engine's sampler with a clock around its two calls."""

    def draft(self, *args: Any) -> Any:
        started = now()
        tokens = super().draft(*args)
        Clock.sampler += now() - started
        return tokens

    def verify(self, *args: Any, **options: Any) -> Any:
        started = now()
        result = super().verify(*args, **options)
        Clock.sampler += now() - started
        return result


class PreparedForwards:
    """Stands in for model runner and target worker: every forward returns logits that were made before.

    Draft and target logits differ a little, so that accept lengths vary as in a server.
    """

    def __init__(self, batch_size: int, gamma: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(batch_size, vocabulary, generator=generator) * 3
        noise = torch.randn(batch_size, vocabulary, generator=generator) * 0.2
        self.draft_output = SimpleNamespace(
            logits_output=SimpleNamespace(next_token_logits=(target + noise).bfloat16().float())
        )
        self.verify_logits = target.repeat_interleave(gamma + 1, dim=0)
        self.plain_logits = target
        table = torch.arange(batch_size * CONTEXT, dtype=torch.int32).view(batch_size, CONTEXT)
        self.req_to_token_pool = SimpleNamespace(req_to_token=table)
        self.shared_read_done_event = None
        self.memory_saver_adapter = TorchMemorySaverAdapter.create(enable=False)
        self.model_runner = self
        self.device = "cpu"
        self.next_tokens = target.argmax(dim=-1)

    def forward(self, batch: Any) -> Any:
        return self.draft_output

    def forward_batch_generation(self, batch: Any, forward_batch: Any = None, is_verify: bool = False) -> Any:
        started = now()
        logits = (self.verify_logits if is_verify else self.plain_logits).clone()  # the sampler may overwrite them
        result = GenerationBatchResult(
            logits_output=SimpleNamespace(next_token_logits=logits), next_token_ids=self.next_tokens
        )
        Clock.forward += now() - started
        return result


def make_worker(batch_size: int, gamma: int, vocabulary: int) -> EfficientRolloutWorker:
    """The engine's worker without the constructor, which would load a model."""
    worker = object.__new__(EfficientRolloutWorker)
    forwards: Any = PreparedForwards(batch_size, gamma, vocabulary)
    worker.config = RolloutConfig(policy="fixed", gamma=gamma)
    worker._target_worker = worker.model_runner = forwards
    worker.device = "cpu"
    worker.speculative_num_draft_tokens = worker.config.gamma_max + 1
    worker.twin = Twin()
    worker.memory = SavedMemory(forwards)
    worker.drafter = WrappedDrafter(forwards, worker.twin, worker.config, worker.memory)
    worker.controller = Controller(worker.config, measured_on={})
    worker.stats = StepStats()
    worker.provenance = Provenance(worker.twin, worker.config)
    worker.sync = SimpleNamespace(ready=lambda: True)
    worker.sampler_cls = TimedSampler
    worker.context_len = CONTEXT
    return worker


def make_batch(batch_size: int, temperature: float) -> Any:
    """What the worker reads of a decode batch; made anew for every step, as the scheduler restores it."""
    lengths = torch.full((batch_size,), COMMITTED, dtype=torch.int64)
    request = SimpleNamespace(
        rid="request",
        sampling_params=SimpleNamespace(max_new_tokens=1024),
        output_ids=[0] * 100,
        origin_input_ids=[0] * 412,
    )
    info = SimpleNamespace(
        temperatures=torch.full((batch_size, 1), temperature or 1.0),
        top_ps=torch.ones(batch_size),
        top_ks=torch.full((batch_size,), 1 << 30, dtype=torch.int32),
        min_ps=torch.zeros(batch_size),
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        is_all_greedy=temperature == 0,
        sampling_seed=None,
        acc_additive_penalties=None,
        acc_scaling_penalties=None,
        penalizer_orchestrator=SimpleNamespace(is_required=False),
        grammars=None,
        logit_bias=None,
        has_custom_logit_processor=False,
    )
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        is_extend_in_batch=False,
        reqs=[request] * batch_size,
        sampling_info=info,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        seq_lens_sum=COMMITTED * batch_size,
        req_pool_indices=torch.arange(batch_size),
        spec_info=DraftState(torch.zeros(batch_size, dtype=torch.int64), lengths),
        spec_algorithm=SpeculativeAlgorithm.NONE,
        has_grammar=False,
        return_hidden_states=False,
        return_logprob=False,
        top_logprobs_nums=None,
        token_ids_logprobs=None,
    )


def one_step(worker: EfficientRolloutWorker, batch: Any) -> tuple[float, float]:
    """Seconds of (everything of ours, the sampler among it) in one step and in taking up its result."""
    Clock.reset()
    started = now()
    result = worker.forward_batch_generation(batch)
    worker.on_verify_complete_cpu((result.accept_lens - 1).tolist())
    return now() - started - Clock.forward, Clock.sampler


def measure(batch_size: int, gamma: int, temperature: float, vocabulary: int, steps: int) -> tuple[float, float]:
    """Median milliseconds of `steps` steps: (all of ours, the sampler)."""
    worker = make_worker(batch_size, gamma, vocabulary)
    with torch.inference_mode():
        for _ in range(max(2, steps // 10)):
            one_step(worker, make_batch(batch_size, temperature))
        times = [one_step(worker, make_batch(batch_size, temperature)) for _ in range(steps)]
    return statistics.median(t for t, _ in times) * 1e3, statistics.median(s for _, s in times) * 1e3


def verdict(limit: float | None, cells: list[tuple[float, float]]) -> str:
    """`cells`: (all of ours, the sampler) in ms. Drawing tokens is work that plain decode has as well: told apart."""
    if limit is None:
        return ""
    if max(total for total, _ in cells) <= limit:
        return f"{limit:.1f} ok"
    if max(total - sampler for total, sampler in cells) <= limit:
        return f"{limit:.1f} ok without the sampler"
    return f"{limit:.1f} OVER"


def profile(batch_size: int, gamma: int, steps: int) -> None:
    worker = make_worker(batch_size, gamma, SMALL_VOCABULARY)
    batches = [make_batch(batch_size, 1.0) for _ in range(steps)]
    profiler = cProfile.Profile()
    with torch.inference_mode():
        profiler.enable()
        for batch in batches:
            one_step(worker, batch)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--gammas", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 3, 5])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", type=int, metavar="BATCH", help="print where the time goes at this batch size")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    if args.clock == "cpu":
        if args.threads != 1:
            parser.error("--clock cpu counts one thread: add --threads 1")
        global now
        now = time.process_time
    torch.set_num_threads(args.threads)
    if args.profile:
        profile(args.profile, 3, args.steps)
        return 0

    print(
        f"{machine.look().text()}; {args.threads} threads, {args.clock} clock; {datetime.date.today()}; medians in ms"
    )
    print(f"\nA step's own Python, forwards excluded, vocabulary {SMALL_VOCABULARY} (of which the sampler)")
    print("batch  gamma         greedy  temperature 1   limit")
    over = False
    for batch_size in args.batches:
        for gamma in args.gammas:
            cells = [measure(batch_size, gamma, temp, SMALL_VOCABULARY, args.steps) for temp in (0.0, 1.0)]
            said = verdict(LIMITS_MS.get(batch_size), cells)
            over |= said.endswith("OVER")
            shown = "  ".join(f"{total:5.3f} ({sampler:5.3f})" for total, sampler in cells)
            print(f"{batch_size:5d}  {gamma:5d}  {shown}   {said}", flush=True)
    print(f"\nThe sampler alone, vocabulary {LARGE_VOCABULARY:,}")
    print("batch  gamma   greedy  temperature 1")
    for batch_size in args.batches:
        for gamma in [g for g in args.gammas if g in (1, 3)]:
            steps = max(3, min(args.steps, 200 // (batch_size * (gamma + 1))))
            cells = [measure(batch_size, gamma, temp, LARGE_VOCABULARY, steps) for temp in (0.0, 1.0)]
            print(f"{batch_size:5d}  {gamma:5d}  {cells[0][1]:7.2f}  {cells[1][1]:13.2f}", flush=True)
    print("load average after: " + " ".join(f"{value:.1f}" for value in machine.look().load))
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
