"""The native decoder against a plain torch decoder in fp64 that knows no paging and no cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from sglang_er import kernels
from sglang_er.kernels.cpu.decoder import Decoder
from sglang_er.kernels.kv_shadow import LEVELS

LINEARS = ("qkv", "o", "gate_up", "down")
SLOTS, COLUMNS = 300, 64


@dataclass
class Shape:
    hidden: int = 48
    intermediate: int = 80
    vocab: int = 101
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    neox: bool = True
    qk_norm: bool = False
    bias: bool = False
    window: int = -1
    dtype: torch.dtype = torch.float32
    layers: int = 2


@dataclass
class Model:
    shape: Shape
    config: dict = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)

    def native(self, lm_head: bool = True) -> Decoder:
        config = dict(self.config)
        if not lm_head:
            config = {name: value for name, value in config.items() if not name.startswith("lm_head.")} | {"lm_head": 0}
        return Decoder(config, self.layers)


def make_model(shape: Shape, generator: torch.Generator) -> Model:
    def random(*size: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale + shift).to(shape.dtype)

    heads, kv = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "qkv": (heads + 2 * kv, shape.hidden),
        "o": (shape.hidden, heads),
        "gate_up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    angles = torch.arange(COLUMNS)[:, None] * (0.3 ** torch.arange(shape.rotary_dim // 2))
    config = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rotary_dim": shape.rotary_dim,
        "neox": int(shape.neox),
        "window": shape.window,
        "eps": 1e-5,
        "attention_scale": shape.head_dim**-0.5,
        "group_size": 32,
        "int8_activations": 0,
        "shadow_bits": 0,
        "lm_head": 1,
        "embedding": random(shape.vocab, shape.hidden),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1).float(),
        "final_norm": random(shape.hidden, scale=0.1, shift=1.0),
        "lm_head.weight": random(shape.vocab, shape.hidden, scale=0.2),
    }
    layers = []
    for _ in range(shape.layers):
        layer = {name: random(shape.hidden, scale=0.1, shift=1.0) for name in ("input_norm", "post_norm")}
        if shape.qk_norm:
            layer |= {name: random(shape.head_dim, scale=0.1, shift=1.0) for name in ("q_norm", "k_norm")}
        for name, size in sizes.items():
            layer[f"{name}.weight"] = random(*size, scale=size[1] ** -0.5)
            if shape.bias and name == "qkv":
                layer["qkv.bias"] = random(size[0])
        # A slot that nobody wrote would show.
        for name in ("keys", "values"):
            layer[name] = torch.full((SLOTS, shape.kv_heads, shape.head_dim), float("nan"), dtype=shape.dtype)
        layers.append(layer)
    return Model(shape, config, layers)


def reference_logits(model: Model, tokens: torch.Tensor, weights: list[dict] | None = None) -> torch.Tensor:
    """fp64 logits [n, vocab] of one sequence; `weights` overrides the linears of the layers."""
    shape, config = model.shape, model.config
    n, half = len(tokens), shape.rotary_dim // 2
    cos, sin = config["cos_sin"][:n, :half].double(), config["cos_sin"][:n, half:].double()

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["eps"]).rsqrt() * weight.double()

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [n, heads, head_dim]
        turned, rest = x[..., : shape.rotary_dim], x[..., shape.rotary_dim :]
        a, b = (turned[..., :half], turned[..., half:]) if shape.neox else (turned[..., ::2], turned[..., 1::2])
        c, s = cos[:, None], sin[:, None]
        pair = (a * c - b * s, b * c + a * s)
        turned = torch.cat(pair, -1) if shape.neox else torch.stack(pair, -1).flatten(-2)
        return torch.cat([turned, rest], -1)

    hidden = config["embedding"][tokens].double()
    position = torch.arange(n)
    seen = position[None] <= position[:, None]
    if shape.window >= 0:
        seen &= position[None] >= position[:, None] - shape.window
    for index, layer in enumerate(model.layers):
        linear = {name: layer[f"{name}.weight"].double() for name in LINEARS} if weights is None else weights[index]
        x = norm(hidden, layer["input_norm"])
        qkv = x @ linear["qkv"].T + (layer["qkv.bias"].double() if shape.bias else 0)
        heads, kv = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        q, k, v = (part.view(n, -1, shape.head_dim) for part in qkv.split([heads, kv, kv], -1))
        if shape.qk_norm:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        k, v = (t.to(shape.dtype).double() for t in (rotate(k).float(), v.float()))  # as the pool rounds them
        group = shape.q_heads // shape.kv_heads
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k.repeat_interleave(group, 1)) * config["attention_scale"]
        attended = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1).transpose(0, 1)
        hidden = hidden + attended.transpose(0, 1).reshape(n, -1) @ linear["o"].T
        gate, up = (norm(hidden, layer["post_norm"]) @ linear["gate_up"].T).chunk(2, -1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ linear["down"].T
    return norm(hidden, config["final_norm"]) @ config["lm_head.weight"].double().T


class Paging:
    """Requests whose positions lie in shuffled slots, as after some hours of serving."""

    def __init__(self, requests: int, generator: torch.Generator) -> None:
        order = torch.randperm(SLOTS, generator=generator)
        rows = torch.randperm(requests + 2, generator=generator)[:requests]
        self.table = torch.full((requests + 2, COLUMNS), SLOTS - 1, dtype=torch.int32)
        each = SLOTS // (requests + 1)
        for index, row in enumerate(rows.tolist()):
            self.table[row, :each] = order[index * each : (index + 1) * each][:COLUMNS].int()
        self.rows = rows

    def batch(self, tokens: list[torch.Tensor], begins: list[int]) -> tuple[torch.Tensor, ...]:
        """The tokens of every request, at positions begins[b] and on."""
        positions = [begin + torch.arange(len(part)) for begin, part in zip(begins, tokens, strict=True)]
        slots = [self.table[row, part].long() for row, part in zip(self.rows.tolist(), positions, strict=True)]
        counts = torch.tensor([0, *(len(part) for part in tokens)])
        lens = torch.tensor([begin + len(part) for begin, part in zip(begins, tokens, strict=True)])
        return torch.cat(tokens), torch.cat(positions), torch.cat(slots), self.table, self.rows, counts.cumsum(0), lens


SHAPES = [
    Shape(),
    Shape(qk_norm=True, q_heads=6, kv_heads=2, head_dim=24, rotary_dim=24, hidden=50),
    Shape(bias=True, q_heads=7, kv_heads=1, layers=3),
    Shape(neox=False, rotary_dim=8),
    Shape(window=5),
    Shape(dtype=torch.bfloat16, qk_norm=True),
    Shape(kv_heads=4, head_dim=64, rotary_dim=64, intermediate=33),
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_equals_a_plain_decoder(isa, generator, shape):
    """Prefill in one piece, then a chunk, then single tokens: every logit is that of the whole sequence."""
    model = make_model(shape, generator)
    decoder, paging = model.native(), Paging(3, generator)
    lengths = (19, 7, 12)
    tokens = [torch.randint(shape.vocab, (n,), generator=generator) for n in lengths]
    expected = torch.cat([reference_logits(model, part) for part in tokens])
    pieces: list[list[torch.Tensor]] = [[], [], []]
    cuts = [(0, 4, 6, *range(7, n + 1)) for n in lengths]
    for step in range(max(map(len, cuts)) - 1):
        live = [b for b in range(3) if step + 1 < len(cuts[b])]
        part = [tokens[b][cuts[b][step] : cuts[b][step + 1]] for b in live]
        ids, positions, slots, table, rows, counts, lens = Paging.batch(
            _rows(paging, live), part, [cuts[b][step] for b in live]
        )
        logits = decoder.logits(ids, positions, slots, table, rows, counts, lens)
        for index, b in enumerate(live):
            pieces[b].append(logits[counts[index] : counts[index + 1]])
    actual = torch.cat([torch.cat(parts) for parts in pieces]).double()
    bound = 3e-5 if shape.dtype == torch.float32 else 3e-2
    assert (actual - expected).abs().max() < bound * expected.abs().max()


def _rows(paging: Paging, live: list[int]) -> Paging:
    view = Paging.__new__(Paging)
    view.table, view.rows = paging.table, paging.rows[live].contiguous()
    return view


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_does_not_depend_on_the_batch_the_width_or_threads(isa, generator, dtype):
    """The verify pass's promise: the same bits as plain decode."""
    shape = Shape(dtype=dtype, qk_norm=True, hidden=96, intermediate=200, vocab=333)
    model = make_model(shape, generator)
    paging = Paging(4, generator)
    tokens = [torch.randint(shape.vocab, (n,), generator=generator) for n in (40, 33, 21, 50)]
    decoder = model.native()
    decoder.logits(*paging.batch([part[:-6] for part in tokens], [0] * 4))
    wide = decoder.logits(*paging.batch([part[-6:] for part in tokens], [len(part) - 6 for part in tokens]))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for b in range(4):
            one = _rows(paging, [b])
            for i in range(6):
                begin = len(tokens[b]) - 6 + i
                alone = decoder.logits(*one.batch([tokens[b][begin : begin + 1]], [begin]))
                assert torch.equal(alone[0], wide[6 * b + i])


