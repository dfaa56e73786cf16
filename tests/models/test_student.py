"""Students: sizes, freezing, optimizer groups, perturbation, learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import StudentConfig, build_student, tiny_clip_config, tiny_ssm_config
from co2s_fast.models.loading import clip_description

TINY = [tiny_clip_config, tiny_ssm_config]


def attention_student(classes, backbone, small_decoder, **changes):
    """A student in the paper's form, small: patch stem, three levels, attention only."""
    if backbone == "clip":
        config = StudentConfig(
            backbone="clip",
            model="tiny-clip",
            levels=(0, 2, 4),
            stem="patch",
            skips="levels",
            trainable="attention",
            decoder=small_decoder,
            **changes,
        )
    else:
        config = StudentConfig(
            backbone="timm",
            model="vit_tiny_patch16_dinov3_qkvb",
            weights=None,
            overrides={"embed_dim": 64, "depth": 4, "num_heads": 2},
            levels=(0, 2, 3),
            decoder=small_decoder,
            **changes,
        )
    with pytest.warns(UserWarning, match="random weights"):
        return build_student(config, classes, seed=0)


@pytest.mark.parametrize("config", TINY)
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (32, 128), (70, 50), (16, 16), (33, 47)])
def test_any_size(config, size, classes):
    student = build_student(config(), classes, seed=0).eval()
    logits = student(torch.rand(2, 3, *size))
    tokens = [-(-side // 16) for side in size]
    assert logits.shape == (2, 5, 4 * tokens[0], 4 * tokens[1])
    assert torch.isfinite(logits).all()


def test_both_students_share_a_grid_at_odd_sizes(classes):
    shapes = {build_student(c(), classes, seed=0)(torch.rand(1, 3, 70, 50)).shape for c in TINY}
    assert len(shapes) == 1


@pytest.mark.parametrize("config", TINY)
def test_bytes_and_floats_agree(config, classes):
    student = build_student(config(), classes, seed=0).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(student(images), student(images.float() / 255))


def test_normalization(classes):
    student = build_student(tiny_clip_config(), classes, seed=0)
    seen = []
    student.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 40, 32)
    student.features(grey)
    assert seen[0].shape == (1, 3, 48, 32)
    assert seen[0].abs().max() < 1e-6  # mean colour, and padding with the same


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 4, 32, 32)])
def test_wrong_shape(images, classes):
    student = build_student(tiny_clip_config(), classes, seed=0)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        student(images)


def test_wrong_dtype(classes):
    student = build_student(tiny_clip_config(), classes, seed=0)
    with pytest.raises(TypeError, match="uint8, or float"):
        student(torch.zeros(1, 3, 32, 32, dtype=torch.int64))


@pytest.mark.parametrize("backbone", ["clip", "timm"])
def test_attention_alone_learns(backbone, classes, small_decoder):
    student = attention_student(classes, backbone, small_decoder)
    student(torch.rand(2, 3, 64, 64)).square().mean().backward()
    learning = {n for n, p in student.backbone.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in student.backbone.named_parameters() if ".attn." in n}
    assert len(learning) == (16 if backbone == "clip" else 4 * 5)


@pytest.mark.parametrize("config", TINY)
def test_everything_trainable_gets_a_gradient(config, classes):
    # DistributedDataParallel stalls on a trainable parameter that a step does not reach.
    student = build_student(config(), classes, seed=0)
    student(torch.rand(2, 3, 64, 64)).square().mean().backward()
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_blocks_past_the_deepest_level_are_frozen(classes, small_decoder):
    config = StudentConfig(
        backbone="timm",
        model="vit_tiny_patch16_224",
        weights=None,
        overrides={"embed_dim": 64, "depth": 5, "num_heads": 2},
        levels=(0, 1, 2),
        trainable="full",
        decoder=small_decoder,
    )
    student = build_student(config, classes, seed=0)
    student(torch.rand(1, 3, 64, 80)).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert ("blocks.3." in name or "blocks.4." in name) <= (not parameter.requires_grad)


def test_tiny_blocks_do_not_start_behind_layer_scale(classes):
    """DINOv3's factors of 1e-5 would all but switch off blocks that start from random weights."""
    student = build_student(tiny_ssm_config(), classes, seed=0)
    scales = {n: p for n, p in student.backbone.named_parameters() if "gamma" in n}
    assert len(scales) == 2 * 4 and all((p == 1).all() for p in scales.values())


