"""The choices behind a batch, without its pixels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_data import two_classes

from co2s_fast.data import DataConfig
from co2s_fast.data.draws import Geometry
from co2s_fast.data.files import Item
from co2s_fast.data.plan import Plan, steps_per_epoch
from co2s_fast.data.splits import Split


def tile(name: str) -> Item:
    return Item(name, Path(f"images/{name}.png"), Path(f"labels/{name}.png"))


@pytest.mark.parametrize(("scale", "expected"), [("native", True), ((64, 32), False)])
def test_images_of_a_reference_size_are_resized_without_antialiasing(scale, expected):
    config = DataConfig(labels=1, batch_size=1, scale=scale)
    assert Plan(config, two_classes(), Split([tile("a")], [], []), {"x"}, 0).antialias is expected


def test_a_pass_may_be_filled_up_as_several_processes_do():
    """Of five images in four shares of two: the first three come again, and none is left out."""
    tiles = [tile(str(number)) for number in range(5)]
    config = DataConfig(labels=1, batch_size=4, epoch_shards=4)
    split = Split(tiles, tiles, [])
    assert steps_per_epoch(config, split) == 2
    plan = Plan(config, two_classes(), split, {"x", "w"}, 0)
    for start in range(0, 6, 2):
        shown = [item.name for step in (start, start + 1) for _, item in plan.unlabeled(step)]
        assert set(shown) == set("01234") and shown[5:] == shown[:3]


def test_a_pass_over_the_unlabelled_images_shows_none_twice():
    """Of five in batches of two, another one is left out in each pass."""
    tiles = [tile(str(number)) for number in range(5)]
    plan = Plan(DataConfig(labels=1, batch_size=2), two_classes(), Split(tiles, tiles, []),
                {"x", "w"}, 0)
    shown = [{item.name for step in (start, start + 1) for _, item in plan.unlabeled(step)}
             for start in range(0, 24, 2)]
    assert {len(names) for names in shown} == {4}
    assert set.union(*shown) == set("01234")


def test_a_mask_that_only_measures_and_cannot_be_used_is_told_of_once(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "label.png")
    item = Item("a", tmp_path / "a.png", tmp_path / "label.png")
    plan = Plan(DataConfig(labels=1, batch_size=1), two_classes(mask={}), Split([item], [item], []),
                {"x", "w"}, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert (plan.true_crop(item, Geometry(8, 8, 0, 0, 8, False), 8, 8) == 255).all()
    assert len(caught) == 1 and "4 x 4 pixels, its image" in str(caught[0].message)
