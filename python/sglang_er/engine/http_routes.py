"""Admin endpoints on SGLang's own HTTP server: GET /er/state, POST /er/policy.

They ride on SGLang's internal-state requests, which reach the scheduler of every data-parallel engine.
"""

from __future__ import annotations

import json
from typing import Any

# At module level: FastAPI resolves the endpoints' annotations in this namespace.
from fastapi import Request
from fastapi.responses import JSONResponse
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_er.engine.hooks import COMMAND_PREFIX


def add_routes(http_server: Any) -> None:
    """`http_server` is the imported module sglang.srt.entrypoints.http_server; adding twice does nothing."""
    app = http_server.app
    if any(getattr(route, "path", None) == "/er/state" for route in app.routes):
        return

    async def states() -> list[dict[str, Any]]:
        internal = await http_server._global_state.tokenizer_manager.get_internal_state()
        return [state["sglang_er"] for state in internal if "sglang_er" in state]

    @app.get("/er/state")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def er_state() -> JSONResponse:
        """Resolved config, twin and step counters of every engine."""
        found = await states()
        if not found:
            return JSONResponse({"error": "this server runs without EFFICIENT_ROLLOUT"}, status_code=404)
        return JSONResponse({"engines": found})

    @app.post("/er/policy")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def er_policy(request: Request) -> JSONResponse:
        """Switch the policy on an idle server: {"policy": "fixed", "gamma": 3}, {"policy": "off"}, ..."""
        try:
            changes = json.loads(await request.body() or b"{}")
        except json.JSONDecodeError as error:
            return JSONResponse({"error": f"the body is not JSON: {error}"}, status_code=400)
        if not isinstance(changes, dict):
            return JSONResponse({"error": "the body must be a JSON object of policy fields"}, status_code=400)
        command = SetInternalStateReq(server_args={COMMAND_PREFIX + json.dumps(changes): 1})
        manager = http_server._global_state.tokenizer_manager
        updated = await manager.set_internal_state(command)
        found = await states()
        if not all(updated) or not found:
            failed = next((s["last_command"] for s in found if not (s["last_command"] or {}).get("ok")), None)
            failed = failed or {"status": 404, "error": "this server runs without EFFICIENT_ROLLOUT"}
            return JSONResponse({"error": failed["error"]}, status_code=failed["status"])
        return JSONResponse({"engines": found})
