"""Prometheus metrics of the twin, on SGLang's own /metrics (with --enable-metrics)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_er.engine import compat

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.policy.health import DraftHealth
    from sglang_er.twin.twin import Twin

# name -> help; `publish` has their values in this order
_GAUGES = {
    "weight_epoch": "weight updates that the policy has seen",
    "twin_epoch": "weight epoch that the 4-bit twin was made from",
    "speculation_off": "1 while a health alarm keeps speculation off",
}
_COUNTERS = {
    "requantizations": "how often the 4-bit twin was remade",
    "requantize_seconds": "time spent in that",
    "undeclared_weight_writes": "writes of the policy's weights that no update call announced",
    "health_alarms": "how often drafts became useless and speculation was turned off",
}


class SyncMetrics:
    """Publishes totals since start-up; without Prometheus (`labels` None) it does nothing."""

    def __init__(self, labels: dict[str, str] | None = None) -> None:
        self._gauges: list[Any] = []
        self._counters: list[Any] = []
        self._counted: list[float] = [0.0] * len(_COUNTERS)
        if labels is None:
            return
        # Not before SGLang has chosen the directory of the multi-process mode.
        from prometheus_client import Counter, Gauge

        names = list(labels)
        for name, text in _GAUGES.items():
            gauge = Gauge(f"sglang_er:{name}", text, names, multiprocess_mode="mostrecent")
            self._gauges.append(gauge.labels(**labels))
        for name, text in _COUNTERS.items():
            self._counters.append(Counter(f"sglang_er:{name}", text, names).labels(**labels))

    def publish(self, twin: Twin, undeclared_writes: int, health: DraftHealth) -> None:
        states = (twin.weight_epoch, twin.twin_epoch, not health.allows())
        totals = (twin.requantizations, twin.requantize_seconds, undeclared_writes, health.alarms)
        for gauge, state in zip(self._gauges, states):
            gauge.set(float(state))
        for index, (counter, total) in enumerate(zip(self._counters, totals)):
            counter.inc(total - self._counted[index])
            self._counted[index] = total


def make_metrics(runner: ModelRunner) -> SyncMetrics:
    """One set an engine: its tensor-parallel ranks do the same."""
    tp_rank, dp_rank = compat.adapter().ranks(runner)
    if not runner.server_args.enable_metrics or tp_rank > 0:
        return SyncMetrics()
    return SyncMetrics({"model_name": str(runner.server_args.served_model_name), "dp_rank": str(dp_rank or 0)})
