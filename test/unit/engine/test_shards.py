"""Sizes that ranks cannot share in whole groups are told with what fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_er.config import ConfigError
from sglang_er.engine.shards import check_model, check_shard


def test_whole_groups_and_undivided_layers_pass():
    check_shard("layer", 256, 512, 128)
    check_shard("layer", 300, 300, 128)  # its last group is padded once, on one rank


@pytest.mark.parametrize(("inputs", "advice"), [(160, "use --er-group-size 32"), (192, "64"), (100, "use fewer ranks")])
def test_what_does_not_fit_says_what_does(inputs: int, advice: str):
    with pytest.raises(ConfigError, match=advice) as raised:
        check_shard("mlp", inputs, 2 * inputs, 128)
    assert "\n" not in str(raised.value)


def model(**sizes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 320} | sizes)


def test_a_models_configuration_is_enough():
    check_model(model(), 64, 1, 128)
    check_model(model(intermediate_size=1024), 64, 4, 128)
    with pytest.raises(ConfigError, match="160 of the 320 inputs of down_proj"):
        check_model(model(), 64, 2, 128)
    with pytest.raises(ConfigError, match="64 of the 256 inputs of o_proj"):
        check_model(model(num_attention_heads=4, num_key_value_heads=4), 64, 4, 128)


@pytest.mark.parametrize(
    "sizes",
    [
        {"moe_intermediate_size": 128},
        {"num_experts": 64},
        {"intermediate_size": 1000},  # padded on a CPU, refused on a GPU
        {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 0},
        {"num_attention_heads": None, "intermediate_size": [64, 64]},
    ],
)
def test_what_it_does_not_tell_is_left_to_the_layers(sizes: dict[str, object]):
    check_model(model(**sizes), 64, 2, 128)
