"""What RL frameworks expect of the weight endpoints and stock SGLang 0.5.21 lacks; the scheduler's side.

sessions  update_weights_from_tensor and _from_distributed without begin_weight_update: one is opened around the call.
memory    releasing what is released and resuming what is resident succeeds and does nothing.
guard     a request that would end the scheduler process with an exception is answered with success=false.

Each part is one name in the option `rl_compat` and does nothing for a server that runs without EFFICIENT_ROLLOUT.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers import io_struct
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_er.engine import compat, saved_memory
from sglang_er.engine.hooks import worker_of
from sglang_er.engine.rl_compat_http import say_once

logger = logging.getLogger(__name__)

UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
WITHOUT_SESSION = ("update_weights_from_tensor", "update_weights_from_distributed")
# method -> its reply; where there are sessions, theirs too
REPLIES = {
    "update_weights_from_disk": io_struct.UpdateWeightFromDiskReqOutput,
    "update_weights_from_tensor": io_struct.UpdateWeightsFromTensorReqOutput,
    "update_weights_from_distributed": io_struct.UpdateWeightsFromDistributedReqOutput,
    "update_weights_from_ipc": io_struct.UpdateWeightsFromIPCReqOutput,
    "init_weights_update_group": io_struct.InitWeightsUpdateGroupReqOutput,
    "destroy_weights_update_group": io_struct.DestroyWeightsUpdateGroupReqOutput,
}
SESSION_REPLIES = {"begin_weight_update": "BeginWeightUpdateReqOutput", "end_weight_update": "EndWeightUpdateReqOutput"}


def register() -> None:
    has_sessions = compat.adapter().has_sessions
    replies = dict(REPLIES)
    if has_sessions:
        replies |= {name: getattr(io_struct, reply) for name, reply in SESSION_REPLIES.items()}
    for name, reply in replies.items():
        opens = has_sessions and name in WITHOUT_SESSION
        HookRegistry.register(f"{UPDATER}.{name}", _update_hook(name, reply, opens), HookType.AROUND)
    HookRegistry.register(f"{UPDATER}.release_memory_occupation", _release, HookType.AROUND)
    HookRegistry.register(f"{UPDATER}.resume_memory_occupation", _resume, HookType.AROUND)


# -- weight updates ------------------------------------------------------------------------------------------------


def _update_hook(name: str, reply: Callable[..., Any], opens_session: bool) -> Callable[..., Any]:
    def hook(original: Callable[..., Any], updater: Any, request: Any) -> Any:
        worker = worker_of(updater)
        if worker is None:
            return original(updater, request)
        parts = worker.sync.config.rl_compat
        if "guard" in parts and (problem := _refusal(updater, request)):
            return reply(success=False, message=problem)
        try:
            if opens_session and "sessions" in parts and updater._session is None:
                return _in_session(original, updater, request)
            return original(updater, request)
        except Exception as error:
            if "guard" not in parts:
                raise
            logger.exception("sglang-er: %s failed; stock SGLang would have ended here", name)
            if getattr(request, "flush_cache", False):
                # The weights may be half new: KV of the old ones must not be mixed with them.
                updater.flush_cache(empty_cache=request.torch_empty_cache)
            if name == "update_weights_from_tensor":
                torch.distributed.barrier(group=updater.tp_cpu_group)  # where the other ranks wait for this one
            return reply(success=False, message=_explain(name, error))

    return hook


def _explain(name: str, error: Exception) -> str:
    message = f"{name} failed: {type(error).__name__}: {str(error).strip() or 'no further message'}"
    if name.startswith("update_weights"):
        message += ". Part of the weights may be new: send the whole update again"
    return message


def _refusal(updater: Any, request: Any) -> str | None:
    """Why this update must not begin: SGLang would write the weights and then fail an assertion on the flush."""
    if not getattr(request, "flush_cache", False):
        return None
    if _is_idle(updater):
        return None
    return (
        "flush_cache=true while requests are running: nothing was updated. Pause with mode abort or retract first, "
        "or send flush_cache=false"
    )


def _is_idle(updater: Any) -> bool:
    """What is left of requests that are finished is brought to its end first."""
    adapter = compat.adapter()
    if adapter.is_idle(updater):
        return True
    adapter.settle(updater)
    return adapter.is_idle(updater)


def _in_session(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    say_once("sessions", "a weight update came without begin_weight_update: a session is opened around it")
    began = updater.begin_weight_update(io_struct.BeginWeightUpdateReqInput(selector=request.selector))
    if not began.success:
        return original(updater, request)  # says why
    try:
        reply = original(updater, request)
    finally:
        ended = updater.end_weight_update(io_struct.EndWeightUpdateReqInput())
    if reply.success and not ended.success:
        return msgspec.structs.replace(reply, success=False, message=ended.message)
    return reply


# -- memory --------------------------------------------------------------------------------------------------------
# The replies have no field for an error. `rid` is unused in them and reaches the HTTP side (rl_compat_http.py).


def _release(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    worker = worker_of(updater)
    if worker is None:
        return original(updater, request)
    parts = worker.sync.config.rl_compat
    tags = list(request.tags or GPU_MEMORY_ALL_TYPES)
    if "guard" in parts:
        problem = _unknown(tags)
        if not problem and not _is_idle(updater):
            problem = "requests are running: pause generation (or wait) before releasing memory"
        if problem:
            return io_struct.ReleaseMemoryOccupationReqOutput(rid=problem)
    if "memory" in parts:
        tags = [tag for tag in tags if tag not in updater.offload_tags]
        if not tags:
            say_once("memory", "release of memory that is released: nothing to do")
            return io_struct.ReleaseMemoryOccupationReqOutput()
    saved_memory.released(worker, tags)
    return original(updater, msgspec.structs.replace(request, tags=tags))


def _resume(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    worker = worker_of(updater)
    if worker is None:
        return original(updater, request)
    parts = worker.sync.config.rl_compat
    tags = list(request.tags or GPU_MEMORY_ALL_TYPES)
    if "guard" in parts and (problem := _unknown(tags)):
        return io_struct.ResumeMemoryOccupationReqOutput(rid=problem)
    if "memory" in parts:
        tags = [tag for tag in tags if tag in updater.offload_tags]
        if not tags:
            say_once("memory", "resume of memory that is not released: nothing to do")
            return io_struct.ResumeMemoryOccupationReqOutput()
    resident = sorted(set(tags) - set(updater.offload_tags))
    if "guard" in parts and resident:
        return io_struct.ResumeMemoryOccupationReqOutput(rid=f"not released: {', '.join(resident)}")
    reply = original(updater, msgspec.structs.replace(request, tags=tags))
    saved_memory.resumed(worker, tags)
    return reply


def _unknown(tags: list[str]) -> str | None:
    unknown = sorted(set(tags) - set(GPU_MEMORY_ALL_TYPES))
    return f"unknown tags {', '.join(unknown)}: choose from {', '.join(GPU_MEMORY_ALL_TYPES)}" if unknown else None
