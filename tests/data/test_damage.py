"""Files damaged while a run trains: skipped by rule, the same way however the batches are made."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice

import pytest
import torch
from toy_data import truncate, two_classes, write_raw

from co2s_fast.data import DataConfig, build_loader, open_split, prepare_dataset, split_dataset
from co2s_fast.data.damage import read_place
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.plan import Order, Plan
from co2s_fast.errors import DataError

ALL = {"x", "w", "s1", "s2"}


@pytest.fixture
def toy(tmp_path):
    """A split of 4 labelled and 10 unlabelled images, and a function that loads batches of it."""
    raw = write_raw(tmp_path / "raw", [f"a/{p}" for p in range(15)], size=(32, 64))
    root, spec = tmp_path / "toy", two_classes(val=["a/5"], tile={})
    prepare_dataset(spec, raw, root, progress=False)
    split_dataset(root, spec, labels=4, progress=False)
    config = DataConfig(root=root, labels=4, batch_size=2, workers=0)
    split = open_split(config, spec)

    def load(start=0, stop=10, *, rank=0, world=1, **options):
        changed = config.model_copy(update=options)
        return list(build_loader(changed, spec, split, views=ALL, seed=0, start_step=start,
                                 total_steps=stop, rank=rank, world=world))

    def plan(seed=0, **options):
        return Plan(config.model_copy(update=options), spec, split, ALL, seed)

    load.split, load.plan = split, plan
    return load


def same(one, other) -> bool:
    pairs = [(getattr(one, part.name), getattr(other, part.name)) for part in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_damaged_image_is_named_and_another_takes_its_place(toy):
    before = toy()
    bad = toy.split.unlabeled[3]
    truncate(bad.image)
    after = toy()
    hit = [i for i, batch in enumerate(before) if bad.name in batch.unlabeled_files]
    assert len(hit) == 2  # ten steps are two passes
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        if step not in hit:
            assert same(old, new)
            continue
        place = old.unlabeled_files.index(bad.name)
        assert [d.file for d in new.damaged] == [f"images/{bad.image.name}"]
        assert str(bad.image) in new.damaged[0].reason and "damaged" in new.damaged[0].reason
        expected = before[step + 1].unlabeled_files[place] if step < 9 else None
        assert new.unlabeled_files[place] != bad.name
        assert expected in (None, new.unlabeled_files[place])
        other = 1 - place
        assert torch.equal(old.s1[other], new.s1[other]) and torch.equal(old.x, new.x)
        assert torch.equal(old.boxes1, new.boxes1)  # a place keeps its draws


def test_the_rule_does_not_depend_on_workers_ranks_or_the_start(toy):
    for item in (toy.split.unlabeled[0], toy.split.unlabeled[7], toy.split.labeled[1]):
        truncate(item.image)
    whole = toy()
    assert {d.file for b in whole for d in b.damaged} == {
        f"images/{item.image.name}"
        for item in (toy.split.unlabeled[0], toy.split.unlabeled[7], toy.split.labeled[1])}
    assert all(map(same, whole, toy(workers=2)))
    assert all(map(same, whole[4:], toy(4)))
    for both, first, second in zip(whole, toy(rank=0, world=2), toy(rank=1, world=2), strict=True):
        assert torch.equal(both.w, torch.cat([first.w, second.w]))
        assert torch.equal(both.y, torch.cat([first.y, second.y]))
        assert set(both.damaged) == {*first.damaged, *second.damaged}


def test_substitutes_differ_within_a_batch(toy):
    """Whatever is damaged: a pass that does not end there has no image twice in a batch."""
    plan = toy.plan(max_damaged=9)
    for bad in ([0, 1], [2, 5, 8], [1, 3, 4, 9]):
        broken = {toy.split.unlabeled[i] for i in bad}

        def read(item, broken=broken):
            if item in broken:
                raise DataError(f"{item.image}: damaged")
            return item

        step = 0
        found = [read_place(plan, UNLABELED, step, p, read) for p in (0, 1)]
        assert found[0].item != found[1].item
        assert not broken & {found[0].item, found[1].item}


@pytest.mark.parametrize("kind", ["image", "label"])
def test_labelled_images_too(toy, kind):
    bad = toy.split.labeled[2]
    truncate(getattr(bad, kind))
    batches = toy()
    assert all(bad.name not in batch.labeled_files for batch in batches)
    reasons = {d.reason for batch in batches for d in batch.damaged}
    assert len(reasons) == 1 and str(getattr(bad, kind)) in reasons.pop()


def test_without_allowance_the_first_one_ends_the_run(toy):
    truncate(toy.split.unlabeled[1].image)
    with pytest.raises(DataError, match="1 damaged file met in training, data.max_damaged "
                       rf"allows 0: .*{toy.split.unlabeled[1].name}.png: damaged") as caught:
        toy(max_damaged=0)
    assert "\n" not in str(caught.value)


def test_all_damaged(toy):
    for item in toy.split.unlabeled:
        item.image.unlink()
    with pytest.raises(DataError, match=r"max_damaged allows 3: .*missing file; .*missing"):
        toy(max_damaged=3)
    for item in toy.split.labeled:
        item.image.write_bytes(b"")
    with pytest.raises(DataError, match="4 damaged files met in training, no other is left"):
        toy(max_damaged=10)


def test_candidates_are_the_image_of_the_place_and_those_of_the_following_batches(toy):
    plan = toy.plan()
    for stream, items, places_of in ((LABELED, toy.split.labeled, plan.labeled),
                                     (UNLABELED, toy.split.unlabeled, plan.unlabeled)):
        order = Order(len(items), len(items), seed=0, stream=stream)
        for step in range(12):
            for place, item in places_of(step):
                expected = [items[order[2 * later + place]] for later in range(step, step + 3)]
                assert item == expected[0]
                assert list(islice(plan.candidates(stream, step, place), 3)) == expected
