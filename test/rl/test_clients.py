"""C22, C23 and C25 with the frameworks' own code, where it is there; the suite replays their requests always.

AREAL_DIR: a checkout of AReaL, or its unpacked wheel. SLIME_DIR: a checkout of slime. What they import beyond SGLang
(ray, sglang-router, hydra-core, torchdata, flask, pebble, tabulate, tensorboardX, ...) must be on PYTHONPATH; for the
router only that.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from support.server import Server, areal_command

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.session import Session
from sglang_er.rollout.launcher import choose_port

pytestmark = pytest.mark.server

CLIENTS = Path(__file__).parent / "clients"


def checkout(variable: str) -> Path:
    if not (path := os.environ.get(variable)):
        pytest.skip(f"{variable} names no checkout")
    return Path(path)


def run(command: list[str], *paths: Path) -> str:
    """Standard output of a process that has `paths` before everything else on PYTHONPATH."""
    home = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": home})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-500:])
    return done.stdout


@pytest.mark.parametrize(("variable", "client"), [("AREAL_DIR", "areal_client.py"), ("SLIME_DIR", "slime_client.py")])
def test_c23_the_frameworks_own_client(updated_spec: Any, on_spec: Session, variable: str, client: str) -> None:
    path = checkout(variable)
    updated_spec.server.cycle()
    on_spec.touch()  # its weights are changed and must be brought back
    try:
        other, own = updated_spec.checkpoints[1], updated_spec.checkpoints[0]
        said = run([sys.executable, str(CLIENTS / client), on_spec.url, str(other), str(own)], path)
        assert said.strip().startswith("{") or "\n{" in said
    finally:
        on_spec.restore()


def test_c25_areal_builds_the_command_that_was_launched(updated_spec: Any) -> None:
    """AReaL's own build_args: every flag that the `areal` server was started with is one that AReaL passes on."""
    path = checkout("AREAL_DIR")
    code = (
        "from sglang_er.compat import torchvision_shim; torchvision_shim.install()\n"
        "from areal.api.cli_args import SGLangConfig\n"
        "args = SGLangConfig.build_args(SGLangConfig(model_path='M', skip_tokenizer_init=True), 1, 0, 'h', 1)\n"
        "print(' '.join(map(str, SGLangConfig.build_cmd_from_args(args))))\n"
    )
    built = shlex.split(run([sys.executable, "-c", code], path).strip().splitlines()[-1])
    ours = areal_command(Path("M"), 1, "--skip-tokenizer-init", "--disable-radix-cache", "--chunked-prefill-size", "-1")
    assert built[1] == "-m" and built[2].endswith("launch_server")
    assert {word for word in ours if word.startswith("--")} <= set(built), built


def test_areals_engine_starts_servers_by_our_backend(flat_model: Any, tmp_path: Path) -> None:
    """docs/areal.md, way 1, without a trainer: AReaL's classes, our backend, a server of its own."""
    path = checkout("AREAL_DIR")
    root = Path(__file__).resolve().parents[2]
    weights = [str(flat_model("qwen3", seed)) for seed in (0, 1)]
    example = str(root / "examples" / "areal" / "grpo.yaml")
    command = [sys.executable, str(CLIENTS / "areal_adapter.py"), *weights, example, str(tmp_path)]
    run(command, path, root / "test")


@pytest.fixture
def router(updated_spec: Any) -> Iterator[str]:
    """sglang-router in front of the `spec` server, registered as slime does."""
    if importlib.util.find_spec("sglang_router") is None:
        pytest.skip("sglang_router is not installed")
    url = f"http://127.0.0.1:{(port := choose_port(None))}"
    # Its launcher imports SGLang's, and that torchvision.
    shimmed = (
        "from sglang_er.compat import torchvision_shim; torchvision_shim.install()\n"
        "import runpy; runpy.run_module('sglang_router.launch_router', run_name='__main__', alter_sys=True)\n"
    )
    command = [sys.executable, "-c", shimmed, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _until(lambda: requests.get(f"{url}/workers", timeout=5).status_code == 200)
            body = {"url": updated_spec.server.url, "worker_type": "regular"}
            assert requests.post(f"{url}/workers", json=body, timeout=30).status_code in (200, 202)
            _until(lambda: bool(requests.get(f"{url}/workers", timeout=5).json()["workers"]))
            yield url
        finally:
            process.terminate()


def _until(ready: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if ready():
                return
        except requests.RequestException:
            pass
        assert time.monotonic() < deadline, "the router does not get ready"
        time.sleep(0.2)


def test_c22_rollouts_through_a_router(router: str, updated_spec: Any) -> None:
    """slime's requests through it, aborted at the server while they run: all come back, aligned."""
    server: Server = updated_spec.server
    server.cycle()
    session = Session(server.url)
    wanted = [bodies.slime(session.prompt(300 + i), session.long, ignore_eos=True) for i in range(8)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        futures = [pool.submit(requests.post, f"{router}/generate", json=body, timeout=120) for body in wanted]
        session.wait_running(4)
        session.post("/abort_request", {"abort_all": True})
        for future in futures:
            assert future.result().status_code == 200, future.result().text
            replies.aligned(future.result().json(), "through the router", session.long)
    session.restore()
    session.close()
