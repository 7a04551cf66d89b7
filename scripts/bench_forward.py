"""What a plain and a draft forward of one request cost in a live server, against the bytes they have to read, and
what plain decode costs in SGLang's own model code with PyTorch's linear layers and attention.

    .venv/bin/python scripts/bench_forward.py --shape 0.5b [--json FILE]

Blocks of a few tokens of each take turns with readings of the bandwidth while the server is idle. A draft forward is
the share of a draft pass: Python and sampling of the draft included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from sglang_er.bench import stream, timing
from sglang_er.cli.common import cache_dir, cached_model
from sglang_er.rollout import launcher, machine, prompts, provenance
from sglang_er.rollout.measure import PLAIN
from sglang_er.rollout.progress import Progress

INPUT, TOKENS, GAMMA = 256, 32, 5
KINDS: dict[str, dict[str, Any]] = {
    "plain": {**PLAIN, "executor": "native"},
    "draft": {"policy": "fixed", "gamma": GAMMA, "executor": "native"},
    "stock": {**PLAIN, "executor": "wrapped"},
}


def seconds_of(client: Any, policy: dict[str, Any], request: prompts.Request) -> float:
    """Of one plain step, or of one draft forward."""
    client.set_policy(policy)
    before = client.state()["steps"]
    client.generate(request.input_ids, request.sampling(1.0))
    client.set_policy(policy)  # waits until the last step is counted
    after = client.state()["steps"]
    if policy.get("gamma"):
        now, then = (steps["draft_costs"].get("1", {"forwards": 0, "seconds": 0.0}) for steps in (after, before))
        return (now["seconds"] - then["seconds"]) / (now["forwards"] - then["forwards"])
    now, then = (steps["costs"].get("1", {}).get("0", {"steps": 0, "seconds": 0.0}) for steps in (after, before))
    return (now["seconds"] - then["seconds"]) / (now["steps"] - then["steps"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="0.5b", choices=("0.5b", "1.5b"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    progress = Progress(sys.stderr)
    model = cached_model(args.shape, "qwen3", progress)
    port = launcher.choose_port(None)
    flags = ["--speculative-algorithm", "EFFICIENT_ROLLOUT", "--max-total-tokens", "8192"]
    with launcher.running_server(model, port, cache_dir() / "logs" / f"forward-{port}.log", flags) as server:
        client = server.client
        request = prompts.make_requests([TOKENS], INPUT, task_text=True, seed=0)[0]
        before = machine.look()
        memory = stream.Stream()
        for policy in KINDS.values():
            seconds_of(client, policy, request)  # made at first use
        read: list[float] = []
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(args.rounds):
            progress.update(f"round {number + 1} of {args.rounds}")
            read.append(memory.measure(timing.Timing(3, calls=2)).read)
            for kind, policy in KINDS.items():
                seconds[kind].append(seconds_of(client, policy, request))
        twin = client.state()["twin"]
    exact = 2 * twin["quantized_weights"]
    read_bytes = {"plain": exact, "draft": twin["nbytes"], "stock": exact}
    bandwidth = statistics.median(read)
    found = {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "bytes": read_bytes[name],
            "over_bytes": statistics.median(values) * bandwidth / read_bytes[name],
        }
        for name, values in seconds.items()
    }
    print(f"{args.shape}, one request, {INPUT} tokens of context, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, row in found.items():
        print(
            f"{name:6} {row['milliseconds']:.2f} ms for {row['bytes'] / 1e9:.3f} GB of weights: "
            f"{row['over_bytes']:.2f}x its bytes / bandwidth"
        )
    if args.json:
        about = {**provenance.provenance(), "machine": provenance.machine_facts(before, machine.look())}
        content = {"what": "forward", **about, "read_bytes_per_second": bandwidth, **found}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
