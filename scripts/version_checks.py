"""The short list of checks that scripts/check_versions.py runs with another version's interpreter.

python version_checks.py WORK_DIR [SERVER_FLAG ...]

Makes two small random models, serves the first with speculation, and prints one JSON object per check. Answers are
compared with transformers, which shares no code with the server.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from sglang_er.compat import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402

from sglang_er.engine.weight_sender import WeightSender  # noqa: E402
from sglang_er.rollout import launcher  # noqa: E402
from sglang_er.rollout.client import Response  # noqa: E402
from sglang_er.rollout.conformance import sender  # noqa: E402

FLAGS = (
    "--dtype",
    "float32",
    "--context-length",
    "512",
    "--max-total-tokens",
    "16384",
    "--random-seed",
    "1",
    "--enable-metrics",
)
TOKENS, GAMMA, VOCABULARY = 48, 5, 300
LOGPROB_TOLERANCE = 2e-3
# Closer than this rounding may decide which of two tokens is the most likely.
LEAST_MARGIN = 1e-4
SETTLE_S = 3.0  # until a server that failed is seen to be gone, or a request that is refused to be answered


class Policy:
    """A checkpoint in transformers, fp32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def check(self, prompt: Sequence[int], answer: Response) -> float:
        """Largest error of the answer's logprobs; raises AssertionError if a token is not this policy's choice."""
        logits = self.model(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        best = logprobs.topk(2, dim=-1)
        for position, token in enumerate(answer.ids):
            clear = best.values[position, 0] - best.values[position, 1] > LEAST_MARGIN
            assert token == best.indices[position, 0] or not clear, f"token {position} is not {self.folder.name}'s"
        own = logprobs.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        return float((own - torch.tensor(answer.logprobs)).abs().max())


class Examined:
    """A running server and what was found on its first weights."""

    def __init__(self, server: launcher.ServerProcess, policies: Sequence[Policy]) -> None:
        self.server, self.client, self.policies = server, server.client, policies
        choose = random.Random(7)
        self.prompts = [[choose.randrange(3, VOCABULARY) for _ in range(n)] for n in (4, 9, 17, 30, 45, 60)]
        self.accept_lengths: dict[Path, float] = {}

    def answers(self) -> list[Response]:
        sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        return [self.client.generate(prompt, sampling, top_logprobs=1) for prompt in self.prompts]

    def post(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> dict[str, Any]:
        reply = self.client.send(method, path, body or {})
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text[:200]}"
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.json() if is_json else {}

    def serves(self, policy: Policy) -> str:
        """The next tokens are this policy's, the twin is of its epoch, and drafts are as good as they once were."""
        before = self.client.state()["steps"]
        for prompt, answer in zip(self.prompts, self.answers()):
            policy.check(prompt, answer)
        state = self.client.state()
        twin, steps = state["twin"], state["steps"]
        assert twin["weight_epoch"] == twin["twin_epoch"], f"epochs {twin['weight_epoch']}, {twin['twin_epoch']}"
        accepted, rows = (steps[k] - before[k] for k in ("accepted_drafts", "speculating_request_steps"))
        assert rows, "nothing was drafted"
        length = 1 + accepted / rows
        known = self.accept_lengths.setdefault(policy.folder, length)
        assert length > 1.05 and abs(length - known) < 0.05, f"accept length {length:.2f}, before {known:.2f}"
        return f"epoch {twin['weight_epoch']}, accept length {length:.2f}"


def greedy(on: Examined) -> str:
    on.client.set_policy({"policy": "fixed", "gamma": 0})
    plain = [answer.ids for answer in on.answers()]
    on.client.set_policy({"policy": "cycle", "gamma_schedule": [0, 3, 1, 5, 2]})
    drafted = on.answers()
    assert [answer.ids for answer in drafted] == plain, "speculation changed a greedy answer"
    for prompt, answer in zip(on.prompts, drafted):
        on.policies[0].check(prompt, answer)
    return f"{len(plain)} answers of {TOKENS} tokens; transformers' too"


def logprobs(on: Examined) -> str:
    worst = max(on.policies[0].check(prompt, answer) for prompt, answer in zip(on.prompts, on.answers()))
    assert worst < LOGPROB_TOLERANCE, f"off by {worst:.1e}"
    return f"largest error {worst:.1e}"


def accept_length(on: Examined) -> str:
    on.client.set_policy({"policy": "fixed", "gamma": GAMMA})
    return on.serves(on.policies[0])


def sampling(on: Examined) -> str:
    """Many at once, of all kinds, answered in full."""
    kinds: list[dict[str, Any]] = [{"temperature": 1}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}, {"min_p": 0.05}]
    kinds += [{"frequency_penalty": 0.5}, {"temperature": 0}, {"regex": "[ab]+"}]
    chosen = [{"max_new_tokens": TOKENS, **({"ignore_eos": True} if "regex" not in kind else {}), **kind}
              for kind in kinds * 3]  # fmt: skip
    with ThreadPoolExecutor(len(chosen)) as pool:
        answers = list(pool.map(on.client.generate, (on.prompts * 3)[: len(chosen)], chosen))
    short = [kind for kind, answer in zip(chosen, answers) if answer.tokens != TOKENS and "regex" not in kind]
    assert not short, f"cut short: {short[0]}"
    return f"{len(chosen)} at once, {len(kinds)} kinds"


