"""Batches: a pure function of seed and step, for any number of workers and of ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch
from toy_data import truncate, two_classes, write_raw

from co2s_fast.data import (
    Batch,
    DataConfig,
    build_loader,
    open_split,
    prepare_dataset,
    split_dataset,
    steps_per_epoch,
)
from co2s_fast.data.draws import UNLABELED
from co2s_fast.data.files import load_image, load_label
from co2s_fast.data.plan import Order
from co2s_fast.errors import DataError, UsageError

ALL = {"x", "w", "s1", "s2"}


@pytest.fixture
def load(demo_config, demo_spec):
    """A function that returns the batches of some steps."""
    split = open_split(demo_config, demo_spec)

    def run(start=0, stop=6, *, views=ALL, seed=0, rank=0, world=1, **options):
        config = demo_config.model_copy(update=options)
        return list(build_loader(config, demo_spec, split, views=views, seed=seed, start_step=start,
                                 total_steps=stop, rank=rank, world=world))

    run.split = split
    return run


def assert_same(found: Batch, expected: Batch):
    for part in fields(Batch):
        one, other = getattr(found, part.name), getattr(expected, part.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), part.name
        else:
            assert one == other, part.name


@pytest.mark.parametrize("attempt", range(3))
def test_a_worker_that_is_ended_from_outside(demo_config, demo_spec, attempt):
    """As the kernel does where memory runs out; which pipe breaks first differs."""
    config = demo_config.model_copy(update={"workers": 2})
    loader = build_loader(config, demo_spec, open_split(config, demo_spec), views=ALL, seed=0,
                          start_step=0, total_steps=500)  # fmt: skip
    with pytest.raises(DataError, match=r"was ended.*data\.workers=N"):
        for _ in loader:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


def test_shapes_and_types(load):
    batch = load(0, 1)[0]
    for view in (batch.x, batch.w, batch.s1, batch.s2):
        assert view.shape == (4, 3, 128, 128) and view.dtype == torch.uint8 and view.is_contiguous()
    for labels in (batch.y, batch.ignore, batch.truth):
        assert labels.shape == (4, 128, 128) and labels.dtype == torch.uint8
        assert labels.is_contiguous()
    assert batch.boxes1.shape == (4, 4) and batch.boxes1.dtype == torch.int32
    assert set(batch.ignore.unique().tolist()) <= {0, 255}
    assert len(batch.labeled_files) == len(batch.unlabeled_files) == 4
    assert not torch.equal(batch.s1, batch.s2)


def test_two_iterations_are_identical_and_seeds_differ(load):
    for one, other in zip(load(), load(), strict=True):
        assert_same(one, other)
    assert not torch.equal(load(0, 1)[0].w, load(0, 1, seed=1)[0].w)


def test_start_step_equals_skipping(load):
    whole = load(0, 25)
    for start in (1, 9, 20):
        for one, other in zip(load(start, 25), whole[start:], strict=True):
            assert_same(one, other)


def test_workers_change_nothing(load):
    for one, other in zip(load(workers=2), load(workers=0), strict=True):
        assert_same(one, other)


def test_a_second_augmentation_of_the_same_images(load):
    """What the releases paste by CutMix: the first half of the batch is as without it."""
    views = {*ALL, "partner"}
    ranks = zip(load(views=views, rank=0, world=2), load(views=views, rank=1, world=2), strict=True)
    for plain, double, (first, second) in zip(load(), load(views=views), ranks, strict=True):
        assert double.unlabeled_files == plain.unlabeled_files * 2
        assert torch.equal(double.x, plain.x) and torch.equal(double.y, plain.y)
        for name in ("w", "s1", "s2", "ignore", "boxes1", "boxes2", "truth"):
            both, one = getattr(double, name), getattr(plain, name)
            assert torch.equal(both[:4], one) and len(both) == 8, name
            parts = [getattr(p, name).chunk(2)[half] for half in (0, 1) for p in (first, second)]
            assert torch.equal(both, torch.cat(parts)), name
        assert not any(torch.equal(double.w[i], double.w[i + 4]) for i in range(4))
    there = load(0, 1, views=views, strong_on_device=True)[0]
    here = load(0, 1, views=views)[0]
    assert torch.equal(there.w, here.w) and torch.equal(there.boxes2, here.boxes2)
    assert (there.s2.float() - here.s2.float()).abs().mean() < 2


def test_two_ranks_together_are_one_process(load):
    for whole, *parts in zip(load(), load(rank=0, world=2), load(rank=1, world=2), strict=True):
        for part in fields(Batch):
            values = [getattr(p, part.name) for p in parts]
            if isinstance(values[0], torch.Tensor):
                assert torch.equal(torch.cat(values), getattr(whole, part.name)), part.name
            elif values[0] is None:
                assert part.name == "colours"
            else:
                assert values[0] + values[1] == getattr(whole, part.name)


def test_an_epoch_is_one_pass_over_the_unlabelled(load, demo_config):
    steps = steps_per_epoch(demo_config, load.split)
    assert steps == len(load.split.unlabeled) // 4 == 9
    batches = load(0, 2 * steps)
    seen = [name for batch in batches for name in batch.unlabeled_files]
    first, second = seen[: 4 * steps], seen[4 * steps :]
    assert len(set(first)) == 4 * steps == len(set(second)) and first != second
    labeled = [name for batch in batches for name in batch.labeled_files]
    assert len(set(labeled[:12])) == 12 and set(labeled[:12]) == set(labeled[12:24])


def test_the_last_partial_batch_of_a_pass_is_dropped():
    order = Order(10, 8, seed=0, stream=UNLABELED)
    passes = np.array([order[i] for i in range(8 * 50)]).reshape(50, 8)
    assert all(len(set(p)) == 8 for p in passes)
    assert set(passes.ravel()) == set(range(10))  # not the same two every time
    again = Order(10, 8, seed=0, stream=UNLABELED)
    assert [again[i] for i in (77, 3, 399)] == [passes.ravel()[i] for i in (77, 3, 399)]


def test_labelled_and_truth_are_crops_of_their_files(load, demo_spec):
    """Scale 1, crop equal to the tile: only the flip is left."""
    by_name = {i.name: i for i in (*load.split.labeled, *load.split.unlabeled)}
    for batch in load(0, 3, scale_range=(1, 1)):
        for images, labels, names in ((batch.x, batch.y, batch.labeled_files),
                                      (batch.w, batch.truth, batch.unlabeled_files)):
            for image, label, name in zip(images, labels, names, strict=True):
                pixels = load_image(by_name[name].image).transpose(2, 0, 1)
                classes = load_label(by_name[name], demo_spec)
                plain, mirrored = (np.array_equal(image, p) for p in (pixels, pixels[..., ::-1]))
                assert plain or mirrored
                assert np.array_equal(label, classes if plain else classes[:, ::-1])


def test_crops_in_every_orientation(load, demo_spec):
    """The eight of a square, images, labels and padding alike."""
    by_name = {i.name: i for i in (*load.split.labeled, *load.split.unlabeled)}
    seen = set()
    for batch in load(0, 12, scale_range=(1, 1), rotate90=True):
        for images, labels, names in ((batch.x, batch.y, batch.labeled_files),
                                      (batch.w, batch.truth, batch.unlabeled_files)):
            for image, label, name in zip(images, labels, names, strict=True):
                pixels = load_image(by_name[name].image).transpose(2, 0, 1)
                classes = load_label(by_name[name], demo_spec)
                matches = [(flip, turns) for flip in (1, -1) for turns in range(4)
                           if np.array_equal(image, np.rot90(pixels[..., ::flip], turns, (1, 2)))]
                assert len(matches) == 1
                flip, turns = matches[0]
                assert np.array_equal(label, np.rot90(classes[:, ::flip], turns))
                seen.add(matches[0])
    assert len(seen) == 8
    small = load(0, 6, scale_range=(0.5, 0.5), rotate90=True)
    corners = torch.cat([batch.ignore for batch in small])[:, ::127, ::127].flatten(1)
    assert len({tuple(row.tolist()) for row in corners}) == 4  # the image lies in any corner
    for batch in small:
        assert (batch.w.amax(1)[batch.ignore == 255] == 0).all()
        assert (batch.truth[batch.ignore == 255] == 255).all()


def test_views_asked_for(load):
    only = load(0, 1, views={"x"})[0]
    assert only.w is None and only.boxes1 is None and only.ignore is None and only.truth is None
    two = load(0, 1, views={"x", "w", "s1"})[0]
    assert two.s2 is None and two.boxes2 is None
    full = load(0, 1)[0]
    assert torch.equal(two.s1, full.s1) and torch.equal(only.x, full.x)
    assert load(0, 1, truth=False)[0].truth is None


def test_moving_a_batch(load):
    batch = load(0, 1)[0]
    moved = batch.to("meta")
    assert moved.s1.device.type == "meta" and moved.unlabeled_files == batch.unlabeled_files
    assert batch.s1.device.type == "cpu"


@pytest.mark.parametrize(("options", "expected"), [
    ({"views": {"x", "fp"}}, "views"),
    ({"views": {"w"}}, "views"),
    ({"world": 3}, "not divisible by 3 ranks"),
])
def test_usage_errors(load, options, expected):
    with pytest.raises(UsageError, match=expected):
        load(**options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_damaged_meanwhile_is_named_in_one_line(tmp_path, workers):
    raw = write_raw(tmp_path / "raw", [f"a/{p}" for p in range(6)], size=(32, 64))
    root, spec = tmp_path / "toy", two_classes(val=["a/5"], tile={})
    prepare_dataset(spec, raw, root, progress=False)
    split_dataset(root, spec, labels=2, progress=False)
    config = DataConfig(root=root, labels=2, batch_size=1, workers=workers, max_damaged=0)
    split = open_split(config, spec)
    truncate(split.unlabeled[1].image)
    loader = build_loader(config, spec, split, views=ALL, seed=0, start_step=0, total_steps=9)
    with pytest.raises(DataError, match=f"{split.unlabeled[1].name}.png: damaged") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_unlabelled_images_without_labels_have_truth_255(tmp_path):
    raw = write_raw(tmp_path / "raw", [f"a/{p}" for p in range(6)], size=(32, 64),
                    without_mask=("a/0", "a/1"))
    root, spec = tmp_path / "toy", two_classes(val=["a/5"], tile={})
    prepare_dataset(spec, raw, root, progress=False)
    config = DataConfig(root=root, labels=2, batch_size=1, workers=0)
    split = open_split(config, spec)
    seen = {}
    for batch in build_loader(config, spec, split, views=ALL, seed=0, start_step=0, total_steps=3):
        seen[batch.unlabeled_files[0]] = batch.truth.unique().tolist()
    assert seen["a_0"] == seen["a_1"] == [255]
    other = (set(seen) - {"a_0", "a_1"}).pop()
    assert set(seen[other]) & {0, 1}
