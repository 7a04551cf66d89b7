"""GPU check, version 0: a real server on CUDA (eager, triton attention, twin dequantized by plain torch), greedy and
seeded exactness, one JSON.

Both comparisons are between decode lengths of one server: gamma 0 is SGLang's own decode step. fp32, small random
models. Exit code 0 if everything was equal and speculation took part. `--url` checks a server that runs already.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))

from support.server import Server, running_server  # noqa: E402

GAMMAS: tuple[int | str, ...] = (1, 3, 5, 7, "cycle")
PROMPTS, TOKENS, CONCURRENCY = 32, 128, 16
# Greedy outputs that come nearer to a tie than this (top-2 logprobs) are not compared: rounding, which depends on the
# batch in plain decode as well, may decide them.
LEAST_MARGIN, CANDIDATES = 2e-5, 44
# Logprobs do not show how near a seeded choice was to a tie; one output of 32 may be decided by rounding.
SEEDED_TIES = 1


def server_flags(dry_run: bool) -> list[str]:
    flags = ["--dtype", "float32", "--context-length", "512", "--max-total-tokens", "16384", "--random-seed", "1"]
    flags += ["--enable-deterministic-inference"]
    if not dry_run:
        flags += ["--device", "cuda", "--attention-backend", "triton", "--sampling-backend", "pytorch"]
        flags += ["--disable-cuda-graph"]
    return flags


def compare(server: Server, sampling: list[dict[str, Any]]) -> dict[str, Any]:
    """Outputs for every gamma against gamma 0 with the same sampling parameters (one per prompt)."""
    rng = random.Random(0)
    candidates = [[rng.randrange(256) for _ in range(rng.choice((3, 20, 70, 150)))] for _ in range(CANDIDATES)]
    server.fixed(0)
    repeated = [sampling[i % PROMPTS] for i in range(CANDIDATES)]
    replies = server.generate_all(candidates, repeated, CONCURRENCY, return_logprob=True, top_logprobs_num=2)
    greedy = sampling[0]["temperature"] == 0
    kept = [i for i, reply in enumerate(replies) if not greedy or margin(reply) >= LEAST_MARGIN][:PROMPTS]
    prompts, sampling = [candidates[i] for i in kept], [repeated[i] for i in kept]
    expected = [replies[i]["output_ids"] for i in kept]
    rows = {}
    for gamma in GAMMAS:
        server.cycle() if gamma == "cycle" else server.fixed(int(gamma))
        before, started = server.state()["steps"], time.perf_counter()
        got = [reply["output_ids"] for reply in server.generate_all(prompts, sampling, CONCURRENCY)]
        seconds, after = time.perf_counter() - started, server.state()["steps"]
        steps = after["speculating_request_steps"] - before["speculating_request_steps"]
        accepted = after["accepted_drafts"] - before["accepted_drafts"]
        rows[str(gamma)] = {
            "equal": sum(a == b for a, b in zip(got, expected)),
            "of": len(expected),
            "accept_length": round(1 + accepted / steps, 4) if steps else None,
            "seconds": round(seconds, 3),
        }
        print(f"  gamma {gamma}: {rows[str(gamma)]}", flush=True)
    rows["distinct_tokens"] = len({token for tokens in expected for token in tokens})
    return rows


def margin(reply: dict[str, Any]) -> float:
    """Smallest distance between the best and the second best logprob of any output token."""
    return min(best[0] - second[0] for best, second in reply["meta_info"]["output_top_logprobs"])


def passed(rows: dict[str, Any], ties: int = 0) -> bool:
    by_gamma = [rows[str(gamma)] for gamma in GAMMAS]
    return rows["distinct_tokens"] >= 10 and all(
        row["equal"] >= row["of"] - ties and (row["accept_length"] or 0) > 1 for row in by_gamma
    )


@contextlib.contextmanager
def the_server(url: str | None, dry_run: bool) -> Iterator[Server]:
    if url is not None:
        yield Server(url, Path("/dev/null"), None)  # type: ignore[arg-type]
        return
    from sglang_er.models.make import make_model

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model("flat", "qwen3", model, dtype="float32")
        with running_server(model, Path(folder) / "server.log", *server_flags(dry_run)) as server:
            yield server


def versions() -> dict[str, Any]:
    import torch

    from sglang_er import __version__

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "sglang_er": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU platform, to test this script")
    parser.add_argument("--url", help="use this running server (deterministic inference) instead of starting one")
    args = parser.parse_args()
    result = {**versions(), "dry_run": args.dry_run}
    if not args.dry_run and result["device"] == "cpu":
        parser.error("no GPU here: use --dry-run to test the script itself")
    greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    with the_server(args.url, args.dry_run) as server:
        print("greedy:", flush=True)
        result["greedy"] = compare(server, [greedy] * PROMPTS)
        print("seeded:", flush=True)
        result["seeded"] = compare(server, [{**greedy, "temperature": 1, "sampling_seed": i} for i in range(PROMPTS)])
        result["state"] = server.state()
    result["passed"] = passed(result["greedy"]) and passed(result["seeded"], SEEDED_TIES)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'passed' if result['passed'] else 'FAILED'}: {args.out}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