@pytest.mark.parametrize("int8", [False, True])
def test_twin_equals_the_dequantized_model(isa, generator, int8):
    shape = Shape(hidden=128, intermediate=160, vocab=200)
    model = make_model(shape, generator)
    weights = []
    for layer in model.layers:
        packed = {name: kernels.quantize_pack(layer.pop(f"{name}.weight"), 32) for name in LINEARS}
        weights.append({name: kernels.dequantize(weight).double() for name, weight in packed.items()})
        for name, weight in packed.items():
            layer |= {f"{name}.packed": weight.packed, f"{name}.scales_zeros": weight.scales_zeros}
    model.config["int8_activations"] = int(int8)
    tokens = torch.randint(shape.vocab, (30,), generator=generator)
    expected = reference_logits(model, tokens, weights)
    actual = model.native().logits(*Paging(1, generator).batch([tokens], [0])).double()
    error = (actual - expected).norm() / expected.norm()
    assert error < (0.03 if int8 else 1e-5)
    assert not int8 or error > 1e-4  # the 8-bit path is really taken


def test_hidden_states_and_logits_belong_together(isa, generator):
    model = make_model(Shape(), generator)
    tokens = torch.randint(101, (9,), generator=generator)
    batch = Paging(1, generator).batch([tokens], [0])
    hidden = model.native(lm_head=False).hidden(*batch)
    assert torch.equal(kernels.bf16_linear(hidden, model.config["lm_head.weight"]), model.native().logits(*batch))


