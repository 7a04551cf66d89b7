"""One GRPO run against a server: `python -m grpo.run --out DIR`. A run that was stopped goes on where it was.

The directory gets settings.json, steps.jsonl (a line a step), state.pt (what a resumed run needs) and, every ten
steps, the policy as checkpoint_NNN.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grpo import objective
from grpo.rollout import Policy, Rollout, roll_out, sampler_of
from grpo.settings import ARMS, PLAIN, REMADE, Settings
from grpo.trainer import Trainer
from sglang_er.models import task
from sglang_er.rollout.client import Client
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.launcher import choose_port, running_server
from sglang_er.rollout.progress import Progress
from sglang_er.rollout.steps import Steps

CHECKPOINT_EVERY = 10
SERVER_FLAGS = ("--context-length", "2048", "--max-total-tokens", "65536", "--sleep-on-idle")


def draw_prompts(settings: Settings, step: int) -> list[task.Prompt]:
    """The prompts of a step, the same in every arm."""
    rng = random.Random(f"grpo/{settings.seed}/{step}")
    return [task.make_prompt(rng, rng.randint(*settings.operands), "train") for _ in range(settings.prompts)]


class Run:
    """One run in a directory, against a server that nobody else uses meanwhile."""

    def __init__(self, settings: Settings, checkpoint: Path, client: Client, out: Path) -> None:
        self.settings, self.client, self.out = settings, client, out
        self.trainer = Trainer(checkpoint, settings)
        self.untrained = self.trainer.tensors()
        self.policy = Policy(client)
        self.records: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)
        described = asdict(settings)
        if (out / "state.pt").exists():
            known = json.loads((out / "settings.json").read_text(encoding="utf-8"))
            # A finished run may go on for more steps.
            if json.loads(json.dumps({**described, "steps": known["steps"]})) != known:
                raise ValueError(f"{out} holds a run with other settings: choose another --out, or remove it")
            state = torch.load(out / "state.pt", weights_only=True)
            self.trainer.load_state(state)
            lines = (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()
            self.records = [json.loads(line) for line in lines[: state["steps"]]]
        (out / "settings.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def train(self, report: Progress) -> list[dict[str, Any]]:
        """Run what is left of the steps. Raises RolloutError if the server fails; what was done is kept."""
        self._prepare_server()
        for step in range(len(self.records), self.settings.steps):
            record = self._step(step, report)
            self.records.append(record)
            self._save()
            report.note(describe(record, self.settings.steps))
        return self.records

    def _prepare_server(self) -> None:
        """The policy of the first missing step, and a twin: of it, or for the frozen arm of the untrained policy."""
        arm = ARMS[self.settings.arm]
        frozen = self.settings.arm == "frozen"
        self.client.set_policy({**arm, **REMADE})
        self.policy.push(self.untrained if frozen else self.trainer.tensors(), "grpo-twin")
        # The twin is made at the first draft.
        self._roll_out(draw_prompts(self.settings, 0)[:1], 2, 16)
        self.client.set_policy(arm)
        if frozen:
            self.policy.push(self.trainer.tensors(), f"step-{len(self.records)}")

    def _roll_out(
        self,
        prompts: Sequence[task.Prompt],
        samples: int,
        tokens: int,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Rollout]:
        return roll_out(sampler_of(self.settings.client, self.client), prompts, samples, tokens, on_done)

    def _step(self, step: int, report: Progress) -> dict[str, Any]:
        settings = self.settings
        prompts = draw_prompts(settings, step)
        before = self.client.state()
        started = time.perf_counter()
        rollouts = self._roll_out(
            prompts,
            settings.samples,
            settings.max_new_tokens,
            lambda done, total: report.update(f"step {step + 1}/{settings.steps}: {done}/{total} prompts answered"),
        )
        rolled = time.perf_counter()
        self.client.set_policy(ARMS[settings.arm])  # waits until the last step is counted
        after = self.client.state()
        report.update(f"step {step + 1}/{settings.steps}: training on {len(rollouts)} rollouts")
        rewards = torch.tensor([one.reward for one in rollouts]).view(settings.prompts, settings.samples)
        training = time.perf_counter()
        metrics = self.trainer.step(rollouts, objective.group_advantages(rewards).flatten())
        trained = time.perf_counter()
        sync_seconds = self.policy.push(self.trainer.tensors(), f"step-{step + 1}")
        counted = Steps.total(after).since(Steps.total(before))
        lengths = [len(one.ids) for one in rollouts]
        return {
            "step": step,
            "reward": float(rewards.mean()),
            **metrics,
            "length": sum(lengths) / len(lengths),
            "longest": max(lengths),
            "finished": sum(one.finished for one in rollouts) / len(rollouts),
            "accept_length": counted.accept_length,
            "alpha": counted.alpha,
            "rollout_seconds": rolled - started,
            "train_seconds": trained - training,
            "sync_seconds": sync_seconds,
            "requantize_seconds": after["twin"]["requantize_seconds"] - before["twin"]["requantize_seconds"],
            "weight_epoch": after["twin"]["weight_epoch"],
            "twin_epoch": after["twin"]["twin_epoch"],
        }

    def _save(self) -> None:
        """All or nothing: a run that is stopped in between repeats its last step."""
        done = len(self.records)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        for name, write in (
            ("steps.jsonl", lambda path: path.write_text(lines, encoding="utf-8")),
            ("state.pt", lambda path: torch.save({**self.trainer.state(), "steps": done}, path)),
        ):
            partial = self.out / f"{name}.partial"
            write(partial)
            partial.replace(self.out / name)
        if done % CHECKPOINT_EVERY == 0:
            save_file(dict(self.trainer.tensors()), self.out / f"checkpoint_{done:03d}.safetensors")


def describe(record: dict[str, Any], steps: int) -> str:
    accept = "" if record["accept_length"] is None else f"  accept length {record['accept_length']:.2f}"
    return (
        f"step {record['step'] + 1:2d}/{steps}  reward {record['reward']:.3f}  entropy {record['entropy']:.3f}  "
        f"KL {record['kl']:.1e}  length {record['length']:.0f}{accept}  "
        f"rollout {record['rollout_seconds']:.1f} s, training {record['train_seconds']:.1f} s"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of Settings."""
    for name, default in asdict(Settings()).items():
        pair = isinstance(default, tuple)
        kind = type(default[0] if pair else default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs=2 if pair else None, default=default)


def settings_of(args: argparse.Namespace) -> Settings:
    values: dict[str, Any] = {entry.name: getattr(args, entry.name) for entry in fields(Settings)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Settings(**values)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo.run", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint that `sglang-er make-model` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--url", help="a server of that checkpoint; default: one is started")
    add_settings(parser)
    args = parser.parse_args(argv)
    report = Progress()
    try:
        settings = settings_of(args)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        log = args.out / "server.log"
        started = None if args.url else running_server(args.model, choose_port(None), log, SERVER_FLAGS)
        with started or nullcontext() as server:
            client = Client(args.url) if server is None else server.client
            try:
                Run(settings, args.model, client, args.out).train(report)
            finally:
                if server is None:
                    client.set_policy({**PLAIN, **REMADE})
    except (ValueError, RolloutError) as error:
        print(f"grpo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
