"""Section `release`: a trainer takes the memory and gives it back. Greedy outputs and accepted drafts must be what they
were, and what our buffers hold under each tag must really be free in between.

Weights are backed up, so that no update is needed; the twin and the KV shadow are lost, as in training.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from support.server import Server

from .sections import Cell, Context, Options, Section

GAMMA, PROMPTS, TOKENS = 3, 8, 96
TAGS = ("weights", "kv_cache", "cuda_graph")


def cells(options: Options) -> Sequence[Cell]:
    del options
    return [Cell("fp32 greedy, all tags", measure)]


def measure(context: Context) -> dict[str, Any]:
    """One request at a time, from an empty cache: the draft length then depends on nothing else."""
    assert context.servers is not None
    server = context.servers.get("fp32 saver")
    server.set_policy(kv_shadow="int4", kv_shadow_from=0)
    try:
        server.fixed(GAMMA)
        before = outputs(server)
        memory, free = server.state()["memory"], free_bytes()
        server.post("/release_memory_occupation")
        away, freed = server.state()["memory"]["released"], free_bytes() - free
        server.post("/resume_memory_occupation")
        after = outputs(server)
    finally:
        server.set_policy(kv_shadow="auto", kv_shadow_from=4096)
    asked = sum(memory["nbytes"].values()) if memory["saver"] else 0
    passed = after == before and sorted(away) == sorted(TAGS) and freed >= asked
    same = "as before" if after == before else "DIFFERENT"
    shown = f"{freed / 1e6:.0f} MB freed, ours {asked / 1e6:.0f} of them; outputs and accepts {same}"
    return {"passed": passed, "shown": shown, "saver": memory["saver"], "freed": freed, "nbytes": memory["nbytes"]}


def outputs(server: Server) -> list[tuple[list[int], int]]:
    """Tokens of every request and how many drafts of it were accepted."""
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.choice((3, 20, 70)))] for _ in range(PROMPTS)]
    server.flush_cache()
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    replies = server.generate_all(prompts, sampling, concurrency=1)
    return [(reply["output_ids"], reply["meta_info"]["spec_accept_token_num"]) for reply in replies]


def free_bytes() -> int:
    """Of the first GPU, whoever uses it; 0 on a CPU. Asked of another process: a CUDA context of ours would take memory
    from every server that follows."""
    if shutil.which("nvidia-smi") is None:
        return 0
    asked = ("nvidia-smi", "--id=0", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


SECTION = Section("release", cells)
