"""The exact conditional distributions of a checkpoint, computed with transformers: shares no code with the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_er.compat import torchvision_shim

BATCH = 32


class ExactModel:
    """A checkpoint in fp32. `twin=True` replaces every linear's weight by its int4 version, as the drafter does."""

    def __init__(self, path: Path, twin: bool = False, group_size: int = 128) -> None:
        torchvision_shim.install()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if twin:
            from sglang_er.kernels import dequantize, quantize_pack

            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear):
                    packed = quantize_pack(module.weight.data, group_size, implementation="reference")
                    module.weight.data = dequantize(packed, implementation="reference").to(torch.float32)

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """For every prompt, logits [len(output), V]: row t conditions on the prompt and output[:t]."""
        for start in range(0, len(prompts), BATCH):
            pairs = list(zip(prompts[start : start + BATCH], outputs[start : start + BATCH], strict=True))
            width = max(len(prompt) + len(output) for prompt, output in pairs)
            # Padding on the right: a causal model's earlier positions do not see it.
            ids = torch.zeros(len(pairs), width, dtype=torch.int64)
            for row, (prompt, output) in enumerate(pairs):
                ids[row, : len(prompt) + len(output)] = torch.tensor([*prompt, *output])
            logits = self.model(input_ids=ids, use_cache=False).logits
            for row, (prompt, output) in enumerate(pairs):
                yield logits[row, len(prompt) - 1 : len(prompt) - 1 + len(output)].clone()

    @torch.inference_mode()
    def draft_logprobs(
        self, policy: ExactModel, context: Sequence[int], drafts: Sequence[int], temperature: float
    ) -> torch.Tensor:
        """[len(drafts)] of a twin that drafts behind `context`: it reads the policy's KV of all tokens but the last."""
        cache = policy.model(input_ids=torch.tensor([list(context[:-1])])).past_key_values
        tokens = torch.tensor([[context[-1], *drafts]])
        logits = self.model(input_ids=tokens[:, :-1], past_key_values=cache).logits[0]
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        return logprobs.gather(1, tokens[0, 1:, None]).squeeze(1)


def sglang_probs(logits: torch.Tensor, sampling: Mapping[str, Any]) -> torch.Tensor:
    """Probabilities [N, V] in float64 that plain SGLang samples from, its filters applied by its own function."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    probs = torch.softmax(logits / sampling.get("temperature", 1.0), dim=-1)
    if not {"top_p", "top_k", "min_p"} & set(sampling):
        return probs.to(torch.float64)
    rows = len(probs)
    _, kept, order, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        torch.full((rows,), sampling.get("top_k", 1 << 30), dtype=torch.int32),
        torch.full((rows,), sampling.get("top_p", 1.0)),
        torch.full((rows,), sampling.get("min_p", 0.0)),
        "min_p" in sampling,
        None,
        None,
        return_filtered_probs=True,
    )
    kept = kept.to(torch.float64)
    kept /= kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order.to(torch.int64), kept)
