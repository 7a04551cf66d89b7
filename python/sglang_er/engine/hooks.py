"""Hooks on SGLang's own functions that the algorithm needs on every device (SGLang's HookRegistry applies them).

All of them do nothing in a server that runs without EFFICIENT_ROLLOUT.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_er.config import ConfigError, from_env
from sglang_er.engine import compat
from sglang_er.engine.algorithm import ALGORITHM

logger = logging.getLogger(__name__)

# SGLang's state request carries only numbers as values, so a command travels in the key.
COMMAND_PREFIX = "sglang_er:"
TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
CELL_BYTES = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
SAMPLING_PARAMS = "sglang.srt.sampling.sampling_params.SamplingParams"


def register() -> None:
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    adapter = compat.adapter()
    adapter.register_hooks()
    HookRegistry.register(adapter.row_headroom, _row_headroom, HookType.AFTER)
    HookRegistry.register(CELL_BYTES, _cell_with_shadow, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.get_internal_state", _add_state, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.set_internal_state", _take_command, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.continue_generation", _generation_continued, HookType.AFTER)
    HookRegistry.register(f"{SAMPLING_PARAMS}.verify", _refuse_seeded_min_p, HookType.AFTER)
    HookRegistry.register(f"{TOKENIZER_MANAGER}._validate_one_request", _refuse_unknown_tokens, HookType.AFTER)


def _row_headroom(extra: int, *_: Any, **__: Any) -> int:
    """req_to_token rows must hold the reserve that is written behind the context end.

    Upstream's formula is short for a custom algorithm with page size 1: the slot writer would then run into the
    next request's row without an error (facts: row overflow).
    """
    adapter = compat.adapter()
    return max(extra, adapter.row_reserve()) if adapter.served_algorithm() == ALGORITHM else extra


def _cell_with_shadow(cell_bytes: int, _configurator: Any, pools: Any, *_: Any, **__: Any) -> int:
    """--mem-fraction-static is for the KV pool and the shadow together."""
    if compat.adapter().served_algorithm() != ALGORITHM:
        return cell_bytes
    from sglang_er.engine.written_shadow import longest_context, with_shadow

    model = pools.model_config
    longest = longest_context(int(model.context_len), *compat.adapter().request_limits())
    return with_shadow(cell_bytes, from_env(), str(pools.device), int(model.head_dim), pools.kv_cache_dtype, longest)


def worker_of(scheduler: Any) -> Any:
    """Our worker behind SGLang's Scheduler or weight updater; None in a server that runs without us."""
    worker = getattr(scheduler, "draft_worker", None)
    return worker if hasattr(worker, "set_policy") else None


def _add_state(output: Any, scheduler: Any, *_: Any, **__: Any) -> Any:
    worker = worker_of(scheduler)
    if worker is not None:
        output.internal_state["sglang_er"] = {
            **worker.describe(),
            "last_command": getattr(scheduler, "_sglang_er_last_command", None),
        }
    return output


def _take_command(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Commands of our admin endpoints; everything else goes to SGLang."""
    keys = [key for key in request.server_args if key.startswith(COMMAND_PREFIX)]
    if not keys:
        return original(scheduler, request)
    outcome = _run_command(scheduler, json.loads(keys[0][len(COMMAND_PREFIX) :]))
    scheduler._sglang_er_last_command = outcome
    return compat.adapter().state_request_done(outcome["ok"])


def _run_command(scheduler: Any, command: dict[str, Any]) -> dict[str, Any]:
    worker = worker_of(scheduler)
    if worker is None:
        return {"ok": False, "status": 400, "error": f"this server runs without {ALGORITHM}"}
    if "requantize" in command:
        try:
            return {"ok": True, "status": 200, "error": None, "requantized": worker.sync.requantize_now()}
        except RuntimeError as error:
            return {"ok": False, "status": 409, "error": str(error)}
    if not scheduler.is_fully_idle():
        return {"ok": False, "status": 409, "error": "requests are running: switch the policy when the server is idle"}
    try:
        worker.set_policy(command["policy"])
    except ConfigError as error:
        return {"ok": False, "status": 400, "error": str(error)}
    logger.info("sglang-er: policy switched to %s", worker.controller.policy.describe())
    return {"ok": True, "status": 200, "error": None}


def _generation_continued(result: Any, scheduler: Any, *_: Any, **__: Any) -> Any:
    worker = worker_of(scheduler)
    if worker is not None:
        worker.sync.continued()
    return result


def _refuse_seeded_min_p(result: Any, params: Any, *_: Any, **__: Any) -> Any:
    """SGLang's seeded torch sampler asserts that no request has min_p; the assertion would end the server.

    Checked where the request is parsed, so that the client gets a 400.
    """
    if params.min_p > 0 and compat.adapter().deterministic():
        raise ValueError("min_p cannot be used with --enable-deterministic-inference: SGLang has no seeded min_p")
    return result


def _refuse_unknown_tokens(result: Any, manager: Any, request: Any, input_ids: list[int] | None, *_: Any) -> Any:
    """A token id outside the vocabulary would end the scheduler in the embedding; the client gets a 400 instead."""
    vocab_size = manager.model_config.vocab_size
    if input_ids and not 0 <= min(input_ids) <= max(input_ids) < vocab_size:
        raise ValueError(f"input_ids must be in 0..{vocab_size - 1}, got {min(input_ids)}..{max(input_ids)}")
    return result
