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


def test_a_models_configuration_is_enough():
    model = SimpleNamespace(num_attention_heads=8, intermediate_size=320)
    check_model(model, 64, 1, 128)
    with pytest.raises(ConfigError, match="160 of the 320 inputs of down_proj"):
        check_model(model, 64, 2, 128)
    check_model(SimpleNamespace(num_attention_heads=8, intermediate_size=512), 64, 4, 128)
    check_model(SimpleNamespace(num_attention_heads=8, intermediate_size=320, moe_intermediate_size=128), 64, 2, 128)
    check_model(SimpleNamespace(num_attention_heads=6, intermediate_size=None), 64, 4, 128)  # SGLang refuses that
