"""Endpoints that stand in place of SGLang's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from sglang_er.engine import compat, http_routes, rl_compat_http


def server(with_stock_route: bool) -> TestClient:
    app = FastAPI()
    if with_stock_route:

        @app.get("/get_weight_version")
        async def deprecated() -> None:
            raise HTTPException(404, "deprecated")

    manager = SimpleNamespace(config_value={"weight_version": "7"}.__getitem__)
    http_routes.add_routes(SimpleNamespace(app=app, _global_state=SimpleNamespace(tokenizer_manager=manager)))
    return TestClient(app)


@pytest.mark.parametrize("with_stock_route", [False, True])
def test_the_weight_version_is_answered_where_stock_sglang_calls_it_deprecated(monkeypatch, with_stock_route):
    """0.5.15.post1 has the route and answers 404, 0.5.21 has none."""
    if compat.adapter().weight_version.__module__.endswith("v0_5_15"):
        pytest.skip("the pretended tokenizer manager is that of later versions")
    client = server(with_stock_route)
    monkeypatch.setattr(rl_compat_http, "active", lambda part: part == "weight_version")
    assert client.get("/get_weight_version").json() == {"weight_version": "7"}
    monkeypatch.setattr(rl_compat_http, "active", lambda part: False)
    refused = client.get("/get_weight_version")
    assert refused.status_code == 404
    assert refused.json() == {"detail": "deprecated" if with_stock_route else "Not Found"}
