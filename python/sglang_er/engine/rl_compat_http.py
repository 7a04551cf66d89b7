"""The HTTP process's side of `rl_compat`: refusals become status codes, old metric keys stand beside the new ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_er.config import from_env
from sglang_er.engine import compat
from sglang_er.engine.algorithm import ALGORITHM

logger = logging.getLogger(__name__)

TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
# SGLang's present key in meta_info -> the one up to 0.5.10, which slime, miles and verl still read
OLD_KEYS = {"spec_num_correct_drafts": "spec_accept_token_num", "spec_num_proposed_drafts": "spec_draft_token_num"}
_parts: frozenset[str] | None = None
_said: set[str] = set()


def register() -> None:
    HookRegistry.register(f"{TOKENIZER_MANAGER}._calculate_spec_decoding_metrics", _add_old_keys, HookType.AFTER)
    for name in ("release_memory_occupation", "resume_memory_occupation"):
        HookRegistry.register(f"{CONTROL}.{name}", _memory_hook(f"{name}_communicator"), HookType.AROUND)


def configure(parts: Iterable[str]) -> None:
    """The option was switched while the server lives."""
    global _parts
    _parts = frozenset(parts)


def active(part: str) -> bool:
    """Whether this server speculates with us and has this part on."""
    if _parts is None:
        configure(from_env().rl_compat)
    return part in (_parts or ()) and compat.adapter().served_algorithm() == ALGORITHM


def say_once(part: str, message: str) -> None:
    if part not in _said:
        _said.add(part)
        logger.info("sglang-er: %s (option rl_compat, part %s; said once)", message, part)


def _add_old_keys(result: Any, manager: Any, meta_info: dict[str, Any], *_: Any, **__: Any) -> Any:
    del manager
    if active("spec_keys"):
        for key, old in OLD_KEYS.items():
            if key in meta_info:
                meta_info.setdefault(old, meta_info[key])
                say_once("spec_keys", f"meta_info has {' and '.join(OLD_KEYS.values())} too")
    return result


def _memory_hook(communicator: str) -> Callable[..., Any]:
    async def hook(original: Callable[..., Any], manager: Any, request: Any, *_: Any, **__: Any) -> None:
        """As the original, which looks at no reply; here a refusal in one (rl_compat.py) becomes a 400."""
        del original
        manager.auto_create_handle_loop()
        refused = [reply.rid for reply in await getattr(manager, communicator)(request) if reply.rid]
        if refused:
            raise ValueError(refused[0])

    return hook
