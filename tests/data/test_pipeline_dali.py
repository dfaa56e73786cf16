"""The DALI pipeline on the CPU: the torch pipeline's batches, step by step, whatever happens."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from toy_data import ramps, truncate

from co2s_fast.data import Batch, DataConfig, Item, Split, build_loader, open_split, steps_per_epoch
from co2s_fast.data.plan import Plan
from co2s_fast.errors import DataError
from co2s_fast.losses import CutMix

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'co2s-fast[dali]'")
from co2s_fast.data.dali import source
from co2s_fast.data.pipeline_dali import DaliLoader

ALL = {"x", "w", "s1", "s2"}
IMAGES, STRONG = ("x", "w"), ("s1", "s2")
# Decoded alike (PNG), resized in float32 by both. Pillow keeps antialiasing weights in whole
# numbers and rounds between its passes ("native"), or cuts fractions off ("reference").
LARGEST, MEAN = 3, 0.6
STRONG_MEAN = 2  # of a batch; `test_pipeline_dali_views` bounds each part


@pytest.fixture(scope="module")
def demo(demo_root, demo_spec):
    """Loads the batches of some steps of the demo dataset by either pipeline."""
    base = DataConfig(root=demo_root, ratio="1/4", batch_size=4, workers=1, loader="dali")
    split = open_split(base, demo_spec)

    def load(start=0, stop=3, *, views=ALL, seed=0, rank=0, world=1, **options):
        config = base.model_copy(update=options)
        return build_loader(config, demo_spec, split, views=views, seed=seed, start_step=start,
                            total_steps=stop, rank=rank, world=world)

    load.split, load.config = split, base
    return load


def assert_same(found: Batch, expected: Batch):
    """Bit for bit."""
    for part in fields(Batch):
        one, other = getattr(found, part.name), getattr(expected, part.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), part.name
        else:
            assert one == other, part.name


def assert_close(found: Batch, expected: Batch):
    """Images within the stated tolerance; labels, masks, boxes and names exactly."""
    for part in fields(Batch):
        one, other = getattr(found, part.name), getattr(expected, part.name)
        if part.name not in IMAGES + STRONG or other is None:
            same = torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other
            assert same, part.name
            continue
        assert one.shape == other.shape and one.dtype == other.dtype == torch.uint8
        difference = (one.int() - other.int()).abs().float()
        if part.name in IMAGES:
            assert difference.max() <= LARGEST and difference.mean() < MEAN, part.name
        else:
            assert difference.mean() < STRONG_MEAN, part.name


def test_shapes_and_types(demo):
    batch = next(iter(demo()))
    for view in (batch.x, batch.w, batch.s1, batch.s2):
        assert view.shape == (4, 3, 128, 128) and view.dtype == torch.uint8 and view.is_contiguous()
    for labels in (batch.y, batch.ignore, batch.truth):
        assert labels.shape == (4, 128, 128) and labels.dtype == torch.uint8
        assert labels.is_contiguous()
    for boxes in (batch.boxes1, batch.boxes2):
        assert boxes.shape == (4, 4) and boxes.dtype == torch.int32
    assert len(batch.labeled_files) == len(batch.unlabeled_files) == 4 and batch.colours is None


@pytest.mark.parametrize("options", [{"scale": "native"}, {"scale": (512, 128)},
                                     {"scale": "native", "rotate90": True}], ids=str)
def test_batches_of_the_torch_pipeline(demo, options):
    """Decode, resize, crop, flip, pad and turn within three levels of 255; all else exactly."""
    steps = 12
    ours = list(demo(0, steps, **options))
    theirs = list(demo(0, steps, **options, loader="torch", workers=0))
    assert len(ours) == len(theirs) == steps
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    assert any((batch.ignore == 255).any() for batch in ours)  # some crops were padded


def test_normalised_images_of_both_pipelines(demo):
    """What the students make of a batch: 3 levels of 255, over ImageNet's smallest deviation."""
    from torchvision.transforms.functional import normalize

    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for one, other in zip(demo(), demo(loader="torch", workers=0), strict=True):
        a, b = (normalize(batch.w.float() / 255, *statistics) for batch in (one, other))
        assert (a - b).abs().max() <= LARGEST / 255 / 0.224 + 1e-6


