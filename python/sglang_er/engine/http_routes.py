"""Endpoints on SGLang's own HTTP server: GET /er/state, POST /er/policy, POST /er/requantize, GET /get_weight_version.

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

from sglang_er.engine import compat, provenance_http, rl_compat_http
from sglang_er.engine.hooks import COMMAND_PREFIX


def add_routes(http_server: Any) -> None:
    """`http_server` is the imported module sglang.srt.entrypoints.http_server; adding twice does nothing."""
    app = http_server.app
    if any(getattr(route, "path", None) == "/er/state" for route in app.routes):
        return

    async def states() -> list[dict[str, Any]]:
        internal = await http_server._global_state.tokenizer_manager.get_internal_state()
        return [state["sglang_er"] for state in internal if "sglang_er" in state]

    async def run(command: dict[str, Any]) -> tuple[JSONResponse | None, list[dict[str, Any]]]:
        """(what went wrong or None, states of the engines afterwards)"""
        request = SetInternalStateReq(server_args={COMMAND_PREFIX + json.dumps(command): 1})
        updated = await http_server._global_state.tokenizer_manager.set_internal_state(request)
        found = await states()
        if all(updated) and found:
            return None, found
        failed = next((s["last_command"] for s in found if not (s["last_command"] or {}).get("ok")), None)
        failed = failed or {"status": 404, "error": "this server runs without EFFICIENT_ROLLOUT"}
        return JSONResponse({"error": failed["error"]}, status_code=failed["status"]), found

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
        failed, found = await run({"policy": changes})
        if failed is not None:
            return failed
        values = found[0]["config"]["values"]
        rl_compat_http.configure(values["rl_compat"])
        provenance_http.configure(values["provenance"])
        return JSONResponse({"engines": found})

    @app.post("/er/requantize")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def er_requantize() -> JSONResponse:
        """Remake the twin from the live weights, between two steps: for trainers that write parameters themselves."""
        failed, found = await run({"requantize": True})
        return failed or JSONResponse(
            {"engines": [(state["last_command"] or {}).get("requantized") for state in found]}
        )

    # 0.5.15 has it and answers 404, "deprecated"; the first route of a path is the one that is asked.
    stock = [route for route in app.routes if getattr(route, "path", None) == "/get_weight_version"]
    for route in stock:
        app.routes.remove(route)

    @app.get("/get_weight_version")
    async def get_weight_version() -> Any:
        """The version that the last update named: slime's servers have this endpoint, stock SGLang only /model_info."""
        if not rl_compat_http.active("weight_version"):
            if stock:
                return await stock[0].endpoint()
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        rl_compat_http.say_once("weight_version", "GET /get_weight_version is answered")
        version = compat.adapter().weight_version(http_server._global_state.tokenizer_manager)
        return JSONResponse({"weight_version": version})
