"""Split lists: reading the authors' format, and finding a run's data before anything is trained."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.catalogue import DESCRIPTION, DatasetSpec, dataset_names, load_dataset
from co2s_fast.data.config import DataConfig, parse_ratio
from co2s_fast.data.files import Item
from co2s_fast.data.tiles import is_uniform
from co2s_fast.errors import DataError, UsageError

SPLITS = "splits"
Use = Literal["train", "resume", "evaluate"]
_SHOWN = 5


@dataclass
class Split:
    """The images of a run.

    Args:
        labeled: training images whose labels are used.
        unlabeled: all other training images.
        val: validation images.
        folder: where the lists are.
        notes: what was decided on the way, one line each.
        pixels: pixels of each class in each labelled image, int64 [images, classes], once counted.
    """

    labeled: list[Item]
    unlabeled: list[Item]
    val: list[Item]
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    pixels: NDArray[np.int64] | None = None


def open_split(config: DataConfig, spec: DatasetSpec, use: Use = "train", *,
               make: bool | None = None) -> Split:
    """The labelled, unlabelled and validation images that a configuration asks for.

    The built-in demo dataset is generated where it is not found. A ratio or a number of labels
    that has no split folder yet gets one, made with `config.split_seed`.

    Args:
        config: of the run.
        spec: the dataset.
        use: "train" checks all images; "resume" forgives training images that broke meanwhile, up
            to `config.max_damaged`; "evaluate" opens the validation images only.
        make: whether to make a split that is missing; None: unless `use` is "evaluate", as another
            split may validate on what a run was trained with. The demo's is the same every time.

    Raises:
        DataError: data not found (says what to fetch and which command to run), or anything wrong
            with the lists or the files they name; all problems are found before training.
        UsageError: neither split, ratio nor labels given.
    """
    if config.split is None and config.ratio is None and config.labels is None:
        raise UsageError("which images are labelled? give a ratio (1/16), a number of labels, "
                         "or a split folder")
    root = find_root(config, spec)
    if spec.channels != 3 and spec.statistics is None:
        raise DataError(f"{root}: dataset {spec.name!r} has {spec.channels} channels and no band "
                        f"statistics; `co2s-fast data prepare {config.dataset} --raw RAW_FOLDER "
                        f"--out {root}` takes them")
    notes: list[str] = []
    folder = config.split or root / SPLITS / split_name(config)
    makes = use != "evaluate" or spec.generated if make is None else make
    if config.split is None and not makes and not folder.is_dir():
        size = f"--labels {config.labels}" if config.ratio is None else f"--ratio {config.ratio}"
        raise DataError(f"split folder {folder}: missing, and evaluating makes none; give --split, "
                        f"or run `co2s-fast data split {root} {size} --seed {config.split_seed}`")
    if config.split is None and makes and not (folder / "labeled.txt").is_file():
        from co2s_fast.data.split_maker import split_dataset

        notes += split_dataset(root, spec, ratio=config.ratio, labels=config.labels,
                               seed=config.split_seed).notes
    split = (read_val(root, folder) if use == "evaluate"
             else read_split(root, folder, check_files=use == "train"))
    split.notes = [*notes, *split.notes]
    if use != "evaluate":
        _check_sizes(split, config, folder)
    from co2s_fast.data.check import check_split, check_val

    report = (check_val(split, spec) if use == "evaluate"
              else check_split(split, spec, config, going_on=use == "resume"))
    report.raise_problems()
    split.notes += [f"warning: {text}" for text in report.warnings]
    return split


def split_name(config: DataConfig) -> str:
    """Folder name of a split made from a ratio or a number: 1_16, labels_50, 1_16_seed1."""
    if config.labels is not None:
        name = f"labels_{config.labels}"
    else:
        share = parse_ratio(config.ratio or "")
        name = f"{share.numerator}_{share.denominator}"
    return name if config.split_seed == 0 else f"{name}_seed{config.split_seed}"


def find_root(config: DataConfig, spec: DatasetSpec) -> Path:
    """The folder that holds the prepared dataset: `images/`, `labels/`.

    Looked for in `config.root`, or without one in the folder of a prepared `dataset.yaml` that
    was given as the dataset, `$CO2S_DATA/<name>`, `./data/<name>`, in this order; the first that
    applies. A given root may also be the parent of `<name>/`. In place of a prepared folder that
    is gone, no other is taken.

    Raises:
        DataError: not there; says what to fetch and which command prepares it.
    """
    candidates = candidate_roots(config, spec)
    for root in candidates:
        if (root / "images").is_dir():
            _check_description(root, spec)
            return root
    if spec.generated:
        from co2s_fast.data.demo import generate_demo

        return generate_demo(candidates[0], spec)
    if config.root is None and _prepared_is_gone(config):
        raise DataError(f"{candidates[0] / 'images'}: missing; dataset {spec.name!r} was prepared "
                        "there; give --data-root, the folder that holds it now")
    tried = ", ".join(f"{c}/images" for c in candidates)
    what = spec.info.needs or "it"
    fetched = f"fetch {what} from {spec.info.source}, then " if spec.info.source else ""
    raise DataError(
        f"dataset {spec.name!r} not found (looked for {tried}): {fetched}run "
        f"`co2s-fast data prepare {config.dataset} --raw RAW_FOLDER --out {candidates[-1]}`, or "
        "give --data-root"
    )


def open_dataset(config: DataConfig, kept: Path | None = None) -> DatasetSpec:
    """The dataset of a run, with the band statistics of its prepared folder.

    A description that was written by hand knows no statistics; those that `data prepare` stored
    are taken from the folder that `find_root` will find.

    Args:
        config: of the run.
        kept: file with the run's own copy of the description, for where that of `config` is gone.

    Raises:
        UsageError: no such dataset, or a wrong description.
        DataError: the folder was prepared from other bands.
    """
    given = Path(config.dataset)
    gone = given.suffix.lower() in (".yaml", ".yml") and not given.is_file()
    spec = load_dataset(kept if gone and kept is not None and kept.is_file() else given)
    if spec.statistics is not None:
        return spec
    root = next((r for r in candidate_roots(config, spec) if (r / "images").is_dir()), None)
    if root is None or not (root / DESCRIPTION).is_file():
        return spec
    found = load_dataset(root / DESCRIPTION)
    if spec.bands is not None and spec.bands != found.bands:
        raise DataError(f"{root / DESCRIPTION}: was prepared from bands "
                        f"{_band_list(found)}; dataset {spec.name!r} has {_band_list(spec)}")
    return spec.model_copy(update={
        "bands": found.bands, "statistics": found.statistics, "raster": found.raster,
        "display": spec.display or found.display})


def _band_list(spec: DatasetSpec) -> str:
    return "first three" if spec.bands is None else ", ".join(map(str, spec.bands))


def candidate_roots(config: DataConfig, spec: DatasetSpec) -> list[Path]:
    """Where `find_root` looks, in order."""
    if config.root is not None:
        return [config.root, config.root / spec.name]
    description = Path(config.dataset)
    if _prepared_is_gone(config):  # a folder of that name elsewhere may be another one
        return [description.parent]
    stores = [os.environ["CO2S_DATA"]] if os.environ.get("CO2S_DATA") else []
    roots = [Path(store) / spec.name for store in [*stores, "data"]]
    if description.name == DESCRIPTION and (description.parent / "images").is_dir():
        roots.insert(0, description.parent)
    return roots


def _prepared_is_gone(config: DataConfig) -> bool:
    """Whether the dataset is a prepared folder's own description, which is not there (any more)."""
    description = Path(config.dataset)
    return description.name == DESCRIPTION and not description.is_file()


