"""The native executor: decode, verify and draft forwards of Llama-like models in one compiled call each.

Prefill and every other model run through SGLang's own modules. Both ways write the same KV pool, so a request may
change from one to the other at any forward.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from sglang_er.engine.cpu import decoder_model, huge_pages
from sglang_er.engine.cpu.decoder_model import AddressWatch, UnsupportedModelError
from sglang_er.engine.dual_precision import LM_HEAD, DualPrecisionMethod
from sglang_er.engine.pool_watch import FORWARDS, OTHERS, shadow_pool, watch_pool
from sglang_er.kernels import PackedWeight
from sglang_er.kernels.cpu.decoder import Decoder
from sglang_er.kernels.kv_shadow import LEVELS
from sglang_er.twin.kv_shadow import EXACT_NEWEST, ShadowPool, shadow_format

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.config import RolloutConfig
    from sglang_er.engine.forward import Chain
    from sglang_er.twin.packed_linear import PackedLinear
    from sglang_er.twin.twin import Twin

logger = logging.getLogger(__name__)

SHADOW_TENSORS = ("keys", "values", "key_scales", "value_scales")

# Whether attention and linear layers outside the executor use our kernels (`patches.py` asks); one engine per process.
own_kernels = True


def configure_kernels(config: RolloutConfig) -> None:
    global own_kernels
    own_kernels = config.executor == "native" and config.own_kernels


class NativeExecutor:
    """One per model runner. `forwards` counts which way every decode, verify and draft forward took."""

    def __init__(self, runner: ModelRunner, config: RolloutConfig) -> None:
        self.runner = runner
        self.configure(config)
        self.forwards: Counter[str] = Counter()
        self._watch: AddressWatch | None = None
        self._target: Decoder | None = None
        self._exact_newest = -1
        self._wrapped_body = runner.model.model.forward
        self._query_begins: dict[tuple[int, int], torch.Tensor] = {}
        # An instance attribute, found before the class's method by Module.__call__.
        runner.model.model.forward = self._body_forward

    def configure(self, config: RolloutConfig) -> None:
        """Options changed; the server is idle."""
        self.enabled = config.executor == "native"
        configure_kernels(config)
        self._group_size = config.group_size
        self._int8_activations = config.draft_activations == "int8"
        self._shadow_format = shadow_format(config, "cpu")
        self._shadow_from = config.kv_shadow_from
        self.shadow: ShadowPool | None = None
        self._draft: Decoder | None = None

    # -- target --------------------------------------------------------------------------------------------------

    def _body_forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
        **rest: Any,
    ) -> Any:
        """The model without its lm_head -> hidden states after the final norm, fp32 from the native path."""
        mode = forward_batch.forward_mode
        short = mode.is_decode() or mode.is_target_verify()
        plain = input_embeds is None and pp_proxy_tensors is None and not rest and input_ids.numel() > 0
        decoder = self._target_decoder() if self.enabled and short and plain else None
        if decoder is None:
            self.forwards["target_wrapped"] += short
            return self._wrapped_body(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors, **rest)
        width = forward_batch.spec_info.num_tokens_per_req if mode.is_target_verify() else 1
        context_lens = forward_batch.seq_lens if width == 1 else forward_batch.seq_lens + width
        self.forwards["target_native"] += 1
        return decoder.hidden(
            *self._batch(
                input_ids, positions, forward_batch.out_cache_loc, forward_batch.req_pool_indices, context_lens
            )
        )

    def _target_decoder(self) -> Decoder | None:
        """None, said once, if the model or its KV pool turns out to be something else than `install` saw."""
        try:
            if self._moved() or self._target is None:
                decoder_model.check(self.runner.model)
                pool = self.runner.token_to_kv_pool
                config, layers = decoder_model.read(self.runner.model, pool, decoder_model.exact, None)
                huge_pages.back_and_say("weights and KV pool", decoder_model.tensors(config, layers))
                self._target = Decoder({**config, "shadow_valid": self._valid}, layers)
        except (UnsupportedModelError, ValueError, TypeError, AttributeError) as error:
            _say_wrapped(error)
            self.enabled = False
        return self._target

    def _moved(self) -> bool:
        """Parameters or KV pool lie elsewhere than when the decoders were made; both are forgotten then."""
        if self._watch is None:
            self._watch = AddressWatch(self.runner.model, self.runner.token_to_kv_pool)
            # The native decoder clears the flags of what it writes itself.
            self._valid = watch_pool(self.runner.token_to_kv_pool, FORWARDS | OTHERS)
            return True
        if not self._watch.moved():
            return False
        self._target = self._draft = self.shadow = None
        self._valid.zero_()
        return True

    # -- draft ---------------------------------------------------------------------------------------------------

    def prepare_draft(self, twin: Twin, chain: Chain) -> bool:
        """Once per draft pass, before `draft_logits`; False if the executor cannot draft for this model."""
        # Together or not at all: the draft reads the same modules.
        if self._target_decoder() is None:
            return False
        self._exact_newest = -1
        if self._shadow_format and int(chain.committed.sum()) >= self._shadow_from and self._make_shadow():
            assert self.shadow is not None
            table = self.runner.req_to_token_pool.req_to_token
            self.shadow.refresh(table, chain.req_pool_indices, chain.committed)
            self._exact_newest = EXACT_NEWEST
        if self._draft is None:
            try:
                self._draft = self._make_draft(twin)
            except UnsupportedModelError as error:
                _say_wrapped(error)
                self.enabled = False
                return False
        return True

    def _make_draft(self, twin: Twin) -> Decoder:
        model = self.runner.model
        head = next((layer for layer in twin.layers if layer.name == LM_HEAD), None)
        lm_head = decoder_model.exact(model.lm_head) if head is None else _packed(head)
        config, layers = decoder_model.read(model, self.runner.token_to_kv_pool, _twin_linear, lm_head)
        config |= {
            "group_size": self._group_size,
            "int8_activations": int(self._int8_activations),
            "shadow_valid": self._valid,
        }
        if self.shadow is not None:
            config["shadow_bits"] = LEVELS[self.shadow.format].bits
            for layer, shadow in zip(layers, self.shadow.layers, strict=True):
                layer |= {f"shadow.{name}": getattr(shadow, name) for name in SHADOW_TENSORS}
        huge_pages.back_and_say("twin and KV pool", decoder_model.tensors(config, layers))
        return Decoder(config, layers)

    def _make_shadow(self) -> bool:
        """Allocate the shadow at its first use; False (said once) where it cannot be had."""
        if self.shadow is not None:
            return True
        assert self._shadow_format is not None
        try:
            self.shadow = shadow_pool(self.runner, self._valid, self._shadow_format)
        except (ValueError, RuntimeError) as error:
            logger.warning("sglang-er: no KV shadow, drafts read the KV pool itself: %s", str(error).splitlines()[0])
            self._shadow_format = None
            return False
        logger.info("sglang-er: KV shadow in %s, %.1f MB", self.shadow.format, self.shadow.nbytes / 1e6)
        self._draft = None
        return True

    def forget_kv(self) -> None:
        """The KV pool holds something else now than was quantized."""
        if self._watch is not None:
            self._valid.zero_()

    def draft_logits(self, chain: Chain, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V] after `tokens` int64 [B] at position committed + step."""
        assert self._draft is not None
        self.forwards["draft_native"] += 1
        positions = chain.committed + step
        batch = self._batch(tokens, positions, chain.slots[:, step], chain.req_pool_indices, positions + 1)
        logits = self._draft.logits(*batch, exact_newest=self._exact_newest)
        vocab_size = self.runner.model_config.vocab_size
        return logits if logits.shape[1] == vocab_size else logits[:, :vocab_size]

    # -- both ----------------------------------------------------------------------------------------------------

    def _batch(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rows: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        requests = rows.shape[0]
        width = tokens.shape[0] // requests
        query_begin = self._query_begins.get((requests, width))
        if query_begin is None:
            query_begin = torch.arange(0, requests * width + 1, width)
            self._query_begins[(requests, width)] = query_begin
        return (
            tokens.to(torch.int64).contiguous(),
            positions.to(torch.int64).contiguous(),
            slots.to(torch.int64).contiguous(),
            self.runner.req_to_token_pool.req_to_token,
            rows.to(torch.int64).contiguous(),
            query_begin,
            context_lens.to(torch.int64).contiguous(),
        )


def _packed(layer: PackedLinear) -> dict[str, Any]:
    if not isinstance(layer.packed, PackedWeight):
        raise UnsupportedModelError(f"the twin's {layer.name} is packed in the layout {layer.layout}")
    return {"packed": layer.packed.packed, "scales_zeros": layer.packed.scales_zeros}


def _twin_linear(module: Any) -> dict[str, Any]:
    method = module.quant_method
    return _packed(method.packed) if isinstance(method, DualPrecisionMethod) else decoder_model.exact(module)


def _say_wrapped(reason: Exception) -> None:
    why = str(reason).splitlines()[0]
    logger.warning("sglang-er: decode, verify and draft run through SGLang's model code: %s", why)


def install(runner: ModelRunner, config: RolloutConfig) -> None:
    """Give `runner` its executor, as `runner.sglang_er_executor`, if it knows the model."""
    try:
        decoder_model.check(runner.model)
    except UnsupportedModelError as reason:
        _say_wrapped(reason)
        return
    runner.sglang_er_executor = NativeExecutor(runner, config)
    logger.info("sglang-er: decode, verify and draft forwards run in the native executor")
