"""A whole forward of a Llama-like decoder in one native call (csrc/cpu/decoder.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sglang_er.kernels.cpu.loader import library

Fields = Mapping[str, Any]


class Decoder:
    """``decoder(batch...)`` runs embedding, layers, final norm and, if it was made with one, the lm_head.

    ``config``: integers ``hidden_size, intermediate_size, vocab_size, q_heads, kv_heads, head_dim, rotary_dim, neox,
    window, group_size, int8_activations, lm_head`` (the last four 0 or -1 where unused), floats ``eps,
    attention_scale``, tensors ``embedding [vocab, hidden]``, ``cos_sin [positions, rotary_dim]``, ``final_norm``.
    A layer: ``input_norm, post_norm``, optional ``q_norm, k_norm``, the KV pool ``keys, values [slots, kv_heads,
    head_dim]``, and the linears ``qkv, o, gate_up, down`` (the lm_head in ``config``), each as ``NAME.weight`` (exact)
    or ``NAME.packed`` and ``NAME.scales_zeros`` (W4), with an optional ``NAME.bias``.

    With a KV shadow: ``shadow_bits`` (else 0) and ``shadow_valid`` uint8 ``[slots]`` in ``config``, and the tensors of
    a ``KvShadow`` as ``shadow.NAME`` in every layer. A slot that a forward writes becomes invalid; ``shadow_valid``
    alone, without the rest, is for decoders that only write.

    All tensors are used where they lie and kept alive. Raises ValueError where shapes or dtypes do not fit.
    """

    def __init__(self, config: Fields, layers: Sequence[Fields]) -> None:
        self.hidden_size = int(config["hidden_size"])
        self.vocab_size = int(config["vocab_size"])
        self._forward = library().make_decoder(dict(config), [dict(layer) for layer in layers])

    def hidden(self, *batch: torch.Tensor) -> torch.Tensor:
        """fp32 ``[T, hidden]`` after the final norm; for ``batch`` see `logits`."""
        out = torch.empty((batch[0].shape[0], self.hidden_size), dtype=torch.float32)
        self._forward(*batch, out, None, -1, torch.get_num_threads())
        return out

    def logits(self, *batch: torch.Tensor, exact_newest: int = -1) -> torch.Tensor:
        """fp32 ``[T, vocab]``.

        ``batch`` = tokens, positions, slots int64 ``[T]``; req_to_token int32 ``[rows, columns]``; rows int64 ``[B]``,
        query_begin int64 ``[B + 1]``, context_lens int64 ``[B]`` (new tokens included). K and V of the tokens are
        written to their slots. ``exact_newest`` >= 0: older tokens than that many of a context are read from the shadow
        where it is valid. Raises ValueError for an index that is out of range; nothing is written then.
        """
        out = torch.empty((batch[0].shape[0], self.vocab_size), dtype=torch.float32)
        self._forward(*batch, None, out, exact_newest, torch.get_num_threads())
        return out
