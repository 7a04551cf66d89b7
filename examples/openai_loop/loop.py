"""Rollouts and training by hand: OpenAI's client samples, rewards are computed here, weights go back through the disk.

    python examples/openai_loop/loop.py --url http://127.0.0.1:30000 --checkpoint CHECKPOINT

The server must have been started on CHECKPOINT, and must find the folders that this program writes below --out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import requests

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TIMEOUT_S = 600


@dataclass
class Sample:
    """One response and what a trainer needs of it."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    text: str
    finish: str
    weight_version: str
    reward: float = 0.0


def reward(answer: str, sample: Sample) -> float:
    """1 if the response ended by itself and its last number is the answer."""
    numbers = NUMBER.findall(sample.text)
    return float(sample.finish == "stop" and bool(numbers) and numbers[-1] == answer)


def draw(client: openai.OpenAI, model: str, problem: dict[str, str], args: argparse.Namespace) -> list[Sample]:
    """`args.samples` responses to one prompt, with rewards."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": problem["prompt"]}],
        n=args.samples,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        logprobs=True,
        # SGLang's own fields: token ids, because text does not always encode to the tokens that it came from.
        extra_body={"return_token_ids": True},
    )
    version = (reply.model_extra or {})["metadata"]["weight_version"]
    samples = []
    for choice in reply.choices:
        extra: dict[str, Any] = choice.model_extra or {}
        entries = (choice.logprobs.content if choice.logprobs else None) or []
        sample = Sample(
            prompt_ids=extra["prompt_token_ids"],
            response_ids=extra["response_token_ids"],
            logprobs=[entry.logprob for entry in entries],
            text=choice.message.content or "",
            finish=choice.finish_reason,
            weight_version=version,
        )
        sample.reward = reward(problem["answer"], sample)
        samples.append(sample)
    return samples


def advantages(groups: Sequence[Sequence[Sample]]) -> list[float]:
    """Each reward against those of the other responses to its prompt, in standard deviations."""
    values = []
    for group in groups:
        rewards = [sample.reward for sample in group]
        spread = statistics.pstdev(rewards)
        values += [(r - statistics.mean(rewards)) / spread if spread else 0.0 for r in rewards]
    return values


def push(url: str, checkpoint: Path, version: int) -> float:
    """The server's policy becomes `checkpoint`; seconds that took. Nothing else is to be done for the drafter."""
    started = time.monotonic()
    body = {"model_path": str(checkpoint.resolve()), "weight_version": str(version)}
    reply = requests.post(f"{url}/update_weights_from_disk", json=body, timeout=TIMEOUT_S)
    if reply.status_code != 200 or not reply.json()["success"]:
        raise SystemExit(f"the server refused {checkpoint}: {reply.status_code} {reply.text[:300]}")
    return time.monotonic() - started


COUNTED = ("sglang:generation_tokens_total", "sglang:spec_verify_calls_total")
SHOWN = {"sglang_er:weight_epoch": "weight epoch", "sglang_er:requantizations_total": "twin remade"}


def metrics(url: str) -> dict[str, float]:
    """GET /metrics, summed over engines; empty where the server was started without --enable-metrics."""
    reply = requests.get(f"{url}/metrics", timeout=TIMEOUT_S)
    values: dict[str, float] = {}
    for line in reply.text.splitlines() if reply.status_code == 200 else ():
        name = line.partition("{")[0]
        if name in (*COUNTED, *SHOWN):
            values[name] = values.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return values


def describe(before: dict[str, float], after: dict[str, float]) -> str:
    """What the metrics say of the rollout between them."""
    tokens, steps = (after.get(name, 0.0) - before.get(name, 0.0) for name in COUNTED)
    said = [f"accept length {tokens / steps:.2f}"] if steps else []
    said += [f"{words} {after[name]:g}" for name, words in SHOWN.items() if name in after]
    return ", ".join(said) or "none"


def read_problems(path: Path | None) -> list[dict[str, str]]:
    """Lines of {"prompt", "answer"}; without a file, the additions that the project's own models know."""
    if path is None:
        from importlib import resources

        text = (resources.files("sglang_er.models") / "assets" / "prompts_easy.jsonl").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server")
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder that training starts from")
    parser.add_argument("--prompts", type=Path, help='JSON lines of {"prompt", "answer"}')
    parser.add_argument("--out", type=Path, default=Path(".er/openai_loop"), help="folder for checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="prompts a round")
    parser.add_argument("--samples", type=int, default=4, help="responses to a prompt")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[list[Sample]]:
    """Runs the loop and prints three lines a round; returns the samples of each round."""
    args = parse(argv)
    from trainer import Trainer  # torch takes seconds: not before the arguments are right

    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=TIMEOUT_S)
    model = client.models.list().data[0].id
    problems = read_problems(args.prompts)
    trainer = Trainer(args.checkpoint, args.lr)
    rounds: list[list[Sample]] = []
    kept: Path | None = None
    for number in range(1, args.rounds + 1):
        first = (number - 1) * args.batch
        batch = [problems[(first + i) % len(problems)] for i in range(args.batch)]
        before, started = metrics(args.url), time.monotonic()
        with ThreadPoolExecutor(args.batch) as pool:
            groups = list(pool.map(lambda problem: draw(client, model, problem, args), batch))
        seconds = time.monotonic() - started
        samples = [sample for group in groups for sample in group]
        tokens = sum(len(sample.response_ids) for sample in samples)
        mean = statistics.mean(sample.reward for sample in samples)
        version = samples[0].weight_version
        print(f"round {number}: weights {version}, reward {mean:.2f}, {tokens} tokens in {seconds:.1f} s")
        print(f"  metrics: {describe(before, metrics(args.url))}")
        gap = trainer.step(samples, advantages(groups), args.temperature)
        written = trainer.save(args.out / f"version_{number}")
        took = push(args.url, written, number)
        print(f"  trainer's logprobs - server's: {gap:.4f} on average; update {took:.2f} s", flush=True)
        if kept is not None:
            shutil.rmtree(kept)
        rounds, kept = [*rounds, samples], written
    return rounds


if __name__ == "__main__":
    main()
