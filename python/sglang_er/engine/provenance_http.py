"""The HTTP process's side of the option `provenance`: who may ask, and what SGLang leaves to be put right.

SGLang pads the per-token fields of one request to all others of a batch, and an abort in the queue lacks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_er.config import from_env
from sglang_er.engine import compat
from sglang_er.engine.algorithm import ALGORITHM
from sglang_er.engine.provenance import KEYS, REQUEST_KEY, asks

TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_mode: str | None = None


def register() -> None:
    if not compat.adapter().has_auxiliary_output:
        return
    HookRegistry.register(f"{TOKENIZER_MANAGER}._validate_one_request", _refuse_where_off, HookType.AFTER)
    HookRegistry.register(f"{TOKENIZER_MANAGER}.update_request_meta_info", _remove_padding, HookType.AFTER)
    HookRegistry.register(f"{TOKENIZER_MANAGER}._handle_abort_req", _complete_abort, HookType.AROUND)


def configure(mode: str) -> None:
    """The option was switched while the server lives."""
    global _mode
    _mode = mode


def _in_force() -> str | None:
    """The option's value; None in a server that runs without us."""
    if _mode is None:
        configure(from_env().provenance)
    return _mode if compat.adapter().served_algorithm() == ALGORITHM else None


def _asks(request: Any) -> bool:
    sampling = getattr(request, "sampling_params", None)
    return isinstance(sampling, dict) and asks(sampling.get("custom_params"))


def _refuse_where_off(result: Any, manager: Any, request: Any, *_: Any, **__: Any) -> Any:
    del manager
    if _asks(request) and _in_force() == "off":
        raise ValueError(f"{REQUEST_KEY}: off on this server; start it with --er-provenance request, or all")
    return result


def _remove_padding(result: Any, manager: Any, meta_info: dict[str, Any], state: Any, *_: Any, **__: Any) -> Any:
    del manager
    if _in_force() == "request" and not _asks(state.obj):
        for key in KEYS:
            meta_info.pop(key, None)
            state.customized_info_accumulated.pop(key, None)
    return result


def _complete_abort(original: Callable[..., Any], manager: Any, aborted: Any, *_: Any, **__: Any) -> Any:
    """A request that ends in the queue, new or retracted: its reply is made here, not from the scheduler's output."""
    state = manager.rid_to_state.get(aborted.rid)
    result = original(manager, aborted)
    mode = _in_force()
    if state is not None and state.out_list and (mode == "all" or (mode == "request" and _asks(state.obj))):
        reply = state.out_list[-1]
        for key in KEYS:
            values = state.customized_info_accumulated.get(key, [])
            reply["meta_info"][key] = values[len(values) - len(reply["output_ids"]) :]
    return result
