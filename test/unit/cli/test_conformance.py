"""`sglang-er conformance`: table, JSON and exit codes against a server that answers too little."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_er.cli import main as cli

ANSWERS: dict[str, Any] = {
    "/server_info": {"version": "0", "dtype": "float32", "speculative_algorithm": None, "context_length": 512},
    "/model_info": {"model_path": "m", "weight_version": "1"},
    "/v1/loads?include=core": {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]},
    "/abort_request": None,
    "/generate": {"output_ids": [1, 2], "meta_info": {"output_token_logprobs": [[-0.1, 1, None]]}},
}


class Answers(BaseHTTPRequestHandler):
    """Fixed answers; everything else is 404."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.path in ANSWERS
        body = json.dumps(ANSWERS.get(self.path)).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_failure_is_named_in_table_json_and_exit_code(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert cli.main(["conformance", "--url", url, "--only", "C01,C10,C18,C28,C29", "--json", str(out)]) == 1
    said = capsys.readouterr()
    assert "C01 failed: contract (" in said.out and "meta_info lacks id" in said.out
    assert "1 failed, 4 skipped" in said.out
    assert "sglang-er conformance: C01 failed" in said.err
    found = {check["id"]: check for check in json.loads(out.read_text())["checks"]}
    assert {name: check["status"] for name, check in found.items()} == {
        "C01": "failed",
        **dict.fromkeys(("C10", "C18", "C28", "C29"), "skipped"),
    }
    assert "--weights" in found["C10"]["reason"] and "--destructive" in found["C18"]["reason"]
    assert "does not speculate" in found["C28"]["reason"] and "GPU" in found["C29"]["reason"]


def test_only_skipped_checks_are_no_failure(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["conformance", "--url", url, "--only", "C29"]) == 0
    assert "1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint", "code"),
    [
        (["--only", "C01,C77"], "C77: there is no such check", 2),
        (["--weights", "a,b,c"], "got 3 folders", 2),
        (["--json", "nowhere/found.json"], "there is no folder nowhere", 2),
        ([], "Connection refused", 1),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], complaint: str, code: int
) -> None:
    assert cli.main(["conformance", "--url", "http://127.0.0.1:9", *words]) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and complaint in said[0] and said[0].startswith("sglang-er conformance: ")
