#!/usr/bin/env python3
"""Train a small model on the written-out addition task and save its bf16 weights.

    python scripts/train_tiny.py --arch qwen3          # family qk_norm: Qwen3
    python scripts/train_tiny.py --arch llama          # family plain: Llama, Qwen2, Mistral
    python scripts/train_tiny.py --arch qwen3 --device cuda --bf16 --hidden 384 --layers 8 --batch-tokens 32768 \
        --lr 1e-3 --minutes 4 --checkpoint DIR         # a larger one that a server can load: 6.5 million weights, 13 MB

Minutes on two CPU cores. Training text is drawn without end from `sglang_er.models.task`; only the response is learned.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sglang_er.compat import torchvision_shim
from sglang_er.models import checkpoint, reference, streams, task, tiny, tokenizer
from sglang_er.models.card import ModelCard
from sglang_er.models.tiny import Shape

#: Largest problem in training. Larger ones cost much; on them the models fail most.
MAX_TRAIN_OPERANDS = 16
#: Of a checkpoint in bf16: what can be kept with other records.
MOST_BYTES = 15_000_000


def operand_count(rng: random.Random, largest: int) -> int:
    """Mostly few operands, now and then many: weight 1/n."""
    counts = range(2, largest + 1)
    return rng.choices(counts, [1.0 / n for n in counts])[0]


def batches(rng: random.Random, tokens: int, progress: list[float]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels) batches [rows, length] of about `tokens` tokens, rows of like length together.

    Labels are -100 on the prompt and the padding. `progress[1]` in 0..1 raises the largest problem.
    """
    encoder = tokenizer.build_tokenizer()
    pad = tokenizer.special_ids()["pad"]
    while True:
        largest = min(MAX_TRAIN_OPERANDS, 4 + int(2.2 * MAX_TRAIN_OPERANDS * progress[1]))
        texts = []
        for _ in range(512):
            prompt = task.make_prompt(rng, operand_count(rng, largest), "train")
            response = task.write_response(rng, prompt.prompt)
            texts.append((tokenizer.chat_text(prompt.prompt), response + tokenizer.EOS))
        heads = [len(item.ids) for item in encoder.encode_batch([head for head, _ in texts])]
        rows = [item.ids for item in encoder.encode_batch([head + tail for head, tail in texts])]
        pool = sorted(zip(heads, rows, strict=True), key=lambda pair: len(pair[1]))
        groups: list[list[tuple[int, list[int]]]] = [[]]
        for pair in pool:
            if groups[-1] and len(pair[1]) * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            length = max(len(row) for _, row in group)
            ids = torch.full((len(group), length), pad)
            labels = torch.full((len(group), length), -100)
            for index, (head, row) in enumerate(group):
                ids[index, : len(row)] = torch.tensor(row)
                labels[index, head : len(row)] = torch.tensor(row[head:])
            yield ids, labels


def start_from(model: torch.nn.Module, path: Path) -> None:
    """Load trained weights. Where `model` has no QK norm and they do, the norm becomes a constant scale of q and k.

    The scale is the norm's gain over the root mean square that q or k has on task text, for each head: the function is
    nearly kept, and a short training does the rest.
    """
    weights = {name: value.float() for name, value in tiny.read_weights(path).items()}
    if set(weights) != set(model.state_dict()):
        small = streams.SmallStreams(weights, streams.text_batch()[0])
        for layer in range(tiny.TINY.layers):
            prefix = f"model.layers.{layer}."
            normed = reference.rms_norm(
                small.streams[layer], weights[f"{prefix}input_layernorm.weight"], tiny.TINY.eps
            ).flatten(0, 1)
            for kind in ("q", "k"):
                projection = f"{prefix}self_attn.{kind}_proj.weight"
                gain = weights.pop(f"{prefix}self_attn.{kind}_norm.weight")
                heads = (normed @ weights[projection].T).unflatten(-1, (-1, tiny.TINY.head_dim))
                size = heads.square().mean(-1).sqrt().mean(0)
                weights[projection] *= (gain[None, :] / size[:, None]).flatten()[:, None]
    model.load_state_dict(weights)


