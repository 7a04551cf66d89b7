"""What costs are known by: the device's name among it, which no GPU has to be there for."""

from __future__ import annotations

import pytest
import torch

from sglang_er.engine.identity import device_name


@pytest.mark.parametrize(("device", "index"), [("cuda", None), ("cuda:3", 3)])
def test_a_gpu_has_the_name_that_torch_gives_it(
    device: str, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", {index: "NVIDIA H200"}.__getitem__)
    assert device_name(device) == "NVIDIA H200"


def test_a_processor_is_named_as_the_system_names_it() -> None:
    assert device_name("cpu").count(" ") >= 2 and "NVIDIA" not in device_name("cpu")