def from_disk(on: Examined) -> str:
    on.post("/update_weights_from_disk", {"model_path": str(on.policies[1].folder), "weight_version": "disk"})
    return on.serves(on.policies[1])


def from_tensor(on: Examined) -> str:
    """As slime does it: pause, flush, buckets without begin and end, continue."""
    by = WeightSender()
    on.post("/pause_generation")
    on.post("/flush_cache", method="GET")
    for bucket in sender.buckets_of(on.policies[0].folder):
        body = {"serialized_named_tensors": [by.bucket(bucket)], "load_format": "flattened_bucket"}
        on.post("/update_weights_from_tensor", {**body, "flush_cache": False, "weight_version": "tensor"})
    on.post("/continue_generation")
    return on.serves(on.policies[0])


def from_distributed(on: Examined) -> str:
    """Two buckets over a gloo group, without begin and end."""
    by, name = WeightSender(), "check-versions"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(on.post, "/init_weights_update_group", {**where, "group_name": name, "backend": "gloo"})
        if wait([joined], SETTLE_S).done:
            joined.result()  # refused: nobody would join
        group = by.group(name, port)
        joined.result()
        for bucket in sender.buckets_of(on.policies[1].folder):
            received = pool.submit(
                on.post, "/update_weights_from_distributed", {**sender.described(bucket), "group_name": name}
            )
            by.broadcast(group, bucket)
            received.result()
        left = pool.submit(on.post, "/destroy_weights_update_group", {"group_name": name})
        by.leave(group)
        left.result()
    return on.serves(on.policies[1])


def trainers(on: Examined) -> str:
    """What slime reads: the older names of the metrics, the version's endpoint."""
    reply = on.post("/generate", {"input_ids": on.prompts[0], "sampling_params": {"max_new_tokens": 8}})
    missing = {"spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct"} - set(reply["meta_info"])
    assert not missing, f"meta_info lacks {', '.join(sorted(missing))}"
    version = on.post("/get_weight_version", method="GET")["weight_version"]
    on.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    on.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    on.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    return f"old metric names, weight_version {version}, resume twice"


def stop(on: Examined) -> str:
    """SIGTERM to the server's first process ends all of them."""
    process, began = on.server.process, time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    while time.monotonic() - began < 30:
        left = subprocess.run(["ps", "-o", "stat=", "-g", str(process.pid)], capture_output=True, text=True).stdout
        if not [line for line in left.split() if not line.startswith("Z")]:
            return f"{time.monotonic() - began:.1f} s, exit code {process.returncode}"
        time.sleep(0.2)
    raise AssertionError("processes are left 30 s after SIGTERM")


CHECKS: dict[str, Callable[[Examined], str]] = {
    "greedy fp32, on = off": greedy,
    "accept length": accept_length,
    "logprobs": logprobs,
    "sampling, mixed": sampling,
    "update from disk": from_disk,
    "update from tensor": from_tensor,
    "update from distributed": from_distributed,
    "what trainers read": trainers,
    "clean stop": stop,
}


def tell(name: str, status: str, found: str) -> None:
    print(json.dumps({"check": name, "status": status, "found": " ".join(found.split())[:300]}), flush=True)


def main(work: Path, flags: Sequence[str]) -> None:
    from sglang_er.models.make import make_model

    folders = [work / f"seed-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        if not (folder / "config.json").exists():
            make_model("flat", "qwen3", folder, dtype="float32", seed=seed)
    os.environ |= {"SGLANG_ER_CPU_THREADS": "1", "SGLANG_ER_CHECK_EPOCHS": "true"}
    began = time.monotonic()
    try:
        port, log = launcher.choose_port(None), work / "server.log"
        with launcher.running_server(folders[0], port, log, (*FLAGS, *flags)) as server:
            tell("starts", "passed", f"{time.monotonic() - began:.0f} s")
            on = Examined(server, [Policy(folder) for folder in folders])
            for name, check in CHECKS.items():
                try:
                    tell(name, "passed", check(on))
                except Exception as error:
                    tell(name, "failed", f"{type(error).__name__}: {error}")
                    time.sleep(SETTLE_S)
                    server.check_alive()
    except Exception as error:
        tell("server", "failed", str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # the manager of shared tensors would keep the interpreter