def _check_description(root: Path, spec: DatasetSpec) -> None:
    """A prepared tree must hold the classes that the run trains."""
    description = root / DESCRIPTION
    if not description.is_file():
        return
    described = load_dataset(description)
    found = described.class_names
    if spec.generated and (described.name, found) != (spec.name, spec.class_names):
        raise DataError(f"{root}: holds dataset {described.name!r}, not {spec.name!r}; give "
                        f"--dataset {description}")
    if spec.generated and described.val != spec.val:
        raise DataError(f"{root}: was generated by another version of the package; remove the "
                        "folder, and it is generated again")
    if found != spec.class_names:
        raise DataError(f"{description}: was prepared for classes {', '.join(found)}; "
                        f"dataset {spec.name!r} has {', '.join(spec.class_names)}")


def describe_root(root: Path) -> DatasetSpec:
    """The dataset that a folder holds, by its `dataset.yaml`, else by its name.

    Raises:
        DataError: the folder is missing, or does not say.
    """
    if (root / DESCRIPTION).is_file():
        return load_dataset(root / DESCRIPTION)
    if not root.is_dir():
        raise DataError(f"{root}: missing folder; `co2s-fast data prepare` makes it")
    if root.resolve().name in dataset_names():
        return load_dataset(root.resolve().name)
    raise DataError(f"{root}: no {DESCRIPTION}, so not prepared by `co2s-fast data prepare`, and "
                    f"not named after a dataset ({', '.join(dataset_names())})")