@pytest.mark.parametrize("views", [{"x"}, {"x", "w"}, {"x", "w", "s1"}, {"x", "s2"}])
def test_views_asked_for(demo, views):
    full = next(iter(demo()))
    batch = next(iter(demo(views=views)))
    for name in ("x", *IMAGES, *STRONG):
        found = getattr(batch, name)
        assert torch.equal(found, getattr(full, name)) if name in views else found is None
    assert (batch.boxes1 is None) == ("s1" not in views)
    assert (batch.boxes2 is None) == ("s2" not in views)
    assert (batch.ignore is None) == (batch.truth is None) == (views == {"x"})


def test_the_same_for_any_number_of_threads_and_another_for_another_seed(demo):
    one, again, threaded = (list(demo(workers=n)) for n in (1, 1, 3))
    for a, b, c in zip(one, again, threaded, strict=True):
        assert_same(a, b)
        assert_same(a, c)
    assert not torch.equal(one[0].w, next(iter(demo(seed=1))).w)


def test_starting_late_is_skipping(demo):
    for late, early in zip(demo(3, 6), list(demo(0, 6))[3:], strict=True):
        assert_same(late, early)


def test_two_ranks_together_are_one_process(demo):
    for whole, *parts in zip(demo(), demo(rank=0, world=2), demo(rank=1, world=2), strict=True):
        for part in fields(Batch):
            values = [getattr(p, part.name) for p in parts]
            expected = getattr(whole, part.name)
            if isinstance(expected, torch.Tensor):
                assert torch.equal(torch.cat(values), expected), part.name
            elif expected is not None:
                assert values[0] + values[1] == expected


def test_iterating_again_starts_anew(demo):
    """Whole, after a break in the middle, and twice at once."""
    loader = demo()
    assert len(loader) == 3
    first = list(loader)
    abandoned = iter(loader)
    assert_same(next(abandoned), first[0])
    one, other = iter(loader), iter(loader)
    for expected in first:
        assert_same(next(one), expected)
        assert_same(next(other), expected)
    assert next(one, None) is None
    assert_same(next(abandoned), first[1])
    abandoned.close()


def test_passes_are_shuffled_and_their_last_partial_batch_is_dropped(demo):
    steps = steps_per_epoch(demo.config, demo.split)
    count = len(demo.split.unlabeled)
    used = 4 * steps
    assert steps == 9 and count == 36
    seen = [name for batch in demo(0, 2 * steps, views={"x", "w"})
            for name in batch.unlabeled_files]
    passes = [seen[:used], seen[used:]]
    assert all(len(set(names)) == used for names in passes) and passes[0] != passes[1]
    wide = [name for batch in demo(0, 4, views={"x", "w"}, batch_size=16)
            for name in batch.unlabeled_files]
    assert len(wide) == 64  # 36 images make two batches of 16; 4 are left out of each pass
    assert len(set(wide[:32])) == len(set(wide[32:])) == 32


def test_batches_may_be_written_to_and_kept(demo):
    """The methods mix views in place; DALI must not hand that memory out again."""
    expected = [batch.w.clone() for batch in demo(0, 5)]
    kept = []
    for batch in demo(0, 5):
        CutMix(batch.boxes1, torch.arange(4).roll(-1)).mix_(batch.s1)
        batch.s2.zero_()
        batch.x.fill_(7)
        kept.append(batch)
    for batch, weak in zip(kept, expected, strict=True):
        assert torch.equal(batch.w, weak)
        assert (batch.s2 == 0).all() and (batch.x == 7).all() and not (batch.s1 == 0).all()


@pytest.mark.parametrize("scale", ["native", (800, 200)])
def test_image_and_label_stay_aligned_over_epochs(tmp_path, scale):
    """Coordinates as image and as label: at most half a source pixel apart, in every epoch.

    Of the tiles, half show their columns, half their rows, so both directions are watched.
    """
    spec, items = ramps(tmp_path, 8)
    config = DataConfig(crop=96, scale=scale, batch_size=4, loader="dali", workers=1)
    split = Split(items[:4], items, [])
    epochs, seen = 4, []
    loader = build_loader(config, spec, split, views={"x", "w"}, seed=3, start_step=0,
                          total_steps=epochs * steps_per_epoch(config, split))
    for batch in loader:
        for images, labels, padding in ((batch.x, batch.y, None),
                                        (batch.w, batch.truth, batch.ignore)):
            outside = labels == 255
            assert padding is None or torch.equal(outside, padding == 255)
            assert (images.permute(0, 2, 3, 1)[outside] == 0).all()
            apart = (images[:, 0].int() - labels.int()).abs()[~outside]
            assert apart.max() <= 1
        seen += [bool(left > right) for left, right in batch.truth[:, 10, (0, 9)].tolist()]
    assert len(seen) == epochs * 8 and any(seen) and not all(seen)  # some were mirrored


