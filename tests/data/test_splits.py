"""Split lists: the authors' format, splits made here, and what is wrong with a bad one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from toy_data import two_classes, write_raw

from co2s_fast.data import (
    DataConfig,
    describe_catalogue,
    load_dataset,
    open_split,
    prepare_dataset,
    split_dataset,
)
from co2s_fast.data.config import parse_ratio
from co2s_fast.data.files import write_description
from co2s_fast.data.imagery import BandStatistics
from co2s_fast.data.split_maker import labeled_order
from co2s_fast.data.splits import describe_root, find_root, open_dataset, read_list
from co2s_fast.data.tiles import group_from_name
from co2s_fast.errors import DataError, UsageError


@pytest.fixture
def tree(tmp_path):
    """Twelve tiles of two scenes, half land, half sea; part 4 has no mask."""
    raw = write_raw(tmp_path / "raw", [f"{s}/{p}" for s in "ab" for p in "1234"], size=(32, 64),
                    without_mask=("a/4", "b/4"))
    root = tmp_path / "toy"
    spec = two_classes(val=["*/3"], tile={})
    prepare_dataset(spec, raw, root, progress=False)
    return root, spec


def lists(root, name, labeled, unlabeled="", val=None):
    folder = root / "splits" / name
    folder.mkdir(parents=True)
    (folder / "labeled.txt").write_text(labeled)
    (folder / "unlabeled.txt").write_text(unlabeled)
    (folder / "val.txt").write_text(val or "images/a_3.png labels/a_3.png\n")
    return folder


def line(name):
    return f"images/{name}.png labels/{name}.png\n"


def names(items):
    return [item.name for item in items]


def opened(root, spec, **options):
    return open_split(DataConfig(root=root, batch_size=1, **options), spec)


def test_names_with_spaces(tree):
    root, spec = tree
    for folder in ("images", "labels"):
        for path in list((root / folder).iterdir()):
            path.rename(path.with_name("scene " + path.name.replace("_", " (").replace(".", ").")))
    spec = two_classes(val=["*(3)"], tile={})
    write_description(root, spec)
    made = split_dataset(root, spec, labels=2, progress=False)
    split = opened(root, spec, split=made.folder)
    assert (len(split.labeled), len(split.unlabeled), len(split.val)) == (2, 4, 2)
    assert names(split.val) == ["scene a (3)", "scene b (3)"]
    assert all(item.label.name == item.image.name for item in split.labeled)
    lone = [item.name for item in split.unlabeled if item.label is None]
    assert lone == ["scene a (4)", "scene b (4)"]
    (made.folder / "labeled.txt").write_text("images/scene a (1).png labels/scene a (1).png\n")
    with pytest.raises(DataError, match=r"6 fields.*need a tab between them"):
        opened(root, spec, split=made.folder)


@pytest.mark.parametrize("dataset", ["whdld", "loveda", "potsdam", "gid15", "mer", "msl"])
def test_the_authors_lists(shared_dir, dataset):
    """Every line parses; the counts are those of the catalogue."""
    folder = shared_dir / "data" / "splits" / dataset.removesuffix("15")
    if not folder.is_dir():
        pytest.skip(f"no lists at {folder}")
    info, problems = load_dataset(dataset).info, []
    val = read_list(folder / "val.txt", folder, problems, need_label=True, check_files=False)
    assert len(val) == info.val
    assert val[0].raw and val[0].label is not None
    for ratio, count in info.labeled.items():
        part = folder / ratio.replace("/", "_")
        labeled, unlabeled = (read_list(part / f"{n}.txt", folder, problems, need_label=True,
                                        check_files=False) for n in ("labeled", "unlabeled"))
        assert len(labeled) == count and len(labeled) + len(unlabeled) == info.train
        assert not {i.image for i in labeled} & {i.image for i in (*unlabeled, *val)}
    assert info.train + info.val == info.total and not problems


@pytest.mark.parametrize(("ratio", "count"), [("1/4", 12), ("0.25", 12), ("1/16", 3), ("1", 48)])
def test_ratios_and_the_files_written(demo_root, demo_spec, tmp_path, ratio, count):
    root = tmp_path / "demo"
    shutil.copytree(demo_root, root)
    created = split_dataset(root, demo_spec, ratio=ratio, progress=False)
    assert (created.labeled, created.unlabeled, created.val) == (count, 48 - count, 16)
    assert sorted(path.name for path in created.folder.iterdir()) == [
        "labeled.txt", "unlabeled.txt", "val.txt"]  # fmt: skip
    assert (created.folder / "val.txt").read_text() == (root / "splits/val.txt").read_text()
    text = (created.folder / "labeled.txt").read_text().splitlines()
    image, label = text[0].split(" ")
    assert image.startswith("images/scene") and label == image.replace("images", "labels")
    val = (root / "splits" / "val.txt").read_text().splitlines()
    assert {group_from_name(v.split()[0].removeprefix("images/")[:-4]) for v in val} == {
        f"scene{n}" for n in (12, 13, 14, 15)}


@pytest.mark.parametrize("ratio", ["0", "2", "1/0", "-1/4", "half"])
def test_wrong_ratios(ratio):
    with pytest.raises(ValueError, match="expected a share"):
        parse_ratio(ratio)
    with pytest.raises(ValueError, match="expected a share"):
        DataConfig(ratio=ratio)


def test_smaller_splits_are_nested_and_seeds_differ(demo_root, demo_spec):
    sets = {}
    for seed in (0, 1):
        for count in (4, 12, 24):
            config = DataConfig(root=demo_root, labels=count, split_seed=seed)
            sets[seed, count] = set(names(open_split(config, demo_spec).labeled))
            assert len(sets[seed, count]) == count
    assert sets[0, 4] < sets[0, 12] < sets[0, 24] and sets[1, 4] < sets[1, 12]
    assert sets[0, 12] != sets[1, 12]


def test_the_first_labelled_images_show_every_class():
    rng = np.random.default_rng(0)
    shares = rng.random((200, 5)) * (rng.random((200, 5)) < [0.9, 0.5, 0.05, 0.02, 0.01])
    order = labeled_order(shares, seed=3)
    assert sorted(order) == list(range(200))
    assert (shares[order[:5]] > 0).any(0).all()
    assert labeled_order(np.zeros((4, 2)), 0).shape == (4,)


def test_a_split_is_made_once_and_said(tree):
    root, spec = tree
    first = opened(root, spec, labels=2)
    assert any(note.startswith("made the split") for note in first.notes)
    again = opened(root, spec, labels=2)
    assert not any(note.startswith("made the split") for note in again.notes)
    assert names(first.labeled) == names(again.labeled)


def test_validation_takes_whole_groups_and_labels_only(tree):
    root, spec = tree
    split = opened(root, spec, labels=2)
    assert sorted(names(split.val)) == ["a_3", "b_3"]
    assert {"a_4", "b_4"} < set(names(split.unlabeled))
    assert {i.label for i in split.unlabeled if i.name == "a_4"} == {None}
    with pytest.raises(DataError, match="5 labelled images wanted, 4 of 6"):
        split_dataset(root, spec, labels=5, progress=False)


def test_a_share_of_the_groups_validates(tmp_path):
    raw = write_raw(tmp_path / "raw", [f"a/{p}" for p in range(10)], size=(64, 64))
    spec = two_classes(val=0.2)
    prepare_dataset(spec, raw, tmp_path / "toy", progress=False)
    split = opened(tmp_path / "toy", spec, labels=4)
    val = {group_from_name(n) for n in names(split.val)}
    train = {group_from_name(i.name) for i in (*split.labeled, *split.unlabeled)}
    assert len(val) == 2 and len(split.val) == 8 and not val & train


def test_the_share_of_groups_is_rounded(tmp_path):
    raw = write_raw(tmp_path / "raw", [f"a/{p}" for p in range(9)], size=(32, 32))
    spec = two_classes(val=0.2, tile={})
    prepare_dataset(spec, raw, tmp_path / "toy", progress=False)
    assert split_dataset(tmp_path / "toy", labels=2, progress=False).val == 2  # of 1.8


def test_patterns_that_match_nothing(tree):
    root, spec = tree
    text = (root / "dataset.yaml").read_text()
    (root / "dataset.yaml").write_text(text.replace("'*/3'", "'*/9'"))
    with pytest.raises(DataError, match=r"no labelled group matches .*\*/9; groups are a/1"):
        opened(root, spec, labels=2)


def test_lists_in_the_authors_format(tree):
    root, spec = tree
    folder = lists(root, "mine", line("a_1") + "\n" + line("b_1"),
                   line("a_2") + "images/a_4.png\n" + line("b_4"))
    split = opened(root, spec, split=folder)
    assert names(split.labeled) == ["a_1", "b_1"]
    assert [i.label is not None for i in split.unlabeled] == [True, False, False]
    for place in (folder.parent, root):
        (folder / "val.txt").rename(place / "val.txt")
        assert names(opened(root, spec, split=folder).val) == ["a_3"]
        (place / "val.txt").rename(folder / "val.txt")


@pytest.mark.parametrize(("labeled", "unlabeled", "val", "expected"), [
    ("", line("a_2"), None, "labeled.txt: empty, expected at least one line"),
    (line("a_9"), "", None, r"labeled.txt, line 1: .*images/a_9\.png: missing file"),
    ("images/a_1.png\n", "", None, r"line 1: images/a_1.png: no label named"),
    ("images/../../x.png labels/a_1.png\n", "", None, "outside the data root"),
    ("/etc/passwd labels/a_1.png\n", "", None, "/etc/passwd: outside the data root"),
    (line("a_1"), "../raw/a/images/1.png\n", None, "outside the data root"),
    (line("a_1"), line("a_1"), None, "1 images are in both labeled.txt and unlabeled.txt"),
    (line("a_1"), "", line("a_1"), "1 images are in both labeled.txt and val.txt"),
    (line("a_1"), line("a_2"), line("a_2"), "1 images are in both unlabeled.txt and val.txt"),
    (line("a_1") * 2, "", None, "1 images are listed twice"),
    ("a b c\n", "", None, "3 fields, expected an image and a label"),
])
def test_bad_lists(tree, labeled, unlabeled, val, expected):
    root, spec = tree
    folder = lists(root, "bad", labeled, unlabeled, val)
    with pytest.raises(DataError, match=expected) as caught:
        opened(root, spec, split=folder)
    assert "\n" not in str(caught.value)


def test_all_problems_are_told_at_once(tree):
    root, spec = tree
    folder = lists(root, "bad", line("a_8") + line("a_9"), line("b_9"), line("b_8"))
    with pytest.raises(DataError) as caught:
        opened(root, spec, split=folder)
    for name in ("images/a_8.png", "images/a_9.png", "images/b_9.png", "images/b_8.png"):
        assert name in str(caught.value)


def test_sets_smaller_than_the_batch(tree):
    root, spec = tree
    folder = lists(root, "small", line("a_1") + line("b_1"), line("a_2"))
    with pytest.raises(DataError, match="2 labelled images, fewer than the batch size 3"):
        open_split(DataConfig(root=root, split=folder, batch_size=3), spec)
    with pytest.raises(DataError, match="1 unlabelled images, fewer than the batch size 2"):
        open_split(DataConfig(root=root, split=folder, batch_size=2), spec)


def test_nothing_or_too_much_said_about_labels(tree):
    root, spec = tree
    with pytest.raises(UsageError, match="which images are labelled"):
        opened(root, spec)
    with pytest.raises(ValueError, match="ratio and labels are given"):
        DataConfig(ratio="1/4", labels=3)
    with pytest.raises(DataError, match=r"split folder .*nowhere: missing"):
        opened(root, spec, split=root / "nowhere")


def test_what_a_description_does_not_say_is_taken_from_the_folder(tmp_path):
    path, root = tmp_path / "mine.yaml", tmp_path / "toy"
    (root / "images").mkdir(parents=True)
    statistics = BandStatistics(dtype="uint16", low=[0, 0], high=[9, 9], mean=[0, 0], std=[1, 1])
    write_description(root, two_classes(bands=[4, 3], display=[4, 3, 3]), statistics)
    config = DataConfig(dataset=str(path), root=root, labels=1)
    for display, expected in ((None, (4, 3, 3)), ((3, 4, 4), (3, 4, 4))):
        own = two_classes(bands=[4, 3], **({} if display is None else {"display": display}))
        path.write_text(yaml.safe_dump(own.model_dump(mode="json", exclude_defaults=True)))
        found = open_dataset(config)
        assert found.display == expected and found.statistics == statistics


def test_missing_data_says_what_to_fetch_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CO2S_DATA", str(tmp_path / "store"))
    with pytest.raises(DataError) as caught:
        find_root(DataConfig(dataset="potsdam"), load_dataset("potsdam"))
    message = str(caught.value)
    assert "store/potsdam/images" in message and "data/potsdam/images" in message
    assert "fetch 2_Ortho_RGB.zip and 5_Labels_all_noBoundary.zip from https://www." in message
    assert "co2s-fast data prepare potsdam --raw RAW_FOLDER --out data/potsdam" in message


def test_missing_data_of_no_known_source_says_what_to_run(tmp_path):
    config = DataConfig(dataset="mine.yaml", root=tmp_path / "no")
    with pytest.raises(DataError, match=r"no/toy/images\): run `co2s-fast data prepare mine\.yaml"):
        find_root(config, two_classes())


def test_a_folder_says_what_it_holds(tree, tmp_path):
    root, spec = tree
    assert describe_root(root).class_names == spec.class_names
    assert split_dataset(root, labels=2, progress=False).labeled == 2
    (tmp_path / "potsdam").mkdir()
    assert describe_root(tmp_path / "potsdam").name == "potsdam"
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"mine: no dataset\.yaml"):
        describe_root(tmp_path / "mine")
    with pytest.raises(DataError, match="missing folder"):
        describe_root(tmp_path / "gone")
    with pytest.raises(UsageError, match="expected a share"):
        split_dataset(root, ratio="3", progress=False)
    with pytest.raises(UsageError, match="either a ratio or a number"):
        split_dataset(root, progress=False)


def test_listing(tmp_path, monkeypatch, tree):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CO2S_DATA", raising=False)
    text = describe_catalogue()
    assert "(the paper says 5987)" in text and "#0000ff water: lake, river" in text
    assert "made on first use" in text and "not found" in text
    (tmp_path / "data").mkdir()
    shutil.copytree(tree[0], tmp_path / "data" / "whdld")
    assert "unusable: data/whdld/dataset.yaml: was prepared for classes land" in (
        describe_catalogue())


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = load_dataset("potsdam")
    (tmp_path / "data/potsdam/images").mkdir(parents=True)
    assert find_root(DataConfig(), spec).resolve() == tmp_path / "data/potsdam"
    (tmp_path / "store/potsdam/images").mkdir(parents=True)
    monkeypatch.setenv("CO2S_DATA", str(tmp_path / "store"))
    assert find_root(DataConfig(), spec) == tmp_path / "store/potsdam"
    given = DataConfig(root=tmp_path / "data")
    assert find_root(given, spec) == tmp_path / "data/potsdam"
    (tmp_path / "mine/images").mkdir(parents=True)
    beside = DataConfig(dataset=str(tmp_path / "mine/dataset.yaml"))
    assert find_root(beside, spec) == tmp_path / "mine"


def test_no_other_folder_is_taken_for_a_prepared_one_that_is_gone(tree, tmp_path, monkeypatch):
    root, spec = tree
    shutil.copytree(root, tmp_path / "data/toy")
    shutil.copytree(root, tmp_path / "store/toy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CO2S_DATA", str(tmp_path / "store"))
    config = DataConfig(dataset=str(root / "dataset.yaml"), labels=2, batch_size=1)
    assert find_root(config, spec) == root
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=rf"^{root}/images: missing; .*give --data-root"):
        open_split(config, spec, "evaluate")
    assert find_root(config.model_copy(update={"root": moved}), spec) == moved
    own = str(tmp_path / "toy.yaml")  # a description of one's own stands anywhere
    assert find_root(config.model_copy(update={"dataset": own}), spec) == tmp_path / "store/toy"


def test_a_runs_own_description_takes_the_place_of_one_that_is_gone(tree, tmp_path):
    root, spec = tree
    (root / "dataset.yaml").rename(tmp_path / "kept.yaml")
    config = DataConfig(dataset=str(root / "dataset.yaml"), labels=2)
    assert open_dataset(config, tmp_path / "kept.yaml").class_names == spec.class_names
    for kept in (None, tmp_path / "none.yaml"):
        with pytest.raises(UsageError, match=r"toy/dataset\.yaml: No such file"):
            open_dataset(config, kept)


def test_evaluating_makes_no_split(tree):
    root, spec = tree
    said = rf"{root}/splits/1_2: missing.* `co2s-fast data split {root} --ratio 1/2 --seed 0`"
    with pytest.raises(DataError, match=said):
        open_split(DataConfig(root=root, ratio="1/2"), spec, "evaluate")
    assert not (root / "splits").exists()
    made = open_split(DataConfig(root=root, ratio="1/2"), spec, "evaluate", make=True)
    assert names(made.val) == ["a_3", "b_3"]


def test_ones_own_folder_without_its_dataset_is_not_to_be_removed(tree):
    root, _ = tree
    said = f"{root}: holds dataset 'toy', not 'demo'; give --dataset {root}/dataset.yaml"
    with pytest.raises(DataError) as caught:
        find_root(DataConfig(root=root), load_dataset("demo"))
    assert str(caught.value) == said


def test_folder_of_other_classes(tree):
    root, _ = tree
    with pytest.raises(DataError, match="was prepared for classes land, sea; dataset 'whdld' has"):
        find_root(DataConfig(root=root), load_dataset("whdld"))


def test_folders_as_the_authors_distribute_them(tmp_path):
    """No dataset.yaml: labels hold raw values, which the dataset's map turns into classes."""
    root, spec = tmp_path / "whdld", load_dataset("whdld")
    values = np.arange(64).reshape(8, 8) % 7
    for kind, pixels in (("images", np.zeros((8, 8, 3))), ("labels", values)):
        (root / kind).mkdir(parents=True)
        for name in ("a_1", "a_2", "a_3"):
            Image.fromarray(pixels.astype(np.uint8)).save(root / kind / f"{name}.png")
    folder = lists(root, "1_24", line("a_1"), line("a_2"))
    split = open_split(DataConfig(dataset="whdld", root=root, split=folder, batch_size=1), spec)
    assert split.labeled[0].raw and len(split.val) == 1
