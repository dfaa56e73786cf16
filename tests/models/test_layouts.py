"""Files in the layouts of the original releases, loaded, against independently built models.

Every file has the release's names and shapes at a small width, with random values.
"""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import eva, vision_transformer
from torch import nn

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import StudentConfig, build_student
from co2s_fast.models.inflate import NORMALIZATION
from co2s_fast.models.weights.choose import settings
from co2s_fast.models.weights.convert import convert, describe, import_weights

VIT = {"embed_dim": 128, "depth": 3, "num_heads": 2}
IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def randomised(model: nn.Module) -> nn.Module:
    """Random values everywhere: as initialised, whole parts would be zeros or ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def timm_model(name: str, **options) -> nn.Module:
    options = {"num_classes": 0, "img_size": 64, **VIT, **options}
    return randomised(timm.create_model(name, **options))


def maps_of(path, kind, classes, small_decoder, images=IMAGE):
    """What a student started from this file hands to its decoder, images not normalised."""
    config = StudentConfig(**settings(kind, str(path)), decoder=small_decoder)
    student = build_student(config, classes, seed=0)
    assert not any(p.isnan().any() for p in student.backbone.parameters())
    with torch.no_grad():
        return student.eval().backbone(images), student


def expected_maps(model: nn.Module, images=IMAGE):
    with torch.no_grad():
        return model.forward_intermediates(
            images, indices=[0, 1, 2], norm=True, intermediates_only=True
        )


def same(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().mean() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_mae(tmp_path, classes, small_decoder):
    model = timm_model("vit_base_patch16_224")
    extra = {"mask_token": torch.randn(1, 1, 64), "decoder_pos_embed": torch.randn(1, 17, 64),
             "decoder_embed.weight": torch.randn(64, 128), "decoder_pred.bias": torch.randn(768),
             "decoder_blocks.0.attn.qkv.weight": torch.randn(192, 64)}  # fmt: skip
    torch.save({"model": {**model.state_dict(), **extra}}, tmp_path / "mae_visualize.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain.pth")
    for name in ("mae_visualize", "mae_pretrain"):
        found, _ = maps_of(tmp_path / f"{name}.pth", "ssm", classes, small_decoder)
        same(found, expected_maps(model))


@pytest.mark.parametrize("form", ["teacher", "full", "backbone"])
def test_ibot(form, tmp_path, classes, small_decoder):
    model = timm_model("vit_base_patch16_224")
    other = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    heads = {"head.mlp.0.weight": torch.randn(8, 128), "head.last_layer.weight_v": torch.ones(9, 8)}
    wrapped = {f"module.backbone.{k}": v for k, v in model.state_dict().items()}
    wrapped |= {f"module.{k}": v for k, v in heads.items()}
    student = {f"module.backbone.{k}": v for k, v in other.items()}
    student["module.backbone.masked_embed"] = torch.randn(1, 128)
    content = {
        "teacher": {"state_dict": model.state_dict()},
        "full": {"student": student, "teacher": wrapped, "epoch": 800},
        "backbone": model.state_dict() | {"masked_embed": torch.randn(1, 128)},
    }[form]
    torch.save(content, tmp_path / "ibot.pth")
    found, _ = maps_of(tmp_path / "ibot.pth", "ssm", classes, small_decoder)
    same(found, expected_maps(model))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers, tmp_path, classes, small_decoder):
    name = f"vit_base_patch14{'_reg4' if registers else ''}_dinov2"
    template = timm_model(name, img_size=70)
    state = template.state_dict()
    original = {k: v for k, v in state.items() if k != "reg_token"}
    original["mask_token"] = torch.randn(1, 128)
    original["pos_embed"] = torch.randn(1, 26, 128) * 0.2
    if registers:
        original["register_tokens"] = torch.randn(1, 4, 128)
    torch.save(original, tmp_path / "dinov2.pth")
    model = timm_model(name, img_size=70)
    filtered = vision_transformer.checkpoint_filter_fn(dict(original), model)
    model.load_state_dict(filtered)
    images = torch.rand(1, 3, 70, 70)
    found, student = maps_of(tmp_path / "dinov2.pth", "ssm", classes, small_decoder, images)
    same(found, expected_maps(model, images))
    assert (student.patch_size, student.pads_to) == (14, 1)
    # Another size is resized to the next multiple, and the logits cover all of it, not more.
    small = torch.rand(1, 3, 60, 64)
    with torch.no_grad():
        resized = F.interpolate(small, (70, 70), mode="bilinear")
        torch.testing.assert_close(student(small), student(resized), rtol=1e-3, atol=1e-4)
    assert student(small).shape[-2:] == (20, 20)


def test_dinov3(tmp_path, classes, small_decoder):
    model = timm_model("vit_base_patch16_dinov3_qkvb")
    original = {}
    for name, value in model.state_dict().items():
        name = name.replace("reg_token", "storage_tokens")
        name = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
        if name.endswith("q_bias"):
            other = model.state_dict()[name.replace("q_bias", "v_bias")]
            name = name.replace("q_bias", "qkv.bias")
            value = torch.cat([value, torch.randn(128), other])
        if not name.endswith("v_bias"):
            original[name] = value
    for i in range(3):
        mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(128)
        original[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    original |= {"mask_token": torch.zeros(1, 128), "rope_embed.periods": torch.ones(16)}
    torch.save(original, tmp_path / "dinov3.pth")
    reference = timm_model("vit_base_patch16_dinov3_qkvb")
    reference.load_state_dict(eva.checkpoint_filter_fn(dict(original), reference))
    found, _ = maps_of(tmp_path / "dinov3.pth", "ssm", classes, small_decoder)
    same(found, expected_maps(reference))
    # Meta's models of satellite images take images of another mean; only the file's name tells.
    satellite = tmp_path / "dinov3_vitb16_pretrain_sat493m-0000.pth"
    torch.save(original, satellite)
    means = [describe(path).mean for path in (tmp_path / "dinov3.pth", satellite)]
    assert means == [NORMALIZATION["imagenet"][0], NORMALIZATION["satellite"][0]]


def test_dinov3_of_transformers(tmp_path, classes, small_decoder):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
        num_register_tokens=4,
    )  # fmt: skip
    model = randomised(transformers.DINOv3ViTModel(config))
    model.save_pretrained(tmp_path)
    found, _ = maps_of(tmp_path / "model.safetensors", "ssm", classes, small_decoder)
    with torch.no_grad():
        hidden = model(IMAGE, output_hidden_states=True).hidden_states[1:]
        tokens = [model.norm(each)[:, 5:] for each in hidden]
    same(found, [each.transpose(1, 2).unflatten(2, (4, 4)) for each in tokens], 2e-4)


def beit_of_transformers(shared: bool, layer_scale: float = 0.1):
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
        image_size=64, use_mask_token=False, layer_norm_eps=1e-6,
        layer_scale_init_value=layer_scale,
        use_absolute_position_embeddings=False, use_mean_pooling=False,
        use_relative_position_bias=not shared, use_shared_relative_position_bias=shared,
    )  # fmt: skip
    return randomised(transformers.BeitModel(config))


def beit_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The original release's names for the values of transformers' model."""
    theirs = model.state_dict()
    renamed = {}
    for name, value in theirs.items():
        for pattern, replacement in [
            (r"^embeddings\.cls_token", "cls_token"),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^shared_position_bias\.", "rel_pos_bias."),
            (r"^layers\.", "blocks."),
            (r"^layernorm\.", "norm."),
            (r"layernorm_before\.", "norm1."),
            (r"layernorm_after\.", "norm2."),
            (r"lambda_(\d)", r"gamma_\1"),
            (r"attention\.o_proj\.", "attn.proj."),
            (r"attention\.([qv])_proj\.bias", r"attn.\1_bias"),
            (r"(blocks\.\d\.)relative_position_bias\.", r"\1attn."),
        ]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for i in range(3):
        parts = [renamed.pop(f"blocks.{i}.attention.{part}_proj.weight") for part in "qkv"]
        renamed[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
    index = torch.zeros(17, 17, dtype=torch.long)
    tables = [k for k in renamed if k.endswith("relative_position_bias_table")]
    return renamed | {k.replace("bias_table", "index"): index for k in tables}


@pytest.mark.parametrize("release", ["beitv2", "beitv2 fine-tuned", "simmim"])
def test_beit_and_simmim(release, tmp_path, classes, small_decoder):
    model = beit_of_transformers(shared=release != "beitv2 fine-tuned")
    state = beit_names(model)
    extra = {"mask_token": torch.randn(1, 1, 128)}
    content = {"model": state}
    if release == "beitv2":
        extra |= {"lm_head.weight": torch.randn(9, 128), "lm_head.bias": torch.randn(9),
                  "cls_pt_layers.0.attn.qkv.weight": torch.randn(384, 128)}  # fmt: skip
        content = {"model": state | extra}
    if release == "simmim":
        encoder = {f"encoder.{k}": v for k, v in (state | extra).items()}
        content = {"model": encoder | {"decoder.0.weight": torch.randn(768, 128, 1, 1)}}
    torch.save(content, tmp_path / "beit.pth")
    found, student = maps_of(tmp_path / "beit.pth", "ssm", classes, small_decoder)
    with torch.no_grad():
        hidden = model(IMAGE, output_hidden_states=True).hidden_states[1:]
    tokens = [model.layernorm(each)[:, 1:] for each in hidden]
    same(found, [each.transpose(1, 2).unflatten(2, (4, 4)) for each in tokens], 1e-4)
    # Images of another size than the weights': the table goes to another grid, and learns.
    logits = student.train()(torch.rand(1, 3, 48, 96))
    assert logits.shape[-2:] == (12, 24)
    logits.square().sum().backward()
    named = student.named_parameters()
    tables = [p for n, p in named if n.endswith(".attn.relative_position_bias_table")]
    assert len(tables) == (3 if release == "beitv2 fine-tuned" else 0)
    assert all(p.grad.abs().sum() > 0 for p in tables)


def test_beit_without_layer_scale(tmp_path, classes, small_decoder):
    model = beit_of_transformers(shared=True, layer_scale=0.0)
    state = beit_names(model)
    assert not any("gamma" in name for name in state)
    torch.save({"model": state}, tmp_path / "beit.pth")
    found, _ = maps_of(tmp_path / "beit.pth", "ssm", classes, small_decoder)
    with torch.no_grad():
        hidden = model(IMAGE, output_hidden_states=True).hidden_states[1:]
    tokens = [model.layernorm(each)[:, 1:] for each in hidden]
    same(found, [each.transpose(1, 2).unflatten(2, (4, 4)) for each in tokens], 1e-4)


def test_simmim_checkpoint_with_its_settings(tmp_path, monkeypatch):
    """Training scripts pickle their settings beside the tensors: they are read as nothing."""
    import argparse
    import sys
    import types

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    config = CfgNode(MODEL=CfgNode(TYPE="vit"))
    config.__dict__["__immutable__"] = True
    state = beit_names(beit_of_transformers(shared=True))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        encoder = {f"encoder.{k}": v for k, v in state.items()}
        beside = {"config": config, "args": argparse.Namespace(lr=1e-4), "epoch": 799}
        torch.save({"model": encoder, **beside}, tmp_path / "simmim.pth")
    found = convert(tmp_path / "simmim.pth")
    assert found.layout.name == "simmim"
    assert found.overrides["use_shared_rel_pos_bias"] is True


CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 1, "layers": 2},
}