def test_unlabelled_images_without_labels_have_truth_255(tmp_path):
    spec, items = ramps(tmp_path, 4)
    bare = [Item(item.name, item.image) for item in items[:2]]
    config = DataConfig(crop=96, batch_size=2, loader="dali")
    loader = build_loader(config, spec, Split(items, [*bare, *items[2:]], []), views=ALL, seed=0,
                          start_step=0, total_steps=4)
    names = {item.name for item in bare}
    for batch in loader:
        for name, truth in zip(batch.unlabeled_files, batch.truth, strict=True):
            assert bool((truth == 255).all()) == (name in names)
    without = build_loader(config, spec, Split(items, bare, []), views=ALL, seed=0, start_step=0,
                           total_steps=1)
    assert next(iter(without)).truth is None


def broken_png(path):
    """Whole from outside, damaged inside: DALI fails on it, Pillow may read something."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


def wrong_checksum(path):
    """Nothing is lost; DALI fails on it all the same, and Pillow reads it."""
    content = bytearray(path.read_bytes())
    at = content.index(b"IEND") - 8  # the checksum of the pixels
    content[at : at + 4] = bytes(4)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("damage", "readable"), [
    (truncate, False), (broken_png, True), (wrong_checksum, True), (lambda p: p.unlink(), False),
])
def test_damaged_files_are_treated_as_in_the_torch_pipeline(tmp_path, damage, readable):
    """The same ones are skipped, named and replaced; a graph that fails is built again."""
    spec, items = ramps(tmp_path, 12)
    config = DataConfig(crop=32, scale=(400, 100), batch_size=2, workers=1)
    split = Split(items[:4], items[4:], [])
    for item in (items[1], items[6], items[9]):
        damage(item.image)
    batches = {}
    for loader in ("dali", "torch"):
        changed = config.model_copy(update={"loader": loader})
        batches[loader] = list(build_loader(changed, spec, split, views=ALL, seed=2, start_step=0,
                                            total_steps=9))
    for one, other in zip(batches["dali"], batches["torch"], strict=True):
        assert_close(one, other)
    skipped = {damaged.file for batch in batches["dali"] for damaged in batch.damaged}
    expected = {f"{tmp_path.name}/{item.image.name}" for item in (items[1], items[6], items[9])}
    assert skipped == (set() if readable else expected)


def test_too_much_damage_ends_the_run_after_the_batches_before_it(tmp_path):
    spec, items = ramps(tmp_path, 8)
    config = DataConfig(crop=32, batch_size=1, max_damaged=0)
    plan = Plan(config, spec, Split(items, items, []), {"x", "w"}, 0)
    order = [plan.unlabeled(step)[0][1] for step in range(8)]
    labeled = [plan.labeled(step)[0][1] for step in range(8)]
    at = next(step for step in range(2, 8) if order[step] not in labeled[: step + 1])
    truncate(order[at].image)
    taken = []
    with pytest.raises(DataError, match=f"max_damaged allows 0.*{order[at].name}.png") as caught:
        for batch in DaliLoader(plan, range(8), 1, None):
            taken.append(batch.unlabeled_files[0])
    assert "\n" not in str(caught.value) and taken == [item.name for item in order[:at]]


def test_an_error_that_no_file_explains_is_raised(demo, monkeypatch):
    """The graph is not built again and again when what it is given is not to blame."""
    real = source.geometry_arrays
    monkeypatch.setattr(source, "geometry_arrays",
                        lambda *given: {**real(*given), "size": np.zeros(5, np.float32)})
    with pytest.raises(RuntimeError, match="resize"):
        list(demo())


def test_a_label_of_another_size_is_named(tmp_path):
    spec, items = ramps(tmp_path, 2)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(items[0].label)
    config = DataConfig(crop=32, batch_size=1, loader="dali", max_damaged=0)
    loader = build_loader(config, spec, Split(items[:1], items, []), views={"x"}, seed=0,
                          start_step=0, total_steps=1)
    with pytest.raises(DataError, match=f"{items[0].label}: 30 x 20 pixels, its image"):
        list(loader)
