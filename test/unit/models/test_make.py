"""`make-model`: checkpoints that transformers loads, cards that tell the truth, one clear line for a bad choice."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_er.cli import make_model as command
from sglang_er.models import alpha, checkpoint, evaluate, flat, make, reference, sizes, tiny, tokenizer


def quiet(line: str) -> None:
    del line


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(words)))


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_tiny_is_bf16_complete_and_greedy_solves_an_easy_prompt(arch: str, tmp_path: Path):
    assert run("--shape", "tiny", "--arch", arch, "--out", str(tmp_path / "m")) == 0
    model = evaluate.load_model(tmp_path / "m", "bfloat16")
    assert model.config.model_type == arch
    encoder = tokenizer.build_tokenizer()
    solved = 0
    with torch.inference_mode():
        for prompt in make_easy_prompts():
            ids = torch.tensor([encoder.encode(tokenizer.chat_text(prompt.prompt)).ids])
            out = model.generate(ids, max_new_tokens=120, do_sample=False)[0, ids.shape[1] :]
            assert out[-1] == tokenizer.special_ids()["eos"]
            solved += int(evaluate.task.verify(prompt, encoder.decode(out.tolist())))
    assert solved >= 3


def make_easy_prompts() -> list[evaluate.task.Prompt]:
    return [
        evaluate.task.Prompt(f"a={a} b={b} sum?", str(a + b), "easy")
        for a, b in ((123, 456), (385, 472), (999, 101), (640, 277))
    ]


def test_committed_weights_keep_the_constant_coordinate():
    for arch in ("qwen3", "llama"):
        weights = tiny.load_weights(arch)
        assert (weights["model.embed_tokens.weight"][:, 0] == 1).all()
        for name, value in weights.items():
            assert value.dtype == torch.bfloat16
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                assert not value[0].any()


def test_sampling_tiny_ends_by_itself_with_the_entropy_of_its_style(tmp_path: Path):
    make.make_model("tiny", "qwen3", tmp_path / "m", dtype="float32", progress=quiet)
    samples = evaluate.sample(
        evaluate.load_model(tmp_path / "m"), evaluate.task.load_prompts("easy")[:24], max_new_tokens=600
    )
    numbers = evaluate.summarize(samples)
    assert numbers["finished"] > 0.9
    assert numbers["accuracy"] > 0.4
    assert 0.2 <= numbers["entropy"] <= 0.5


@pytest.mark.parametrize("arch", flat.ARCHITECTURES)
def test_flat_models_load_and_their_draft_is_often_wrong(arch: str, tmp_path: Path):
    assert run("--shape", "flat", "--arch", arch, "--dtype", "float32", "--out", str(tmp_path / "m")) == 0
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = evaluate.load_model(tmp_path / "m")
        logp = model(ids).logits.log_softmax(-1)
        for name, weight in model.named_parameters():
            if weight.dim() == 3:  # experts, stacked by transformers
                weight.copy_(torch.stack([reference.fake_quantize(expert) for expert in weight]))
            elif weight.dim() == 2 and "embed" not in name and not name.endswith("mlp.gate.weight"):
                weight.copy_(reference.fake_quantize(weight))
        logq = model(ids).logits.log_softmax(-1)
    assert 0.7 < float(alpha.overlap(logp, logq).mean()) < 0.9
    assert float(-(logp.exp() * logp).sum(-1).mean()) > 5.0


def test_flat_qwen2_has_biases_and_seeds_differ():
    one = dict(flat.tensors("qwen2", torch.float32, seed=0))
    other = dict(flat.tensors("qwen2", torch.float32, seed=1))
    assert one["model.layers.0.self_attn.k_proj.bias"].abs().max() > 0.01
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert all(torch.equal(value, one[name]) for name, value in flat.tensors("qwen2", torch.float32, seed=0))


def test_shards_are_complete_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1 << 20)
    make.make_model("tiny", "llama", tmp_path / "m", progress=quiet)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    loaded = evaluate.load_model(tmp_path / "m", "bfloat16").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tiny.load_weights("llama").items())


def test_the_card_states_what_the_model_is(tmp_path: Path):
    make.make_model("flat", "qwen3", tmp_path / "m", seed=7, dtype="float32", progress=quiet)
    card = json.loads((tmp_path / "m" / "er_model_card.json").read_text())
    assert (card["shape"], card["arch"], card["seed"], card["dtype"]) == ("flat", "qwen3", 7, "float32")
    assert card["sizes"]["hidden"] == flat.FLAT.hidden
    assert card["alpha"] is None
    assert "Random weights" in (tmp_path / "m" / "README.md").read_text()


def test_a_stored_kappa_is_used_and_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shape = tiny.Shape(512, 4, 8, 2, 64, 512, 1000)
    monkeypatch.setattr(sizes, "public_size", lambda arch, name: sizes.PublicSize("a test", shape))
    monkeypatch.setattr(make, "known_kappa", lambda *choice: {"kappa": 0.25, "alpha": 0.951})
    card = make.make_model("0.5b", "qwen3", tmp_path / "m", progress=quiet)
    assert (card.kappa, card.alpha, card.target_alpha) == (0.25, 0.951, 0.95)
    assert "0.9510" in (tmp_path / "m" / "README.md").read_text()
    given = make.make_model("0.5b", "qwen3", tmp_path / "k", kappa=0.3, progress=quiet)
    assert (given.kappa, given.alpha, given.target_alpha) == (0.3, None, None)
    monkeypatch.setattr(make, "known_kappa", lambda *choice: None)
    searched = make.make_model("0.5b", "qwen3", tmp_path / "n", target_alpha=0.98, progress=quiet)
    assert searched.alpha == pytest.approx(0.98, abs=alpha.TOLERANCE)
    assert "when this checkpoint was made" in searched.alpha_source


def test_the_kappa_table_holds_public_sizes_at_the_alpha_that_it_names():
    table = json.loads((Path(make.__file__).parent / "assets" / "kappa.json").read_text())
    stored = {(row["arch"], row["shape"]) for row in table if row["target_alpha"] == make.DEFAULT_ALPHA}
    assert {("qwen3", "0.5b"), ("qwen3", "1.5b"), ("qwen2", "0.5b"), ("llama", "0.5b")} <= stored
    for row in table:
        assert sizes.public_size(row["arch"], row["shape"])
        assert make.known_kappa(row["arch"], row["shape"], row["target_alpha"], 0) == {
            "kappa": row["kappa"],
            "alpha": row["alpha"],
        }
        assert row["alpha"] == pytest.approx(row["target_alpha"], abs=alpha.TOLERANCE + 1e-3)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--shape", "tiny", "--target-alpha", "0.9"], "--target-alpha applies to 0.5b, 1.5b, 7b"),
        (["--shape", "0.5b", "--target-alpha", "1.2"], "below 1, got 1.2"),
        (["--shape", "0.5b", "--target-alpha", "nan"], "below 1, got nan"),
        (["--shape", "flat", "--kappa", "0.5"], "--kappa applies to 0.5b, 1.5b, 7b"),
        (["--shape", "0.5b", "--kappa", "-1"], "--kappa must be in 0..16"),
        (["--shape", "0.5b", "--kappa", "0.5", "--target-alpha", "0.9"], "exclude each other"),
        (["--shape", "0.5b", "--arch", "mistral"], "no size for --arch mistral --shape 0.5b"),
        (["--shape", "tiny", "--arch", "qwen3_moe"], "no architecture 'qwen3_moe'"),
    ],
)
def test_a_bad_choice_is_one_line_and_leaves_nothing(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(*words, "--out", str(tmp_path / "m")) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_content_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "precious").write_text("x")
    assert run("--shape", "tiny", "--out", str(tmp_path)) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_importing_the_command_imports_neither_torch_nor_sglang():
    code = "import sys, sglang_er.cli.make_model; print(sorted({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
