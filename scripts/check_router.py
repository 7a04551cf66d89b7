#!/usr/bin/env python3
"""sglang-router in front of two servers of ours: requests through it, then a weight update of both, then again.

    python -m venv router && router/bin/pip install --no-deps sglang-router==0.3.2 setproctitle
    python scripts/check_router.py --router router/lib/python3.11/site-packages

Starts two servers on a small random model (fp32: greedy answers can be compared token for token) and the router, prints
a table, and exits 1 if a line of it failed. Not part of CI: it takes minutes, and the router is no dependency.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import requests

from sglang_er.models.make import make_model
from sglang_er.rollout import launcher

GAMMA, TOKENS, TIMEOUT_S = 3, 96, 120
FLAGS = (
    *("--dtype", "float32", "--context-length", "512", "--max-total-tokens", "8192", "--random-seed", "1"),
    *("--er-policy", "fixed", "--er-gamma", str(GAMMA), "--er-cpu-threads", "1", "--er-check-epochs", "true"),
)
# The router's launcher imports SGLang, and that torchvision (sglang_er.compat.torchvision_shim).
ROUTER = (
    "from sglang_er.compat import torchvision_shim; torchvision_shim.install()\n"
    "import runpy; runpy.run_module('sglang_router.launch_router', run_name='__main__', alter_sys=True)\n"
)
Reply = dict[str, Any]


class Findings:
    """The table: a row per check."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self.when = ""

    def add(self, what: str, passed: bool, seen: str) -> None:
        self.rows.append((self.when, what, "ok" if passed else "FAILED", seen))

    def failed(self) -> bool:
        return any(result != "ok" for _, _, result, _ in self.rows)

    def table(self) -> str:
        rows = [("when", "what", "", "seen"), ("---",) * 4, *self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def post(url: str, path: str, body: Any) -> Any:
    reply = requests.post(url + path, json=body, timeout=TIMEOUT_S)
    if reply.status_code != 200:
        raise RuntimeError(f"POST {url}{path}: {reply.status_code} {reply.text[:300]}")
    return reply.json()


def until(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if ready():
                return
        except requests.RequestException:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {TIMEOUT_S} s")
        time.sleep(0.3)


@contextmanager
def running_router(path: Path, workers: list[str], log: Path) -> Iterator[str]:
    """The router over `workers`, one after the other, until the block ends."""
    port = launcher.choose_port(None)
    command = [sys.executable, "-c", ROUTER, "--host", launcher.HOST, "--port", str(port), "--policy", "round_robin"]
    home = os.pathsep.join(filter(None, [str(path.resolve()), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--prometheus-port", str(launcher.choose_port(None)), "--worker-urls", *workers],
            env={**os.environ, "PYTHONPATH": home},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://{launcher.HOST}:{port}"

    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"the router ended: {launcher.last_line(log)}")
        listed = requests.get(f"{url}/workers", timeout=5).json()["workers"]
        return len(listed) == len(workers) and all(worker["is_healthy"] for worker in listed)

    try:
        until("the router and its workers", ready)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def native(url: str, prompt: list[int]) -> Reply:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    reply: Reply = post(url, "/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
    return reply


def aligned(reply: Reply) -> bool:
    """One logprob per token, of that token."""
    given = reply["meta_info"]["output_token_logprobs"]
    return len(given) == TOKENS and [entry[1] for entry in given] == reply["output_ids"] and given[0][0] <= 0


class Answers(NamedTuple):
    """Of the OpenAI endpoints; the logprobs are those of the chat and of the completion."""

    chat: str
    streamed: str
    completion: str
    logprobs: tuple[list[float], list[float]]


def openai_answers(url: str) -> Answers:
    """Chat with logprobs, a completion with logprobs, and the same chat as a stream; all greedy."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
    asked: dict[str, Any] = {"model": "default", "max_tokens": 48, "temperature": 0}
    messages = [{"role": "user", "content": "47 + 85 ="}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, **asked).choices[0]
    plain = client.completions.create(prompt="47 + 85 =", logprobs=1, **asked).choices[0]
    stream = client.chat.completions.create(messages=messages, stream=True, **asked)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    chat_logprobs = [entry.logprob for entry in chat.logprobs.content]
    return Answers(chat.message.content, streamed, plain.text, (chat_logprobs, list(plain.logprobs.token_logprobs)))


def state(url: str) -> Reply:
    engine: Reply = requests.get(f"{url}/er/state", timeout=TIMEOUT_S).json()["engines"][0]
    return engine


def check(found: Findings, router: str, workers: list[str], prompts: list[list[int]]) -> list[list[int]]:
    """Adds a row per check; returns the greedy answers."""
    direct = [[native(worker, prompt) for prompt in prompts] for worker in workers]
    before = [state(worker)["steps"]["committed_tokens"] for worker in workers]
    with ThreadPoolExecutor(4) as pool:
        routed = list(pool.map(lambda prompt: native(router, prompt), prompts))
    served = [state(worker)["steps"]["committed_tokens"] - then for worker, then in zip(workers, before)]
    ids, own = [reply["output_ids"] for reply in routed], [[reply["output_ids"] for reply in one] for one in direct]
    equal = sum(a == b == c for a, b, c in zip(ids, *own, strict=True))
    found.add("/generate, greedy: as either server's own", equal == len(prompts), f"{equal} of {len(prompts)} equal")
    found.add("both servers took part", min(served) > 0, " + ".join(f"{tokens} tokens" for tokens in served))
    good = sum(map(aligned, routed))
    found.add("a logprob per token", good == len(prompts), f"{good} of {len(prompts)} replies, {TOKENS} tokens each")
    far = max(
        abs(a[0] - b[0])
        for one, other in zip(routed, direct[0])
        for a, b in zip(one["meta_info"]["output_token_logprobs"], other["meta_info"]["output_token_logprobs"])
    )
    found.add("logprobs as the server's own", far < 2e-3, f"at most {far:.1e} nats apart")
    lengths = [reply["meta_info"]["spec_accept_length"] for reply in routed]
    found.add("accept length > 1", min(lengths) > 1, f"{min(lengths):.2f} to {max(lengths):.2f}, gamma {GAMMA}")
    through, itself = openai_answers(router), openai_answers(workers[0])
    chat, completion = through.chat, through.completion
    found.add("OpenAI chat, greedy: as the server's own", chat == itself.chat != "", f"{len(chat)} characters")
    found.add("OpenAI chat, streamed: the same text", through.streamed == chat, f"{len(through.streamed)} characters")
    same = completion == itself.completion != ""
    found.add("OpenAI completion: as the server's own", same, f"{len(completion)} characters")
    counts = [len(logprobs) for logprobs in through.logprobs]
    there = min(counts) > 0 and all(logprob <= 0 for logprobs in through.logprobs for logprob in logprobs)
    found.add("OpenAI logprobs, chat and completion", there, " and ".join(f"{count} tokens" for count in counts))
    return ids


def update(router: str, checkpoint: Path, version: str) -> list[str]:
    """As trainers do it: the router names its workers, each is updated itself."""
    workers = [worker["url"] for worker in requests.get(f"{router}/workers", timeout=TIMEOUT_S).json()["workers"]]
    for worker in workers:
        reply = post(worker, "/update_weights_from_disk", {"model_path": str(checkpoint), "weight_version": version})
        if not reply["success"]:
            raise RuntimeError(f"{worker}: {reply['message']}")
    return workers


def main(router_path: Path, count: int, folder: Path) -> int:
    models = [folder / f"seed{seed}" for seed in (0, 1)]
    for seed, model in enumerate(models):
        make_model("flat", "qwen3", model, dtype="float32", seed=seed, progress=lambda line: None)
    prompts = [[30 + 7 * i, 41 + i, 52, 63 + 3 * i, *range(70, 70 + 2 * i)] for i in range(count)]
    found = Findings()
    with ExitStack() as stack:
        workers = []
        for i in range(2):
            server = launcher.running_server(models[0], launcher.choose_port(None), folder / f"server{i}.log", FLAGS)
            workers.append(stack.enter_context(server).client.url)
        router = stack.enter_context(running_router(router_path, workers, folder / "router.log"))
        found.when = "at start"
        old = check(found, router, workers, prompts)
        updated = update(router, models[1], "step-1")
        found.when = "updated"
        found.add("workers, as the router lists them", sorted(updated) == sorted(workers), f"{len(updated)}")
        new = check(found, router, workers, prompts)
        changed = sum(a != b for a, b in zip(old, new))
        found.add("answers are the new policy's", changed == count, f"{changed} of {count} changed")
        versions = {native(router, prompt)["meta_info"]["weight_version"] for prompt in prompts[:4]}
        found.add("weight_version in replies", versions == {"step-1"}, ", ".join(sorted(versions)))
        twins = [state(worker)["twin"] for worker in workers]
        fresh = all(twin["twin_epoch"] == twin["weight_epoch"] and twin["requantizations"] == 1 for twin in twins)
        made = " and ".join(f"{twin['requantizations']} time" for twin in twins)
        found.add("twins remade from the new weights", fresh, made)
    print(found.table())
    return int(found.failed())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--router", type=Path, required=True, metavar="DIR", help="folder with sglang_router in it")
    parser.add_argument("--requests", type=int, default=12, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="check_router") as scratch:
        sys.exit(main(args.router, args.requests, Path(scratch)))