def clip_against(found: nn.Module, images, text, expected_image, expected_text):
    with torch.no_grad():
        torch.testing.assert_close(found.encode_image(images), expected_image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.encode_text(text), expected_text, rtol=1e-4, atol=1e-4)


def load(path):
    from co2s_fast.models.loading import load_clip

    about = settings("clip", str(path))
    return load_clip(about["model"], about["weights"], about["overrides"]), about


def test_openai_state_dict(tmp_path):
    import open_clip
    from open_clip.model import build_model_from_openai_state_dict

    state = randomised(open_clip.CLIP(**CLIP, quick_gelu=True)).state_dict()
    state = {k: v.half() if v.dim() > 1 else v for k, v in state.items()}
    sizes = {"input_resolution": 64, "context_length": 12, "vocab_size": 50}
    sizes = {k: torch.tensor(v) for k, v in sizes.items()}
    torch.save({**state, **sizes}, tmp_path / "ViT-B-16-state.pt")
    reference = build_model_from_openai_state_dict({**state, **sizes}, cast_dtype=torch.float32)
    reference = reference.float().eval()
    found, about = load(tmp_path / "ViT-B-16-state.pt")
    assert about["model"] == "ViT-B-16-quickgelu"
    assert about["normalization"] == "clip"
    text = torch.randint(1, 49, (3, 12))
    with torch.no_grad():
        clip_against(found, IMAGE, text, reference.encode_image(IMAGE), reference.encode_text(text))


