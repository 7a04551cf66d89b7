"""What each ingredient of the twin costs in acceptance, at temperature 1, on a model that was trained.

    .venv/bin/python scripts/bench_ingredients.py [--shape tiny | --model-path DIR] [--clip-search] [--json FILE]

One server without and one with a quantized lm_head; in each, activations and the KV shadow are switched while it runs.
`--clip-search` compares scales with and without it instead: activations and KV exact, four servers. The same requests
under as many drafts a step, one setting after the other; alpha is accepted over verified drafts. On a GPU give
`--flags` what its server needs and `--activations exact`; the shadow needs draft graphs there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import product
from pathlib import Path

from sglang_er.cli.common import cache_dir, cached_model, card_of, write_json
from sglang_er.rollout import launcher, machine, measure, prompts, provenance
from sglang_er.rollout.progress import Progress
from sglang_er.rollout.steps import Steps

GAMMA, INPUT, OUTPUT, AT_ONCE = 5, 128, 128, 8
HEADS = CLIPS = (False, True)
ACTIVATIONS = ("exact", "int8")
SHADOWS = ("off", "int8", "int4")
ON_GPUS = ("fp8",)


def shadows(device: str) -> tuple[str, ...]:
    """What `kv_shadow` may be there."""
    return SHADOWS if device == "cpu" else SHADOWS + ON_GPUS


def acceptance(steps: Steps) -> dict[str, float]:
    """Alpha with the standard error of a count, and the accept length."""
    alpha, drafts = steps.alpha or 0.0, sum(steps.drafted_at.values())
    error = (alpha * (1.0 - alpha) / max(drafts, 1)) ** 0.5
    return {"alpha": alpha, "error": error, "accept_length": steps.accept_length or 1.0, "drafts": drafts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="a made model (%(default)s)")
    parser.add_argument("--model-path", type=Path, help="a checkpoint in place of it")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--output", type=int, default=OUTPUT, metavar="TOKENS", help="of a request (%(default)s)")
    parser.add_argument("--activations", default=",".join(ACTIVATIONS), help="which of them (%(default)s)")
    parser.add_argument("--clip-search", action="store_true", help="what scales of the least error bring")
    parser.add_argument("--flags", default="", help="more flags of the server")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    progress = Progress(sys.stderr)
    model = args.model_path or cached_model(args.shape, "qwen3", progress)
    task = prompts.knows_the_task(card_of(model))
    requests = prompts.make_requests([args.output] * args.requests, INPUT, task_text=task, seed=0)
    before, rows = machine.look(), []
    for head, clip in product(HEADS, CLIPS if args.clip_search else CLIPS[:1]):
        twin = ["--er-quantize-lm-head", str(head).lower(), "--er-clip-search", str(clip).lower()]
        flags = ["--max-total-tokens", "16384", *twin, *shlex.split(args.flags)]
        port = launcher.choose_port(None)
        log = cache_dir() / "logs" / f"ingredients-{port}.log"
        with launcher.running_server(model, port, log, flags) as server:
            device = server.client.send("GET", "/server_info").json()["device"]
            switched = product(args.activations.split(","), shadows(device))
            for activations, shadow in [("exact", "off")] if args.clip_search else switched:
                named = {"lm_head": "int4" if head else "exact", "scales": "searched" if clip else "plain"}
                named |= {"activations": activations, "kv": shadow}
                progress.update(", ".join(f"{key} {value}" for key, value in named.items()))
                chosen = {"draft_activations": activations, "kv_shadow": shadow, "kv_shadow_from": 0}
                jobs = measure.jobs_of(server.client, requests, temperature=1.0)
                policy = {"policy": "fixed", "gamma": GAMMA, **chosen}
                block, _ = measure.run_jobs(server.client, policy, jobs, AT_ONCE)
                rows.append({**named, **acceptance(block.steps)})
    print(f"{model.name}: {args.requests} requests of {args.output} tokens, {GAMMA} drafts a step, weights int4")
    print("lm_head  scales    activations  KV    alpha            accept length")
    for row in rows:
        print(f"{row['lm_head']:7}  {row['scales']:8}  {row['activations']:11}  {row['kv']:4}", end="  ")
        print(f"{row['alpha']:.4f} ± {2 * row['error']:.4f}  {row['accept_length']:.3f}")
    if args.json:
        about = {**provenance.provenance(), "machine": provenance.machine_facts(before, machine.look())}
        write_json(args.json, {"what": "ingredients", **about, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
