"""The whole study: `python -m grpo.study --out DIR`. Stages: runs, test, timing, report; each keeps what it has done.

runs     three arms, three seeds each, one after the other on one server
test     the fixed-policy test on checkpoints of the first speculative run, with broken verifiers
timing   five steps at the 0.5b shape, plain and speculative blocks in turn
report   report.html, its plots and study.json, from what the other stages wrote
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo import fixed_policy, report, timing
from grpo.run import SERVER_FLAGS, Run
from grpo.settings import ARMS, Settings
from grpo.trainer import Trainer
from sglang_er.models.make import known_kappa, make_model
from sglang_er.rollout import machine
from sglang_er.rollout.errors import RolloutError
from sglang_er.rollout.launcher import ServerProcess, choose_port, running_server
from sglang_er.rollout.progress import Progress
from sglang_er.rollout.provenance import machine_facts, provenance

STAGES = ("runs", "test", "timing", "report")
SEEDS = (0, 1, 2)
#: Where the broken verifiers are: the repository's tests.
TESTS = Path(__file__).resolve().parents[2] / "test"
HOOK = "support.mutants:install"
TIMING_FLAGS = ("--context-length", "2048", "--max-total-tokens", "16384", "--sleep-on-idle")
TIMING_ALPHA = 0.95


class Study:
    """The stages, in a directory; `seeds`, `steps`, `prompts` and `samples` are smaller in tests."""

    def __init__(self, out: Path, say: Progress) -> None:
        self.out, self.say = out, say
        out.mkdir(parents=True, exist_ok=True)

    def model(self, shape: str) -> Path:
        path = self.out / "models" / shape
        if not path.exists():
            make_model(shape, timing.ARCH, path, progress=self.say.note)
        return path

    @contextmanager
    def server(self, stage: str, shape: str, flags: Sequence[str]) -> Iterator[ServerProcess]:
        model = self.model(shape)
        log = self.out / f"server_{stage}.log"
        self.say.note(f"starting a server of {model}")
        with running_server(model, choose_port(None), log, flags) as server:
            yield server

    def runs(self, seeds: Sequence[int], steps: int, arms: Iterable[str] = ARMS) -> dict[str, Any]:
        """Finished runs are left alone, an interrupted one goes on. Seeds outermost: a slow hour hits every arm."""
        with self.server("runs", "tiny", SERVER_FLAGS) as server:
            for seed in seeds:
                for arm in arms:
                    folder = self.out / "runs" / f"{arm}_{seed}"
                    self.say.note(f"run {folder.name}")
                    settings = Settings(arm=arm, seed=seed, steps=steps)
                    Run(settings, self.model("tiny"), server.client, folder).train(self.say)
        return {"seeds": list(seeds), "settings": asdict(Settings(steps=steps))}

    def test(self, prompts: int, samples: int) -> dict[str, Any]:
        checkpoints = sorted((self.out / "runs" / "speculation_0").glob("checkpoint_*.safetensors"))
        if len(checkpoints) < 3:
            raise ValueError(
                f"the test needs three checkpoints of {self.out / 'runs' / 'speculation_0'}: run that first"
            )
        os.environ |= {"SGLANG_ER_TEST_HOOK": HOOK, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path[1:2]])}
        try:
            with self.server("test", "tiny", SERVER_FLAGS) as server:
                result = fixed_policy.FixedPolicyTest(server.client, self.say.note, prompts, samples).run(checkpoints)
        finally:
            del os.environ["SGLANG_ER_TEST_HOOK"]
        for line in fixed_policy.describe(result):
            self.say.note(line)
        return result

    def timing(self, pairs: int) -> dict[str, Any]:
        known = known_kappa(timing.ARCH, timing.SHAPE, TIMING_ALPHA, 0)
        assert known is not None
        trainer = Trainer(self.model("tiny"), timing.TIMED)
        with self.server("timing", timing.SHAPE, TIMING_FLAGS) as server:
            records = timing.measure(server.client, trainer, known["kappa"], self.say.note, pairs)
        return {"records": records, "summary": timing.summarize(records)}

    def keep(self, stage: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Write what a stage found, with where it comes from."""
        before = machine.look()
        found = measure()
        described = {**provenance(), "command": COMMAND, "machine": machine_facts(before, machine.look()), **found}
        (self.out / f"{stage}.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


COMMAND = "make bench-training"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.study", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="of the runs; a report needs all")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=fixed_policy.PROMPTS, help="of the fixed-policy test")
    parser.add_argument("--samples", type=int, default=fixed_policy.SAMPLES, help="to each prompt, on either side")
    parser.add_argument("--pairs", type=int, default=timing.PAIRS, help="pairs of blocks in each step of the timing")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    say = Progress()
    study = Study(args.out, say)
    try:
        if "runs" in args.stages:
            study.keep("runs", lambda: study.runs(args.seeds, args.steps, args.arms))
        if "test" in args.stages:
            study.keep("fixed_policy", lambda: study.test(args.prompts, args.samples))
        if "timing" in args.stages:
            study.keep("timing", lambda: study.timing(args.pairs))
        if "report" in args.stages:
            report.write(args.out)
            say.note(f"wrote {args.out / 'report.html'}")
    except (ValueError, RolloutError) as error:
        print(f"grpo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