def test_openai_archive_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(DataError, match=r"TorchScript archive.*make a plain file.*-state\.pt"):
        convert(tmp_path / "ViT-B-16.pt")


def test_clip_of_transformers(tmp_path, classes, small_decoder):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        projection_dim=64,
        vision_config={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
                       "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
        text_config={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
                     "num_attention_heads": 1, "vocab_size": 50, "max_position_embeddings": 12,
                     "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0},
    )  # fmt: skip
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    found, _ = load(tmp_path / "model.safetensors")
    text = torch.randint(1, 48, (3, 12))
    text[:, -1] = 49  # the end, the largest number, which both pool at
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(IMAGE).pooler_output)
        words = model.text_projection(model.text_model(text).pooler_output)
    clip_against(found, IMAGE, text, image, words)


def test_remoteclip_is_open_clips_layout(tmp_path):
    import open_clip

    model = randomised(open_clip.CLIP(**CLIP))
    torch.save(model.state_dict(), tmp_path / "RemoteCLIP-ViT-B-16.pt")
    found, about = load(tmp_path / "RemoteCLIP-ViT-B-16.pt")
    assert about["model"] == "ViT-B-16"
    text = torch.randint(1, 49, (3, 12))
    with torch.no_grad():
        clip_against(found, IMAGE, text, model.encode_image(IMAGE), model.encode_text(text))