def read_split(root: Path, folder: Path, *, check_files: bool = True) -> Split:
    """Read `labeled.txt`, `unlabeled.txt` and `val.txt` and check every file they name.

    An unlabelled line may name the image only; a label it names may be absent. Without
    `check_files`, training images may be absent, too. See `find_val_list`.
    """
    problems: list[str] = []
    if not folder.is_dir():
        raise DataError(f"split folder {folder}: missing")
    unlabeled_list = folder / "unlabeled.txt"
    labeled = read_list(folder / "labeled.txt", root, problems, need_label=True,
                        check_files=check_files)
    unlabeled = []
    if unlabeled_list.is_file():
        unlabeled = read_list(unlabeled_list, root, problems, need_label=False, may_be_empty=True,
                              check_files=check_files)
        unlabeled = [i if i.label is None or i.label.is_file() else replace(i, label=None)
                     for i in unlabeled]
    val = read_list(find_val_list(folder), root, problems, need_label=True)
    split = Split(labeled, unlabeled, val, folder)
    problems += overlaps(split)
    if problems:
        raise DataError(summary(problems))
    return split


def read_val(root: Path, folder: Path) -> Split:
    """The validation images of a split folder and no others, as evaluating needs them."""
    problems: list[str] = []
    if not folder.is_dir():
        raise DataError(f"split folder {folder}: missing")
    split = Split([], [], read_list(find_val_list(folder), root, problems, need_label=True), folder)
    if problems:
        raise DataError(summary(problems))
    return split


def find_val_list(folder: Path) -> Path:
    """`val.txt` of a split folder: in it, else in its parents up to two levels."""
    places = (folder, folder.parent, folder.parent.parent)
    return next((d / "val.txt" for d in places if (d / "val.txt").is_file()), folder / "val.txt")


def summary(problems: list[str]) -> str:
    """The first few problems in one line, and how many there are."""
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def read_list(path: Path, root: Path, problems: list[str], *, need_label: bool,
              may_be_empty: bool = False, check_files: bool = True) -> list[Item]:
    """The items of one list, `images/a.png labels/a.png` a line; problems are appended.

    Between names that hold spaces, and after an image without a label, stands a tab.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        problems.append(f"split list {path}: missing")
        return []
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"split list {path}: unreadable ({error})")
        return []
    base, raw, items = root.resolve(), not is_uniform(root), []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_read_line(line, root, base, need_label, check_files, raw))
            except DataError as error:
                problems.append(f"{path}, line {number}: {error}")
    if not items and not may_be_empty and not any(p.startswith(str(path)) for p in problems):
        problems.append(f"split list {path}: empty, expected at least one line "
                        "`images/NAME.png labels/NAME.png`")
    return items


def _read_line(line: str, root: Path, base: Path, need_label: bool, check_files: bool,
               raw: bool) -> Item:
    # A tab stands where names hold spaces.
    fields = [f.strip() for f in line.split("\t") if f.strip()] if "\t" in line else line.split()
    if len(fields) > 2:
        raise DataError(f"{len(fields)} fields, expected an image and a label; names that hold "
                        "spaces need a tab between them")
    if need_label and len(fields) < 2:
        raise DataError(f"{fields[0]}: no label named")
    paths = [_inside(root, base, field) for field in fields]
    image, label = paths[0], paths[1] if len(paths) > 1 else None
    if check_files:
        if not image.is_file():
            raise DataError(f"{image}: missing file")
        if label is not None and not label.is_file():
            if need_label:
                raise DataError(f"{label}: missing file")
            label = None
    return Item(image.stem, image, label, raw)


def _inside(root: Path, base: Path, field_: str) -> Path:
    path = root / field_
    # A list comes from elsewhere: what it names must stay below the data root. The text is judged,
    # not where links lead: linked image folders are common and harmless.
    if Path(field_).is_absolute() or ".." in Path(field_).parts:
        raise DataError(f"{field_}: outside the data root {base}")
    return path


def overlaps(split: Split) -> list[str]:
    """Images in more than one place, one problem a pair of lists."""
    names = {"labeled": split.labeled, "unlabeled": split.unlabeled, "val": split.val}
    sets = {key: {item.image for item in items} for key, items in names.items()}
    problems = []
    for one, other in (("labeled", "val"), ("unlabeled", "val"), ("labeled", "unlabeled")):
        both = sets[one] & sets[other]
        if both:
            problems.append(f"{len(both)} images are in both {one}.txt and {other}.txt, "
                            f"for example {min(both)}")
    for key, items in names.items():
        if len(sets[key]) < len(items):
            problems.append(f"{key}.txt: {len(items) - len(sets[key])} images are listed twice")
    return problems


def _check_sizes(split: Split, config: DataConfig, folder: Path) -> None:
    if len(split.labeled) < config.batch_size:
        raise DataError(
            f"{folder / 'labeled.txt'}: {len(split.labeled)} labelled images, fewer than the batch "
            f"size {config.batch_size}; lower data.batch_size or label more"
        )
    if split.unlabeled and len(split.unlabeled) < config.batch_size:
        raise DataError(
            f"{folder / 'unlabeled.txt'}: {len(split.unlabeled)} unlabelled images, fewer than the "
            f"batch size {config.batch_size}"
        )