@pytest.mark.parametrize("backbone", ["clip", "timm"])
def test_parameter_groups(backbone, classes, small_decoder):
    student = attention_student(classes, backbone, small_decoder)
    groups = {g["name"]: g for g in student.parameter_groups(1e-4, 0.01)}
    rates = {"backbone": 1e-6, "decoder": 1e-3}
    if backbone == "timm":
        rates["queries"] = 1e-4
    assert {n: g["lr"] for n, g in groups.items()} == pytest.approx(rates)
    assert all(g["weight_decay"] == 0.01 for g in groups.values())
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in student.parameters() if p.requires_grad}
    count = sum(p.numel() for g in groups.values() for p in g["params"])
    assert student.trainable_count() == count
    torch.optim.AdamW(list(groups.values()))


def test_frozen_backbone_has_no_group(classes, small_decoder):
    student = attention_student(classes, "timm", small_decoder)
    config = student.config.model_copy(update={"trainable": "frozen"})
    with pytest.warns(UserWarning):
        student = build_student(config, classes, seed=0)
    assert [g["name"] for g in student.parameter_groups(1e-4, 0.0)] == ["decoder", "queries"]


def test_multipliers_can_be_chosen(classes):
    student = build_student(tiny_ssm_config(), classes, seed=0)
    groups = student.parameter_groups(5e-4, 0.01, backbone_multiplier=1, decoder_multiplier=2)
    assert [g["lr"] for g in groups] == pytest.approx([5e-4, 1e-3, 5e-4])


def test_perturb_drops_whole_channels(classes):
    student = build_student(tiny_clip_config(), classes, seed=0)
    features = [torch.ones(4, 64, 3, 5), torch.ones(4, 32, 6, 10)]
    generator = torch.Generator().manual_seed(1)
    dropped = student.perturb(features, generator)
    for level in dropped:
        per_channel = level.flatten(2)
        assert (per_channel == per_channel[..., :1]).all()
        assert set(level.unique().tolist()) == {0.0, 2.0}
        assert 0.3 < (level == 0).float().mean() < 0.7
    again = student.perturb(features, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(dropped, again, strict=True))


def test_perturb_with_given_masks(classes):
    student = build_student(tiny_clip_config(feature_dropout=0.25), classes, seed=0)
    features = [torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2)]
    keep = [torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool), torch.ones(2, 5)]
    first, second = student.perturb(features, keep=keep)
    torch.testing.assert_close(first, features[0] * keep[0][..., None, None] / 0.75)
    torch.testing.assert_close(second, features[1] / 0.75)
    with pytest.raises(ValueError, match="keep must have shapes"):
        student.perturb(features, keep=[keep[0], keep[0]])


def test_perturb_without_dropout_is_the_identity(classes):
    student = build_student(tiny_clip_config(feature_dropout=0.0), classes, seed=0)
    features = (torch.rand(2, 3, 4, 4),)
    assert student.perturb(features)[0] is features[0]


def test_classes_share_weights(classes):
    # Permuting the classes permutes the logits: nothing in the decoder knows a class by its index.
    student = build_student(tiny_clip_config(), classes, seed=0).eval()
    images = torch.rand(1, 3, 64, 64)
    before = student(images)
    order = torch.tensor([3, 1, 4, 0, 2])
    student.queries.copy_(student.queries[order])
    torch.testing.assert_close(student(images), before[:, order], rtol=1e-4, atol=1e-5)