def new_model(args: argparse.Namespace, shape: Shape) -> torch.nn.Module:
    """With its weights drawn, or loaded, on the device. Raises ValueError for one of more than MOST_BYTES."""
    torchvision_shim.install()
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(args.seed)
    fields = tiny.hf_config(args.arch, shape, dtype="float32")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    if (size := 2 * sum(parameter.numel() for parameter in model.parameters())) > MOST_BYTES:
        raise ValueError(f"--hidden {args.hidden} --layers {args.layers} take {size / 1e6:.1f} MB in bf16, at most 15")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                fan_in = parameter.shape[1]
                parameter.normal_(
                    0.0, fan_in**-0.5 * (0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                )
    if args.start_from:
        with torch.no_grad():
            start_from(model, args.start_from)
    tiny.freeze_constant(model)
    return model.to(args.device)


def train(args: argparse.Namespace, shape: Shape) -> torch.nn.Module:
    """For `--steps`, or for `--minutes` by the clock."""
    model = new_model(args, shape)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    progress = [0.0, 0.0]
    source = batches(random.Random(args.seed), args.batch_tokens, progress)
    started, seen, step, last = time.monotonic(), 0, 0, False
    while not last:
        done = (time.monotonic() - started) / (60 * args.minutes) if args.minutes else step / args.steps
        last = done >= 1.0 if args.minutes else step == args.steps - 1
        progress[0] = min(1.0, done)
        progress[1] = 1.0 if args.start_from else progress[0]
        warm = min(1.0, (step + 1) / 50)
        rate = args.lr * warm * (args.last_rate + (1 - args.last_rate) * 0.5 * (1 + math.cos(math.pi * progress[0])))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = (part.to(args.device) for part in next(source))
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        targets = labels[:, 1:]
        kept = targets != -100
        loss = torch.nn.functional.cross_entropy(logits[kept].float(), targets[kept])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tiny.freeze_constant(model)
        seen += ids.numel()
        if step % args.log_every == 0 or last:
            elapsed = time.monotonic() - started
            print(
                f"step {step:5d}  loss {loss.item():.4f}  {elapsed:6.0f} s  {seen / elapsed:7.0f} tokens/s", flush=True
            )
        step += 1
    return model


def write_checkpoint(args: argparse.Namespace, shape: Shape, weights: dict[str, torch.Tensor]) -> int:
    """A folder that a server loads, its card included; bytes of the weights. config.json comes last, as a sign that all
    is there."""
    config = tiny.hf_config(args.arch, shape)
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    written = checkpoint.write_weights(args.checkpoint, weights.items())
    card = ModelCard(
        shape="trained",
        arch=args.arch,
        function="A small transformer, trained by scripts/train_tiny.py on the task of `sglang_er.models.task`.",
        sizes_of="no public model",
        sizes=asdict(shape),
        parameters=shape.parameters(),
        dtype="bfloat16",
        seed=args.seed,
        target_alpha=None,
        alpha=None,
        alpha_source="not measured",
        kappa=None,
    )
    card.write(args.checkpoint)
    checkpoint.write_metadata(args.checkpoint, config)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("qwen3", "llama"), required=True)
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="safetensors file, packed if it ends in .xz (default: the committed asset)",
    )
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-tokens", type=int, default=2560)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--last-rate", type=float, default=0.02, help="learning rate at the end, as a share of --lr")
    parser.add_argument("--start-from", type=Path, default=None, help="trained weights to go on from, of either family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="bf16 matrix products")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=tiny.TINY.hidden, help="a multiple of 64, a query head each")
    parser.add_argument("--layers", type=int, default=tiny.TINY.layers)
    parser.add_argument("--minutes", type=float, help="of training, in place of --steps")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a whole checkpoint there, not a file of weights"
    )
    args = parser.parse_args()
    if args.hidden <= 0 or args.hidden % tiny.TINY.head_dim:
        parser.error(f"--hidden {args.hidden} is no multiple of {tiny.TINY.head_dim}")
    heads = args.hidden // tiny.TINY.head_dim
    shape = replace(tiny.TINY, hidden=args.hidden, layers=args.layers, query_heads=heads, mlp=args.hidden)
    if shape != tiny.TINY and (args.start_from or not (args.out or args.checkpoint)):
        parser.error("--hidden and --layers of a new model: give --out or --checkpoint, and no --start-from")
    try:
        model = train(args, shape)
    except ValueError as error:
        parser.error(str(error))
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    if args.checkpoint:
        print(f"wrote {args.checkpoint} ({write_checkpoint(args, shape, weights) / 1e6:.2f} MB)")
        return 0
    out = args.out or tiny.weights_path(args.arch)
    tiny.write_weights(out, weights)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
