"""Students of N bands: what inflation keeps, what each student takes, what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from timm.models._manipulate import adapt_input_conv

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import StudentConfig, build_student, tiny_clip_config, tiny_ssm_config
from co2s_fast.models.inflate import NORMALIZATION, inflate, input_conv

BANDS = {
    4: ("red", "green", "blue", "nir"),
    10: ("blue", "green", "red", "re1", "re2", "re3", "nir", "nir2", "swir1", "swir2"),
}
DINO = {"embed_dim": 64, "depth": 2, "num_heads": 2}


@pytest.fixture
def filters() -> torch.Tensor:
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("named", [False, True])
def test_the_response_to_equal_bands_stays(filters, channels, named) -> None:
    names = BANDS[10][:channels] if named else None
    wide = inflate(filters, channels, names)
    assert wide.shape == (8, channels, 4, 4)
    torch.testing.assert_close(wide.sum(1), filters.sum(1))
    gray = torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(gray.expand(-1, channels, -1, -1), wide),
        torch.nn.functional.conv2d(gray.expand(-1, 3, -1, -1), filters),
    )


def test_three_bands_keep_their_filters(filters) -> None:
    assert inflate(filters, 3) is filters
    assert inflate(filters, 3, ("Red", "Green", "Blue")) is filters
    turned = inflate(filters, 3, ("blue", "green", "red"))
    torch.testing.assert_close(turned, filters.flip(1))
    infrared = inflate(filters, 3, ("nir", "red", "green"))  # nir takes what nobody else has
    torch.testing.assert_close(infrared, filters[:, [2, 0, 1]])


def test_named_colours_keep_their_filters_and_others_get_the_mean(filters) -> None:
    wide = inflate(filters, 10, BANDS[10])
    torch.testing.assert_close(wide[:, [2, 1, 0]], filters * 3 / 10)
    mean = filters.mean(1, keepdim=True) * 3 / 10
    torch.testing.assert_close(wide[:, 3:], mean.expand(-1, 7, -1, -1))
    unnamed = inflate(filters, 4)
    torch.testing.assert_close(unnamed, filters.mean(1, keepdim=True).expand(-1, 4, -1, -1) * 3 / 4)


def test_where_timm_s_rule_agrees(filters) -> None:
    for channels in (1, 3):
        torch.testing.assert_close(inflate(filters, channels), adapt_input_conv(channels, filters))
    off = adapt_input_conv(4, filters).sum(1) - filters.sum(1)
    assert off.abs().max() > 0.1  # why ours is not theirs


def config_of(kind: str, clip_files, dino_file, small_decoder, **changes) -> StudentConfig:
    if kind == "clip":
        model, weights = clip_files
        return StudentConfig(backbone="clip", model=model, weights=weights, levels=(0, 1, 3),
                             text={"source": "hash"}, decoder=small_decoder, **changes)  # fmt: skip
    return StudentConfig(backbone="timm", model="vit_tiny_patch16_dinov3_qkvb",
                         weights=str(dino_file), overrides=DINO, levels=(0, 1),
                         decoder={**small_decoder, "skip_channels": (16,), "up_channels": (32,)},
                         **changes)  # fmt: skip


@pytest.fixture
def dino_file(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0, **DINO)
    state = {k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "dino.safetensors")
    return tmp_path / "dino.safetensors"


@pytest.mark.parametrize("kind", ["clip", "timm"])
@pytest.mark.parametrize("channels", [1, 4, 10])
def test_a_pretrained_student_sees_equal_bands_as_grey(
    kind, channels, clip_files, dino_file, small_decoder, classes
) -> None:
    files = clip_files, dino_file, small_decoder
    three = build_student(config_of(kind, *files), classes, seed=0).eval()
    names = BANDS.get(channels)
    wide = build_student(
        config_of(kind, *files, channels=channels, bands=names), classes, seed=0
    ).eval()
    assert wide.channels == channels and wide.provenance["channels"] == channels
    assert wide.provenance["inflated"] and not three.provenance["inflated"]
    gray = torch.full((1, 1, 32, 48), 0.5)
    # In normalised units, where the two statistics of a grey image differ from band to band.
    maps = [s.backbone(gray.expand(-1, s.channels, -1, -1)) for s in (three, wide)]
    for before, after in zip(*maps, strict=True):
        torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"\[B, {channels}, H, W\], got \(1, 3, 32, 48\)"):
        wide(torch.rand(1, 3, 32, 48))
    trained = {n for n, p in wide.backbone.named_parameters() if p.requires_grad}
    assert any("conv1" in n or "patch_embed" in n for n in trained)
    assert not any("mlp" in n for n in trained)
    groups = {g["name"]: g for g in wide.parameter_groups(1e-4, 0.01)}
    rates = [groups[name]["lr"] for name in ("input", "backbone")]
    assert rates == pytest.approx([1e-4, 1e-6])
    total = sum(p.numel() for g in groups.values() for p in g["params"])
    assert total == wide.trainable_count()
    names = [g["name"] for g in three.parameter_groups(1e-4, 0.01)]
    assert "input" not in names


@pytest.mark.parametrize("make", [tiny_clip_config, tiny_ssm_config])
def test_tiny_students_of_seven_bands_learn_from_each(make, classes) -> None:
    student = build_student(make(channels=7), classes, seed=0)
    images = torch.rand(2, 7, 40, 64, requires_grad=True)
    logits = student(images)
    assert logits.shape == (2, 5, 12, 16)
    logits.square().sum().backward()
    assert (images.grad.abs().sum((0, 2, 3)) > 0).all()
    again = build_student(make(channels=7), classes, seed=0, load=False)
    again.load_state_dict(student.state_dict())


def test_statistics_by_channel(classes) -> None:
    given = {"mean": (0.1, 0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7, 0.8)}
    student = build_student(tiny_ssm_config(channels=4, **given), classes, seed=0)
    assert student.mean.flatten().tolist() == pytest.approx(given["mean"])
    assert student.std.flatten().tolist() == pytest.approx(given["std"])
    student = build_student(tiny_ssm_config(channels=4, bands=("nir", "red", "green", "blue")),
                            classes, seed=0)  # fmt: skip
    red, green, blue = NORMALIZATION["imagenet"][0]
    mean = [(red + green + blue) / 3, red, green, blue]
    assert student.mean.flatten().tolist() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 0}, "greater than or equal to 1"),
        ({"channels": 4, "mean": (0.5,) * 3, "std": (0.2,) * 3}, "mean needs 4 values"),
        ({"mean": (0.5,) * 3}, "mean and std go together"),
        ({"mean": (0.5,) * 3, "std": (0.2, 0.2, 0.0)}, "std must be above 0"),
        ({"channels": 4, "bands": ("red",)}, "bands needs 4 values"),
        ({"overrides": {"in_chans": 4}}, "give channels instead"),
    ],
)
def test_what_a_configuration_may_not_say(changes, said) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny_ssm_config(**changes)


def test_weights_for_other_channels_are_refused(tmp_path, classes) -> None:
    from co2s_fast.models.loading import OWN_BACKBONE

    student = build_student(tiny_ssm_config(channels=4), classes, seed=0)
    file = tmp_path / "ssm.safetensors"
    save_file(student.backbone.state_dict(), file, metadata=OWN_BACKBONE)
    same = build_student(tiny_ssm_config(channels=4, weights=str(file)), classes, seed=1)
    first = same.backbone.state_dict()["stem.stages.0.0.weight"]
    assert torch.equal(first, load_file(file)["stem.stages.0.0.weight"])
    with pytest.raises(DataError, match=r"ssm.safetensors is for .* 4 channels, expected 5"):
        build_student(tiny_ssm_config(channels=5, weights=str(file)), classes, seed=0)


def test_a_projection_that_cannot_be_inflated() -> None:
    with pytest.raises(UsageError, match="only a convolution over three channels"):
        input_conv(torch.nn.Linear(3, 4), 5, None, pretrained=True)
