"""The distribution that SGLang's standard sampler draws from: temperature, then top-k, top-p and min-p.

Order and boundaries are those of SGLang 0.5.21's `pytorch` sampling backend: all three filters look at the
temperature-scaled softmax, sorted once; top-p keeps a token while the mass strictly before it does not exceed
p; min-p keeps tokens of at least min_p times the largest probability; what is left is renormalized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_er import kernels
from sglang_er.kernels.ranked_filters import filter_ranked


class FilterParams(NamedTuple):
    """Sampling parameters of R rows: temperatures [R, 1], top_ps [R], top_ks [R] (int32), min_ps [R].

    The `need_*` flags say whether any row uses the filter; without any, no sort is done.
    """

    temperatures: torch.Tensor
    top_ps: torch.Tensor
    top_ks: torch.Tensor
    min_ps: torch.Tensor
    need_top_p: bool
    need_top_k: bool
    need_min_p: bool

    @property
    def unfiltered(self) -> bool:
        """Temperature alone."""
        return not (self.need_top_p or self.need_top_k or self.need_min_p)

    def rows(self, index: torch.Tensor) -> FilterParams:
        """The same parameters for the rows that `index` (int64) selects."""
        return self._replace(
            temperatures=self.temperatures[index],
            top_ps=self.top_ps[index],
            top_ks=self.top_ks[index],
            min_ps=self.min_ps[index],
        )

    def repeat(self, times: int) -> FilterParams:
        """Every row `times` times in a row, as the verify pass lays its logits out."""
        return self._replace(
            temperatures=self.temperatures.repeat_interleave(times, dim=0),
            top_ps=self.top_ps.repeat_interleave(times),
            top_ks=self.top_ks.repeat_interleave(times),
            min_ps=self.min_ps.repeat_interleave(times),
        )


def filtered_probs(logits: torch.Tensor, params: FilterParams, in_place: bool = False) -> torch.Tensor:
    """logits [R, V] -> probabilities fp32 [R, V], zero outside the filters' support. `logits` is left alone, unless
    `in_place` allows to overwrite it: a fresh tensor of tens of megabytes costs more than what is written to it."""
    if params.unfiltered:
        out = logits if in_place and logits.dtype == torch.float32 and logits.is_contiguous() else None
        return kernels.softmax_rows(logits, params.temperatures.flatten(), out)
    # What lies on a filter's boundary is decided by the last bit, so here it is SGLang's own arithmetic.
    probs = torch.softmax(logits.float() / params.temperatures, dim=-1)
    return filter_ranked(probs, params.top_ks, params.top_ps, params.min_ps if params.need_min_p else None)