def test_images_do_not_see_each_other(classes):
    student = build_student(tiny_ssm_config(), classes, seed=0).eval()
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(student(images)[1:2], student(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", TINY)
def test_same_seed_same_student(config, classes):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = build_student(config(), classes, seed=5)
    assert torch.equal(torch.rand(3), expected), "the global random state must not move"
    second = build_student(config(), classes, seed=5)
    other = build_student(config(), classes, seed=6)
    assert first.provenance == second.provenance
    assert first.provenance["sha256"] != other.provenance["sha256"]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("config", TINY)
def test_state_dict_round_trip(config, classes):
    first = build_student(config(), classes, seed=0).eval()
    second = build_student(config(), classes, seed=1).eval()
    second.load_state_dict(first.state_dict())
    images = torch.rand(1, 3, 48, 64)
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize("config", TINY)
def test_gradient_checkpointing_changes_nothing(config, classes):
    images = torch.rand(2, 3, 64, 64)
    gradients = []
    for on in (False, True):
        changes = {"gradient_checkpointing": on, "decoder": {"gradient_checkpointing": on}}
        student = build_student(config(**changes), classes, seed=0)
        student(images).square().sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_rope_survives_inference_mode(classes):
    student = build_student(tiny_ssm_config(), classes, seed=0)
    with torch.inference_mode():
        student(torch.rand(1, 3, 64, 64))
    student(torch.rand(1, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("config", TINY)
def test_learns_one_batch(config, classes):
    torch.manual_seed(0)
    student = build_student(config(), classes, seed=0)
    images = torch.rand(4, 3, 64, 64) * 0.2
    # Five vertical stripes, each with a colour of its own.
    labels = (torch.arange(64) // 13).expand(4, 64, 64)
    colours = torch.rand(5, 3)
    images = images + 0.8 * colours[labels].permute(0, 3, 1, 2)
    groups = student.parameter_groups(2e-3, 0.01, backbone_multiplier=1, decoder_multiplier=1)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(30):
        logits = F.interpolate(student(images), (64, 64), mode="bilinear")
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert losses[-1] < 0.3 * losses[0] and accuracy > 0.9, (losses[0], losses[-1], accuracy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "patch"}, "skips='stem' needs stem='conv'"),
        ({"levels": (2, 1)}, "levels must rise"),
        ({"levels": (2, 4)}, "levels must name 1 maps"),
        ({"weights": "openai"}, "stem='conv' has no released weights"),
        ({"decoder": {"group_channels": 7}}, "group_channels 7 does not divide"),
        ({"rope": "bf16"}, "rope is for backbone 'timm'"),
        ({"depth": 3}, "Extra inputs"),
        ({"text": {"source": "file"}}, "path goes with source 'file'"),
        ({"text": {"template": "a photo"}}, "must contain {concept}"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_clip_config(**changes)


def test_levels_must_exist(classes):
    with pytest.raises(UsageError, match="levels must end with the map in text space, 4"):
        build_student(tiny_clip_config(levels=(3,)), classes, seed=0)
    with pytest.raises(UsageError, match="levels must be below the 4 blocks"):
        build_student(tiny_ssm_config(levels=(4,)), classes, seed=0)


@pytest.mark.parametrize("backbone", ["clip", "timm"])
def test_unknown_model(backbone, classes):
    config = StudentConfig(backbone=backbone, model="no-such-model", weights=None)
    with pytest.raises(UsageError, match="no-such-model"):
        build_student(config, classes, seed=0)


def test_paper_defaults():
    clip, dino = StudentConfig(backbone="clip"), StudentConfig(backbone="timm")
    assert (clip.model, clip.weights, clip.levels) == ("ViT-B-16-quickgelu", "openai", (0, 4, 12))
    assert (clip.queries, clip.trainable, clip.normalization) == ("text", "attention", "imagenet")
    assert (dino.model, dino.levels) == ("vit_base_patch16_dinov3_qkvb", (2, 7, 11))
    assert (dino.weights, dino.queries) == ("pretrained", "learnable")
    assert StudentConfig(**clip.model_dump(mode="json")) == clip


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["clip", "timm"])
def test_full_size(backbone, classes):
    config = StudentConfig(backbone=backbone, weights=None, text={"source": "hash"})
    with pytest.warns(UserWarning, match="random weights"):
        student = build_student(config, classes, seed=0)
    logits = student(torch.rand(1, 3, 224, 224))
    assert logits.shape == (1, 5, 56, 56)
    logits.mean().backward()
    decoder = sum(p.numel() for p in student.decoder.parameters())
    attention = sum(p.numel() for p in student.backbone.parameters() if p.requires_grad)
    tensors = [p for p in student.backbone.parameters() if p.grad is not None]
    if backbone == "clip":
        assert (decoder, len(tensors)) == (2_217_185, 48)
        assert attention == 12 * 4 * (768 * 768 + 768)
    else:
        # timm stores query and value biases apart and no key bias at all.
        assert (decoder, len(tensors)) == (2_249_953, 60)
        assert attention == 12 * (4 * 768 * 768 + 3 * 768)


@pytest.mark.parametrize(("content", "said"), [("[1]", r"expected keys and values, found \[1\]"),
                                               ("{", "not a readable JSON file"),
                                               ("{}", "with embed_dim, vision_cfg")])  # fmt: skip
def test_descriptions_of_clip_models_that_are_none(tmp_path, content, said) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises((DataError, UsageError), match=said):
        clip_description(str(path), {})
