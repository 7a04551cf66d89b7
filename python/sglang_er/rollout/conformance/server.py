"""C19-C21, C24-C26, C29: how a server is set up, and what it says about itself."""

from __future__ import annotations

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Check, NotHere, expect
from sglang_er.rollout.conformance.session import Session

TOKENS = 32
# What slime reads to discover an external engine.
DISCOVERED = ("tp_size", "pp_size", "ep_size", "encoder_only", "disaggregation_mode", "enable_memory_saver")
SPECULATIVE = ("speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens")
LAUNCH = "a running server cannot show how it was launched: test/rl starts one in this way"


def without_tokenizer(session: Session) -> str | None:
    """C19."""
    if not session.info.get("skip_tokenizer_init"):
        raise NotHere("the server has a tokenizer: start it with --skip-tokenizer-init, as AReaL does")
    session.draft()
    for seed in range(4):
        reply = session.generate(bodies.areal(session.prompt(seed), TOKENS))
        replies.aligned(reply, "AReaL's request without a tokenizer", TOKENS)
        expect(not reply.get("text"), "contract", "a server without a tokenizer sent text")
    return None


def prefix_cache(session: Session) -> str | None:
    """C20."""
    if session.info.get("disable_radix_cache"):
        raise NotHere("the server has no prefix cache (--disable-radix-cache)")
    session.wait_idle()
    session.draft()
    session.flush()
    prompt = session.prompt(10, 32 + 2 * int(session.info.get("page_size") or 1))

    def cached() -> int:
        reply = session.generate(bodies.slime(prompt, 8, ignore_eos=True))
        replies.aligned(reply, "a repeated prefix", 8)
        return int(reply["meta_info"]["cached_tokens"])

    first, second = cached(), cached()
    expect((first, second > 0) == (0, True), "L7", f"cached_tokens {first} then {second}, expected 0, then more")
    session.wait_idle()
    session.flush()
    expect(not (left := cached()), "L7", f"{left} cached tokens after a flush")
    if not session.options.weights:
        return "the flush by an update was not tried: no --weights"
    session.load(session.own_weights, "conformance-flushed")
    expect(not (left := cached()), "L7", f"{left} cached tokens after an update")
    return None


def says_what_it_is(session: Session) -> str | None:
    """C21."""
    info = session.get("/server_info")
    wanted = DISCOVERED + (SPECULATIVE if session.speculates() else ())
    missing = [name for name in wanted if name not in info]
    expect(not missing, "contract", f"/server_info lacks {', '.join(missing)}")
    expect(session.get("/v1/models").get("data"), "contract", "/v1/models names no model")
    expect("weight_version" in session.get("/model_info"), "contract", "/model_info lacks weight_version")
    _healthy(session, "idle")
    session.draft()
    running = session.begin(bodies.greedy(session.prompt(11), session.long))
    running.begun.wait(10)
    _healthy(session, "busy")
    replies.aligned(running.reply.result(), "beside health checks", session.long)
    if session.options.weights:
        session.load(session.own_weights, session.version())
        _healthy(session, "updated")
    if not session.ours:
        return None
    # Two of slime's and of our own that stock SGLang lacks.
    said = session.get("/get_weight_version").get("weight_version")
    expect(said == session.version(), "contract", f"/get_weight_version says {said}")
    before = session.client.state()["twin"]["requantizations"]
    session.wait_idle()
    session.post("/er/requantize", promise="L8")
    session.draft(1)
    session.generate(bodies.greedy(session.prompt(12), 4))
    after = session.client.state()["twin"]["requantizations"]
    expect(after > before, "L8", "POST /er/requantize did not remake the twin")
    return None


def _healthy(session: Session, when: str) -> None:
    for path in ("/health", "/health_generate"):
        status = session.send("GET", path).status_code
        expect(status == 200, "contract", f"GET {path} of an {when} server: {status}")


def launched_by_slime(session: Session) -> str | None:
    """C24."""
    raise NotHere(LAUNCH)


def launched_by_areal(session: Session) -> str | None:
    """C25."""
    raise NotHere(LAUNCH)


def refused_at_start(session: Session) -> str | None:
    """C26."""
    raise NotHere("a running server has refused nothing: test/e2e/test_startup.py starts those that must not run")


def on_gpus(session: Session) -> str | None:
    """C29."""
    if session.info.get("device") != "cuda" or int(session.info.get("tp_size") or 1) < 2:
        raise NotHere("needs GPUs: --tp-size 2, CUDA IPC buckets, a memory saver")
    raise NotHere("run C12, C14 and C17 on this server; equality of ranks and CUDA IPC have no check yet (no GPU here)")


CHECKS = (
    Check("C19", "AReaL's request without a tokenizer", without_tokenizer),
    Check("C20", "the prefix cache is used, and emptied by flush and update", prefix_cache),
    Check("C21", "discovery and health: idle, busy, after an update", says_what_it_is),
    Check("C24", "slime's launch, without loading plugins", launched_by_slime),
    Check("C25", "AReaL's launch, by its command line", launched_by_areal),
    Check("C26", "unsupported options are refused at start", refused_at_start),
    Check("C29", "two ranks on GPUs", on_gpus),
)
