"""Validation images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from co2s_fast.data import DataConfig, Item, load_dataset, open_split, val_dataset
from co2s_fast.errors import DataError


@pytest.fixture
def item(tmp_path):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    coarse.resize((96, 64), Image.Resampling.BICUBIC).save(tmp_path / "i.png")
    Image.fromarray(rng.integers(0, 6, (64, 96), dtype=np.uint8)).save(tmp_path / "l.png")
    return Item("i", tmp_path / "i.png", tmp_path / "l.png")


def test_native(demo_config, demo_spec):
    split = open_split(demo_config, demo_spec)
    data = val_dataset(split.val, demo_spec, demo_config)
    assert len(data) == 16
    for (image, label, name), source in zip(data, split.val, strict=True):
        assert image.dtype == label.dtype == torch.uint8 and name == source.name
        assert image.shape == (3, 128, 128) and label.shape == (128, 128)
    for one, other in zip(data, data.loader(workers=1), strict=True):
        assert torch.equal(one[0], other[0]) and one[2] == other[2]


def test_short_side_comes_to_the_reference_and_the_label_stays(item):
    image, label, _ = val_dataset([item], load_dataset("potsdam"))[0]
    assert image.shape == (3, 512, 768) and label.shape == (64, 96)
    pixels = torch.from_numpy(np.array(Image.open(item.image))).permute(2, 0, 1)[None].double()
    expected = interpolate(pixels, (512, 768), mode="bilinear", align_corners=False)[0]
    assert (image.double() - expected).abs().max() <= 1
    native = val_dataset([item], load_dataset("potsdam"), DataConfig(scale="native"))[0][0]
    assert native.shape == (3, 64, 96)


def test_no_label_and_wrong_label(item, tmp_path):
    spec = load_dataset("potsdam")
    assert val_dataset([Item("i", item.image)], spec)[0][1] is None
    Image.new("L", (5, 5)).save(tmp_path / "l.png")
    with pytest.raises(DataError, match="5 x 5 pixels, its image"):
        val_dataset([item], spec)[0]