def test_a_vision_tower_has_no_words_for_classes(tmp_path, classes, small_decoder):
    import open_clip

    model = randomised(open_clip.CLIP(**CLIP))
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    about = settings("clip", str(tmp_path / "tower.pt"))
    assert "text" not in about
    text = {"model": about["model"], "weights": about["weights"]}
    config = StudentConfig(**about, text=text, decoder=small_decoder)
    with pytest.raises(UsageError, match="holds a vision tower only"):
        build_student(config, classes, seed=0)
    config = StudentConfig(**about, text={"source": "hash"}, decoder=small_decoder)
    student = build_student(config, classes, seed=0)
    assert torch.equal(student.backbone.visual.proj, tower["visual.proj"])


def test_every_wrong_key_is_listed(tmp_path):
    model = timm_model("vit_base_patch16_224")
    state = dict(model.state_dict())
    gone = [key for key in state if key.startswith("blocks.1.") and "mlp" not in key]
    for key in gone:
        del state[key]
    more = [f"adapter.{i}.weight" for i in range(12)]
    torch.save({**state, **{key: torch.zeros(1) for key in more}}, tmp_path / "x.pth")
    with pytest.raises(DataError) as error:
        convert(tmp_path / "x.pth")
    assert f"missing: {len(gone)}" in str(error.value)
    assert f"unexpected: {len(more)}" in str(error.value)
    assert all(key in str(error.value) for key in [*gone, *more])


def test_q_without_k(tmp_path):
    state = {"vision_model.embeddings.class_embedding": torch.zeros(8),
             "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}  # fmt: skip
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(DataError, match=r"in_proj_weight: expected q, k and v, found q"):
        convert(tmp_path / "x.bin")


def test_an_unknown_layout_names_its_keys(tmp_path):
    torch.save({"layers.0.blocks.0.norm1.weight": torch.zeros(2)}, tmp_path / "swin.pth")
    with pytest.raises(DataError, match=r"none of the known layouts.*layers\.0\.blocks\.0\.norm1"):
        convert(tmp_path / "swin.pth")


def test_another_kind_is_told(tmp_path):
    torch.save({"model": timm_model("vit_base_patch16_224").state_dict()}, tmp_path / "mae.pth")
    with pytest.raises(DataError, match="of kind ssm"):
        settings("clip", str(tmp_path / "mae.pth"))


def test_positions_of_another_grid(tmp_path, classes, small_decoder):
    """A model built for another size takes the file's table resized, class row as it is."""
    from co2s_fast.models.clip import resize_positions

    model = timm_model("vit_base_patch16_224")
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    config = StudentConfig(
        backbone="timm", model="vit_base_patch16_224", weights=str(tmp_path / "mae.pth"),
        overrides={**VIT, "img_size": 96}, levels=(0, 1, 2), decoder=small_decoder,
    )  # fmt: skip
    student = build_student(config, classes, seed=0)
    found = student.backbone.model.pos_embed[0]
    assert torch.equal(found, resize_positions(model.pos_embed.detach()[0], (4, 4), (6, 6)))
    assert torch.equal(found[0], model.pos_embed[0, 0])


def test_import_keeps_the_numbers(tmp_path, classes, small_decoder):
    model = beit_of_transformers(shared=True)
    torch.save({"model": beit_names(model)}, tmp_path / "beit.pth")
    path = import_weights(tmp_path / "beit.pth", tmp_path / "out" / "beit.safetensors")
    raw, first = maps_of(tmp_path / "beit.pth", "ssm", classes, small_decoder)
    imported, second = maps_of(path, "ssm", classes, small_decoder)
    assert all(map(torch.equal, raw, imported))
    assert first.provenance["sha256"] == second.provenance["sha256"]
