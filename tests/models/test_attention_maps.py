"""The attention that is drawn is the attention that is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.errors import UsageError
from co2s_fast.models import StudentConfig, build_student, tiny_clip_config, tiny_ssm_config
from co2s_fast.models.attention_maps import attention_maps, recorded_attention

MAKE = {"clip": tiny_clip_config, "ssm": tiny_ssm_config}


@pytest.fixture(params=["clip", "ssm", "ssm-bf16"])
def student(request, classes):
    name, _, rope = request.param.partition("-")
    student = build_student(MAKE[name](**({"rope": rope} if rope else {})), classes, seed=0).eval()
    with torch.no_grad():  # attention of fresh weights is flat
        for key, value in student.backbone.named_parameters():
            if "qkv" in key or "in_proj" in key:
                value.mul_(8 if "qkv" in key else 3)
            if "bias" in key:
                value.normal_(0, 0.5)
    return student


def attentions(student) -> list[torch.nn.Module]:
    if student.config.backbone == "clip":
        return [block.attn for block in student.backbone.visual.transformer.resblocks]
    return [block.attn for block in student.backbone.model.blocks]


def values(attention, tokens) -> tuple[torch.Tensor, torch.nn.Module]:
    """Values by head [B, heads, N, d] of an attention's input, and its output projection."""
    width = tokens.shape[-1]
    if isinstance(attention, torch.nn.MultiheadAttention):
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        value, out = F.linear(tokens, weight[2 * width :], bias[2 * width :]), attention.out_proj
    else:
        value = F.linear(tokens, attention.qkv.weight[2 * width :], attention.v_bias)
        out = attention.proj
    return value.unflatten(2, (attention.num_heads, -1)).transpose(1, 2), out


@torch.no_grad()
def test_recorded_weights_give_the_attention_s_output(student) -> None:
    """Weights times values through the projection: what the fused layers put out by themselves."""
    image = torch.rand(1, 3, 64, 96)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(index):
        def hook(module, args, output):
            seen[index] = args[0], output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [a.register_forward_hook(note(i)) for i, a in enumerate(attentions(student))]
    plain = student(image)
    for hook in hooks:
        hook.remove()
    with recorded_attention(student.backbone, lambda weights: weights) as found:
        torch.testing.assert_close(student(image), plain, atol=1e-4, rtol=1e-4)
    used = len(seen)
    assert used == (3 if student.config.backbone == "clip" else 4)
    assert sorted(found) == list(range(4))
    for index, (tokens, output) in seen.items():
        weights = found[index]
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert weights.max() > 0.2  # far from flat: the comparison says something
        value, project = values(attentions(student)[index], tokens)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(project(mixed), output, atol=2e-4, rtol=2e-4)
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in student.modules()]
    assert not any(hooks)
    assert all(getattr(a, "fused_attn", True) for a in attentions(student))


def test_the_query_chooses_the_row(student) -> None:
    image = torch.rand(1, 3, 40, 70)  # padded to 48 x 80: a grid of 3 x 5
    whole = {}
    with torch.no_grad(), recorded_attention(student.backbone, lambda weights: weights) as found:
        student.features(image)
        whole = dict(found)
    prefix = whole[0].shape[-1] - 15
    assert prefix == (1 if student.config.backbone == "clip" else 5)
    maps = attention_maps(student, image)
    assert maps.maps.shape == (4, 4, 3, 5) and maps.query == "class token"
    torch.testing.assert_close(maps.maps[1].flatten(1), whole[1][0, :, 0, prefix:])
    at = attention_maps(student, image, point=(69, 17))
    assert at.query == "patch (1, 4)"
    torch.testing.assert_close(at.maps[2].flatten(1), whole[2][0, :, prefix + 9, prefix:])
    assert (at.on_patches < 1 + 1e-6).all() and (at.on_patches > 0).all()
    with pytest.raises(UsageError, match="point 70,3: outside of the image, 70 x 40 pixels"):
        attention_maps(student, image, point=(70, 3))


def test_a_grid_over_a_resized_image(classes) -> None:
    """A student that resizes to whole patches: its grid lies over the image and no more."""
    image = torch.rand(1, 3, 40, 70)
    students = (build_student(tiny_ssm_config(odd_sizes=rule), classes, seed=0)
                for rule in ("pad", "resize"))  # fmt: skip
    padded, resized = (attention_maps(student, image, (45, 39)) for student in students)
    assert (padded.covers, resized.covers) == ((48, 80), (40, 70))
    assert (padded.query, resized.query) == ("patch (2, 2)", "patch (2, 3)")
    assert padded.maps.shape == resized.maps.shape == (4, 4, 3, 5)


def test_adapters_have_to_be_merged(classes) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        student = build_student(tiny_clip_config(trainable="lora"), classes, seed=0)
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(UsageError, match="merge them first"):
        attention_maps(student, image)
    student.merge_adapters()
    assert attention_maps(student, image).maps.shape == (4, 4, 2, 2)


def test_weights_that_fill_the_memory(classes) -> None:
    student = build_student(tiny_clip_config(), classes, seed=0)
    with pytest.raises(UsageError, match=r"between 16385 tokens takes 4\.3 GB a layer"):
        attention_maps(student, torch.zeros(1, 3, 2048, 2048))


def test_layers_count_from_the_last_in_use(classes) -> None:
    image = torch.rand(1, 3, 32, 32)
    clip, ssm = (
        attention_maps(build_student(make(), classes, seed=0), image) for make in MAKE.values()
    )
    assert (clip.used, ssm.used) == (3, 4)
    assert (clip.layer(-1), clip.layer(3), clip.layer(-3)) == (2, 3, 0)
    assert (ssm.layer(-1), ssm.layer(0)) == (3, 0)
    for wrong in (4, -4):
        with pytest.raises(UsageError, match=rf"layer {wrong}: this backbone has layers 0 to 3"):
            clip.layer(wrong)


@torch.no_grad()
def test_the_last_block_of_clip_from_what_comes_into_it(classes) -> None:
    student = build_student(tiny_clip_config(), classes, seed=0).eval()
    image = torch.rand(1, 3, 32, 32)
    maps = attention_maps(student, image)
    visual = student.backbone.visual
    normalised = (image - student.mean) / student.std
    stem = visual.conv1(normalised)[1]
    tokens = student.backbone._tokens(stem, student.backbone._positions(stem.shape[-2:]))
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
    tokens = visual.transformer.resblocks[-1].ln_1(tokens)
    attention = visual.transformer.resblocks[-1].attn
    query, key = F.linear(tokens, attention.in_proj_weight[:256], attention.in_proj_bias[:256]
                          ).unflatten(2, (2, 4, 32)).unbind(2)  # fmt: skip
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) / 32**0.5).softmax(-1)
    torch.testing.assert_close(maps.maps[3].flatten(1), weights[0, :, 0, 1:])


def test_a_backbone_without_class_token(classes, small_decoder) -> None:
    config = StudentConfig(
        backbone="timm", model="vit_tiny_patch16_224", levels=(0, 1), trainable="full",
        weights=None, decoder={**small_decoder, "skip_channels": (16,), "up_channels": (32,)},
        overrides={"class_token": False, "global_pool": "avg", "depth": 2, "embed_dim": 64,
                   "num_heads": 2, "img_size": 64},
    )  # fmt: skip
    student = build_student(config, classes, seed=0)
    maps = attention_maps(student, torch.rand(1, 3, 64, 64))
    assert maps.query == "mean of all patches"
    torch.testing.assert_close(maps.on_patches, torch.ones(2, 2))
    assert student.training
