"""FutureMap for overlap scheduling on devices without streams.

Upstream gathers the relayed tokens after `Tensor.record_stream`, which a CPU tensor does not have; everything
else of the map works there. On CUDA the stock map is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.overlap_utils import FutureMap

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class HostFutureMap(FutureMap):
    def _resolve_spec_extras(self, batch: ScheduleBatch) -> None:
        """Fill in the carried bonus tokens of a decode batch from the relay buffer."""
        state = batch.spec_info
        if state is None or state.future_indices is None or state.future_indices.shape[0] == 0:
            return
        state.bonus_tokens = self.output_tokens_buf[state.future_indices]


def make_future_map(device: Any, *args: Any, **kwargs: Any) -> FutureMap:
    cls = HostFutureMap if str(device).startswith("cpu") else FutureMap
    return cls(device, *args, **kwargs)
