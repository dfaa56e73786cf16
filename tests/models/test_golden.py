"""Values and gradients of the released networks, from stored outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from co2s_fast.models.clip import ClipBackbone, resize_positions
from co2s_fast.models.config import DecoderConfig
from co2s_fast.models.decoder import QueryDecoder
from co2s_fast.models.loading import load_strictly
from co2s_fast.models.official import (
    clip_from_official,
    decoder_from_official,
    dinov3_from_official,
)
from co2s_fast.models.ssm import Bfloat16Rope, TimmBackbone

# float32 networks, summed in another order than the released code's: 1e-4 on features of unit
# spread; the decoder's logits agree with float64 to 3e-6, twice that is allowed for two float32s.
NETWORK = {"rtol": 0.0, "atol": 1e-4}
DECODER = {"rtol": 0.0, "atol": 1e-5}


def tensor(data: np.lib.npyio.NpzFile, key: str) -> Tensor:
    return torch.from_numpy(data[key]).float()


def under(data: np.lib.npyio.NpzFile, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): tensor(data, k) for k in data.files if k.startswith(prefix)}


def assert_gradients(module: torch.nn.Module, expected: dict[str, Tensor], limit: float) -> None:
    assert expected
    for name, gradient in expected.items():
        error = (module.get_parameter(name).grad - gradient).abs().max()
        assert error <= limit * gradient.abs().max() + 1e-6, f"{name}: {error:.2e}"


@pytest.fixture(scope="module")
def head(golden):
    return golden("vlg_head_small.npz")


def make_decoder(head, **changes) -> QueryDecoder:
    official = json.loads(str(head["config"]))
    config = DecoderConfig(
        channels=official["channels"],
        text_channels=official["text_channels"],
        skip_channels=official["skip_channels"],
        up_channels=official["up_channels"],
        layers=official["num_layers"],
        heads=official["num_heads"],
        pool=official["pool_size"],
        kernel=official["conv1_ksize"],
        **changes,
    )
    decoder = QueryDecoder([48, 48, 48], official["text_in_channels"], config)
    load_strictly(decoder, decoder_from_official(under(head, "sd/")), "golden")
    return decoder


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoder(head, case, checkpointing):
    decoder = make_decoder(head, gradient_checkpointing=checkpointing)
    features = [tensor(head, f"{case}/feat{i}").requires_grad_() for i in range(3)]
    text = tensor(head, f"{case}/text").requires_grad_()
    out = decoder(features, text)
    torch.testing.assert_close(out, tensor(head, f"{case}/out"), **DECODER)
    (out * tensor(head, f"{case}/R")).sum().backward()
    pairs = [(f.grad, tensor(head, f"{case}/grad_feat{i}")) for i, f in enumerate(features)]
    for found, expected in [*pairs, (text.grad, tensor(head, f"{case}/grad_text"))]:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    if case == "a":
        gradients = decoder_from_official(under(head, "a/grad_sd/"))
        assert gradients.keys() == dict(decoder.named_parameters()).keys()
        assert_gradients(decoder, gradients, 2e-5)


def test_decoder_resizes_its_logits(head):
    decoder = make_decoder(head, resize_to=(96, 96))
    out = decoder([tensor(head, f"a/feat{i}") for i in range(3)], tensor(head, "a/text"))
    torch.testing.assert_close(out, tensor(head, "a/out_pred_masks"), **DECODER)


def test_decoder_float64_agrees_with_float32(head):
    features = [tensor(head, f"b/feat{i}") for i in range(3)]
    text = tensor(head, "b/text")
    single = make_decoder(head)(features, text)
    double = make_decoder(head).double()([f.double() for f in features], text.double())
    torch.testing.assert_close(single.double(), double, **DECODER)


@pytest.fixture(scope="module")
def clip_data(golden):
    return golden("clip_vit_small.npz")


def make_clip(data) -> ClipBackbone:
    import open_clip

    tower = open_clip.CLIP(
        embed_dim=512,
        vision_cfg={
            "image_size": 64,
            "layers": 4,
            "width": 64,
            "head_width": 16,
            "patch_size": 16,
        },
        text_cfg={"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    ).visual
    load_strictly(tower, clip_from_official(under(data, "sd/")), "golden")
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return ClipBackbone(tower, [0, 2, 4])


@pytest.mark.parametrize("case", ["square64", "wide64x96", "odd70x50", "big128"])
def test_clip_maps(clip_data, case):
    maps = make_clip(clip_data)(tensor(clip_data, f"{case}/img"))
    for level, found in enumerate(maps):
        torch.testing.assert_close(found, tensor(clip_data, f"{case}/feat{level}"), **NETWORK)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_clip_gradients(clip_data, checkpointing):
    backbone = make_clip(clip_data)
    backbone.gradient_checkpointing = checkpointing
    maps = backbone(tensor(clip_data, "square64/img"))
    sum((m * tensor(clip_data, f"square64/R{i}")).sum() for i, m in enumerate(maps)).backward()
    expected = {
        "visual.transformer.resblocks." + name.removeprefix("layers.").replace(".attn.", ".", 1): g
        for name, g in under(clip_data, "square64/grad_sd/").items()
    }
    assert_gradients(backbone, expected, 1e-5)


def test_clip_block_outputs_are_something_else(clip_data):
    # Guards the test above: value-path maps must not be confusable with ordinary block outputs.
    maps = make_clip(clip_data)(tensor(clip_data, "square64/img"))
    ordinary = tensor(clip_data, "square64/resid0")[:, 1:].transpose(1, 2).view_as(maps[0])
    assert (maps[0] - ordinary).abs().max() > 0.1


def test_position_table_on_another_grid(clip_data):
    found = resize_positions(tensor(clip_data, "pos_load/source")[0], (7, 7), (4, 4))
    torch.testing.assert_close(found, tensor(clip_data, "pos_load/resized")[0], **NETWORK)


@pytest.fixture(scope="module")
def dino_data(golden):
    return golden("dinov3_small.npz")


def make_dino(data, rope: str) -> TimmBackbone:
    import timm

    model = timm.create_model(
        "vit_base_patch16_dinov3_qkvb", embed_dim=64, depth=4, num_heads=4, num_classes=0
    )
    load_strictly(model, dinov3_from_official(under(data, "sd/")), "golden")
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return TimmBackbone(model, data["out_indices"].tolist(), rope=rope)


def test_dinov3_maps_with_float32_rope(dino_data):
    maps = make_dino(dino_data, "fp32")(tensor(dino_data, "square64/img"))
    for level, found in enumerate(maps):
        expected = tensor(dino_data, f"square64/feat{level}_rope_fp32")
        torch.testing.assert_close(found, expected, **NETWORK)


@pytest.mark.parametrize("case", ["square64", "wide64x96", "odd70x50", "big256"])
def test_dinov3_maps_with_bfloat16_rope(dino_data, case):
    maps = make_dino(dino_data, "bf16")(tensor(dino_data, f"{case}/img"))
    for level, found in enumerate(maps):
        error = (found - tensor(dino_data, f"{case}/feat{level}")).abs()
        # A query or key next to a rounding boundary moves by a whole bfloat16 step (0.4 %) on a
        # difference in the last float32 bit, so single entries stray; float32 rope strays 1e-2.
        assert error.max() < 3e-3
        assert error.mean() < 2e-4


def test_dinov3_rope_table_is_bitwise_the_released_one(dino_data):
    rope = make_dino(dino_data, "bf16").model.rope
    assert isinstance(rope, Bfloat16Rope)
    for grid in [(4, 4), (4, 6), (16, 16), (32, 32)]:
        sin, cos = rope.get_embed(grid).float().chunk(2, -1)
        name = f"rope/{grid[0]}x{grid[1]}"
        assert torch.equal(sin, tensor(dino_data, f"{name}/sin"))
        assert torch.equal(cos, tensor(dino_data, f"{name}/cos"))


def test_dinov3_gradients(dino_data):
    backbone = make_dino(dino_data, "bf16")
    maps = backbone(tensor(dino_data, "square64/img"))
    sum((m * tensor(dino_data, f"square64/R{i}")).sum() for i, m in enumerate(maps)).backward()
    expected = dinov3_from_official(under(dino_data, "square64/grad_sd/"))
    # 0.4 % is one bfloat16 step; with float32 rope the largest difference is 1.5 %.
    assert_gradients(backbone.model, expected, 5e-3)
