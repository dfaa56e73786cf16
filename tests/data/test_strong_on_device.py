"""Strong views made in batch: equal to the CPU's, image by image, and the same batches."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from co2s_fast.data import Batch, DataConfig, build_loader, choose_loader, open_split
from co2s_fast.data.draws import UNLABELED, Colour, draw_colour, generator
from co2s_fast.data.strong_on_device import pack, strong_views, unpack
from co2s_fast.data.transforms import strong_view
from co2s_fast.errors import UsageError

# The CPU rounds after the jitter and twice in its fixed-point blur, and estimates contrast's pivot
# on a sixteenth of the pixels, which on images this small moves whole views by up to a level.
LARGEST, MEAN = 3, 1.0


def pictures(count, bands=3, side=64):
    """Smooth colours with noise."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, bands, 6, 6)))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (smooth + torch.from_numpy(rng.normal(0, 6, smooth.shape))).clamp(0, 255).byte()


@pytest.mark.parametrize("bands", [3, 1, 5])
def test_a_batch_of_views_is_the_views_one_by_one(bands):
    colours = [draw_colour(generator(5, i, 0, UNLABELED)) for i in range(40)]
    assert {part for c in colours for part in c.order} == {0, 1, 2, 3}
    assert any(c.gray for c in colours) and any(c.sigma for c in colours)
    images = pictures(len(colours), bands)
    before = images.clone()
    views = strong_views(images, colours)
    assert views.dtype == torch.uint8 and torch.equal(images, before)
    for view, image, colour in zip(views, images, colours, strict=True):
        difference = np.abs(strong_view(image.numpy(), colour) - view.numpy().astype(int))
        assert difference.max() <= LARGEST and difference.mean() < MEAN, colour


def test_views_of_floats_stay_in_their_range_and_leave_the_images():
    images = torch.rand(2, 5, 8, 8)
    images[1] = 1  # weights of a blur may add up to a little more
    before = images.clone()
    views = strong_views(images, [Colour((0, 1), 1.5, 1.5), Colour(sigma=0.2)])
    assert torch.equal(images, before)
    assert 0 <= views.min() and views.max() <= 1


def test_no_choice_leaves_the_image():
    images = pictures(2)
    assert torch.equal(strong_views(images, [Colour(), Colour()]), images)


def test_numbers_survive_the_way_to_the_device():
    for step in range(20):
        colour = draw_colour(generator(1, step, 0, UNLABELED))
        there = unpack(torch.tensor(pack(colour)).tolist())
        assert there.order == colour.order and there.gray == colour.gray
        assert there.sigma == pytest.approx(colour.sigma)
        assert there.hue == pytest.approx(colour.hue, abs=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("views", [{"x", "w", "s1", "s2"}, {"x", "w", "s1"}, {"x"}])
def test_the_loader_gives_the_same_batches(demo_config, demo_spec, views, workers):
    split = open_split(demo_config, demo_spec)

    def load(**options):
        config = demo_config.model_copy(update=options)
        return list(build_loader(config, demo_spec, split, views=views, seed=0, start_step=1,
                                 total_steps=3, device="cpu"))

    plain = load()
    device = load(strong_on_device=True, workers=workers)
    assert len(plain) == len(device) == 2
    for one, other in zip(plain, device, strict=True):
        for part in fields(Batch):
            a, b = getattr(one, part.name), getattr(other, part.name)
            if part.name in views & {"s1", "s2"}:
                assert a.shape == b.shape and a.dtype == b.dtype
                difference = (a.int() - b.int()).abs().float()
                assert difference.max() <= LARGEST and difference.mean() < MEAN
                assert not torch.equal(b, one.w)
            elif isinstance(a, torch.Tensor):
                assert torch.equal(a, b), part.name
            else:
                assert a == b, part.name


@pytest.mark.parametrize(("options", "device", "expected"), [
    ({"loader": "torch"}, "cpu", "torch"),
    ({"loader": "torch"}, "cuda", "torch, strong views on the device"),
    ({"loader": "torch", "strong_on_device": False}, "cuda", "torch"),
    ({}, "cpu", "torch"),
    ({}, "cuda", "dali on the gpu"),
    ({"dali_placement": "cpu"}, "cuda", "dali on the cpu"),
    ({"loader": "dali"}, "cpu", "dali on the cpu"),
])
def test_choice_of_the_loader(monkeypatch, options, device, expected):
    monkeypatch.setattr("co2s_fast.data.loader.dali_is_installed", lambda: True)
    assert str(choose_loader(DataConfig(**options), device)) == expected


def test_choice_without_dali(monkeypatch):
    monkeypatch.setattr("co2s_fast.data.loader.dali_is_installed", lambda: False)
    assert choose_loader(DataConfig(), "cuda").loader == "torch"
    with pytest.raises(UsageError, match=r"co2s-fast\[dali\]"):
        choose_loader(DataConfig(loader="dali"), "cuda")


def test_gpu_placement_without_a_gpu(monkeypatch):
    monkeypatch.setattr("co2s_fast.data.loader.dali_is_installed", lambda: True)
    with pytest.raises(UsageError, match="dali_placement"):
        choose_loader(DataConfig(loader="dali", dali_placement="gpu"), "cpu")
