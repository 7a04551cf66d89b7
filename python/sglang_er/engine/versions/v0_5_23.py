"""SGLang 0.5.23: as 0.5.21 in all that engine/ touches, but for ranks: one context holds them, layers know groups."""

from __future__ import annotations

from typing import Any

from sglang_er.engine.versions.v0_5_21 import Sglang0521


class Sglang0523(Sglang0521):
    versions = ("0.5.23",)

    def ranks(self, runner: Any) -> tuple[int, int | None]:
        from sglang.srt.runtime_context import get_parallel

        del runner
        parallel = get_parallel()
        return parallel.tp_rank, parallel.dp_rank

    def shards(self, linear: Any) -> int:
        return 1 if linear.tp_group is None else int(linear.tp_group.world_size)