def test_writes_only_its_slots(generator):
    model = make_model(Shape(), generator)
    paging = Paging(2, generator)
    batch = paging.batch([torch.tensor([1, 2, 3]), torch.tensor([4])], [0, 0])
    model.native().logits(*batch)
    written = torch.zeros(SLOTS, dtype=torch.bool)
    written[batch[2]] = True
    for layer in model.layers:
        for name in ("keys", "values"):
            assert not layer[name][written].isnan().any() and layer[name][~written].isnan().all()


def test_empty_batch(generator):
    model = make_model(Shape(), generator)
    empty = torch.empty(0, dtype=torch.int64)
    table = torch.zeros((1, COLUMNS), dtype=torch.int32)
    assert model.native().logits(empty, empty, empty, table, empty, torch.zeros(1, dtype=torch.int64), empty).shape == (
        0,
        101,
    )


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 101, "token id is out of range"),
        (0, -1, "token id is out of range"),
        (1, COLUMNS, "past the rotary table"),
        (2, SLOTS, "outside the KV pool"),
        (4, 9, "outside req_to_token"),
        (6, COLUMNS + 1, "outside req_to_token"),
        (6, 0, "shorter than its queries"),
    ],
)
def test_bad_index_is_one_line_and_writes_nothing(generator, index, value, message):
    model = make_model(Shape(), generator)
    batch = list(Paging(1, generator).batch([torch.tensor([5])], [3]))
    batch[3][:] = 0
    batch[index] = torch.tensor([value])
    with pytest.raises(ValueError, match=message) as error:
        model.native().logits(*batch)
    assert "\n" not in str(error.value)
    assert model.layers[0]["keys"].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 47}, "wrong shape|wrong size"),
        ({"q_heads": 3}, "multiple of kv_heads"),
        ({"rotary_dim": 17}, "rotary_dim must be even"),
        ({"lm_head.weight": torch.zeros(101, 47)}, "lm_head.weight has the wrong shape"),
        ({"final_norm": torch.zeros(7)}, "final_norm has the wrong size"),
        ({"embedding": torch.zeros(101, 48, dtype=torch.float64)}, "bfloat16, float16 or float32"),
    ],
)
def test_wrong_model_is_one_line(generator, change, message):
    model = make_model(Shape(), generator)
    model.config |= change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        model.native()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_shadow_is_read_where_it_is_valid(isa, generator, format):
    """Old tokens come from the shadow, a slot that is written anew does not."""
    shape = Shape(head_dim=32, rotary_dim=32)
    model = make_model(shape, generator)
    valid = torch.zeros(SLOTS, dtype=torch.uint8)
    model.config |= {"shadow_bits": LEVELS[format].bits, "shadow_valid": valid}
    shadows = []
    for layer in model.layers:
        shadow = kernels.KvShadow.empty(SLOTS, shape.kv_heads, shape.head_dim, shape.head_dim, format)
        layer |= {f"shadow.{name}": getattr(shadow, name) for name in ("keys", "values", "key_scales", "value_scales")}
        shadows.append(shadow)
    paging, decoder = Paging(1, generator), model.native()
    tokens = torch.randint(shape.vocab, (40,), generator=generator)
    decoder.logits(*paging.batch([tokens[:39]], [0]))
    old = paging.table[paging.rows[0], :30].long()
    for layer, shadow in zip(model.layers, shadows, strict=True):
        kernels.kv_shadow_store(layer["keys"], layer["values"], old, shadow)
    valid[old] = 1
    batch = paging.batch([tokens[39:]], [39])
    exact = decoder.logits(*batch)
    near = decoder.logits(*batch, exact_newest=8)
    assert torch.equal(decoder.logits(*batch, exact_newest=40), exact)
    error = (near - exact).norm() / exact.norm()
    assert 1e-4 < error < (0.02 if format == "int8" else 0.2)
    decoder.logits(*paging.batch([tokens[:39]], [0]))  # writes all slots again
    assert not valid.any()
    assert torch.equal(decoder.logits(*batch, exact_newest=8), decoder.logits(*batch))


def test_shadow_that_was_not_given_is_refused(generator):
    batch = Paging(1, generator).batch([torch.tensor([5])], [0])
    with pytest.raises(ValueError, match="made without a shadow"):
        make_model(Shape(), generator).native().logits(*batch, exact_newest=0)
