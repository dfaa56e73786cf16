"""What the optimizer is built with, and how its moments come back from a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from co2s_fast.engine import checkpoint
from co2s_fast.engine.config import TrainConfig
from co2s_fast.engine.optimizer import build_optimizer
from co2s_fast.models import StudentConfig, build_student

CLASSES = [SimpleNamespace(name=name, concepts=[name]) for name in ("water", "road", "roof")]


@pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_every_group_has_the_options_of_the_configuration(tiny_students, trainable) -> None:
    config = StudentConfig.model_validate({**tiny_students["ssm"], "trainable": trainable})
    train = TrainConfig(
        steps=1, lr=2e-4, weight_decay=0.3, betas=(0.7, 0.8), eps=1e-5,
        backbone_multiplier=0.1, decoder_multiplier=5, adapter_multiplier=3,
    )  # fmt: skip
    optimizer = build_optimizer({"ssm": build_student(config, CLASSES, seed=0)}, train)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    expected = {"backbone": 2e-5, "adapters": 6e-4, "decoder": 1e-3, "queries": 2e-4}
    assert rates == pytest.approx({name: expected[name.removeprefix("ssm/")] for name in rates})
    assert ("ssm/adapters" in rates) == (trainable == "lora") and "ssm/decoder" in rates
    assert ("ssm/backbone" in rates) or trainable == "lora"
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-5, 0.3)
        assert group["initial_lr"] == group["lr"]


def test_moments_come_back_in_the_layout_of_their_weights() -> None:
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.rand(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    tensors, structure = checkpoint.pack_optimizer(optimizer)
    stored = {name: checkpoint.on_cpu(value) for name, value in tensors.items()}
    before = optimizer.state[layer.weight]["exp_avg"].clone()
    checkpoint.unpack_optimizer(optimizer, stored, structure)
    after = optimizer.state[layer.weight]["exp_avg"]
    assert torch.equal(after, before) and after.stride() == layer.weight.stride()
