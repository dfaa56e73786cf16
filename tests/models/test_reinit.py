"""The release's accident, asked for: a DINOv3 drawn anew after loading (D2)."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.errors import UsageError
from co2s_fast.models import StudentConfig, build_student
from co2s_fast.models.student import RandomBackboneWarning

SHAPE = {"backbone": "timm", "model": "vit_base_patch16_dinov3_qkvb", "levels": (0, 2, 3),
         "overrides": {"embed_dim": 96, "depth": 4, "num_heads": 3}}  # fmt: skip


def draw(classes, small_decoder, **changes):
    config = StudentConfig(**{**SHAPE, "decoder": small_decoder, "reinitialize": True, **changes})
    with pytest.warns(RandomBackboneWarning):
        return build_student(config, classes, seed=0)


def test_has_the_signature_of_the_released_accident(classes, small_decoder) -> None:
    student = draw(classes, small_decoder)  # the weights, "pretrained", are not fetched
    state = student.backbone.model.state_dict()
    for name, value in state.items():
        if "gamma_" in name:
            assert (value == 1e-5).all(), name
        elif name.endswith(("q_bias", "v_bias", "fc1.bias", "fc2.bias", "attn.proj.bias")):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == float(name.endswith("weight"))).all(), name
        elif name.endswith(("qkv.weight", "proj.weight", "fc1.weight")) and "patch" not in name:
            assert value.std().item() == pytest.approx(0.02, rel=0.03), name
    bound = (3 * 16 * 16) ** -0.5
    assert state["patch_embed.proj.weight"].abs().max() <= bound
    assert state["patch_embed.proj.weight"].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert state["reg_token"].std().item() == pytest.approx(0.02, rel=0.15)
    assert student.provenance["source"] == "random"


def test_its_maps_are_the_norm_of_a_random_patch_embedding(classes, small_decoder) -> None:
    backbone = draw(classes, small_decoder).backbone.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(images)
        embedded = backbone.model.norm(backbone.model.patch_embed(images).flatten(1, 2))
    for level in maps:
        found = level.flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, embedded, rtol=0, atol=1e-3)


def test_only_a_dinov3_can_be_so(classes, small_decoder) -> None:
    with pytest.raises(UsageError, match="needs a DINOv3 model, got VisionTransformer"):
        config = StudentConfig(**{**SHAPE, "model": "vit_tiny_patch16_224", "reinitialize": True,
                                  "weights": None, "decoder": small_decoder})  # fmt: skip
        build_student(config, classes, seed=0)
    with pytest.raises(ValueError, match="reinitialize is for backbone 'timm'"):
        StudentConfig(backbone="clip", reinitialize=True)
