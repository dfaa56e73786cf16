"""What a dataset is: its classes, how its raw files pair up and become tiles, how it is augmented.

The built-in datasets are YAML files in `datasets/`; a user's own dataset is the same description
in a YAML file of their own, and nothing in the code knows a dataset by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from co2s_fast.data.imagery import BandNumber, BandStatistics, RasterSpec
from co2s_fast.errors import UsageError

DESCRIPTION = "dataset.yaml"
"""Marks a prepared folder: its labels hold class ids, whatever the raw masks held."""

IGNORE = 255
"""Label of a pixel that has no class, in every label the package writes or yields."""

UNKNOWN = 254
"""Marks an undeclared mask value while a mask is decoded; never leaves the decoder."""

MAX_CLASSES = 250
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of datasets; they are names of folders, too."""

RGB = ("red", "green", "blue")
CATALOGUE = Path(__file__).parent / "datasets"

Byte = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Byte, Byte, Byte]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassSpec(_Strict):
    """One class: its name, its palette colour and the phrases that describe it.

    Args:
        name: class name, used verbatim in text queries.
        color: (r, g, b), 0-255, in palettes, and in raw masks whose encoding is "color".
        concepts: phrases whose text embeddings are averaged; the class name is put first if absent.
        values: raw values of this class in masks whose encoding is "index"; empty: its position
            in the list of classes plus `mask.offset`.
    """

    name: str = Field(min_length=1)
    color: Color
    concepts: list[str] = []
    values: list[int] = []

    @model_validator(mode="after")
    def _name_comes_first(self) -> ClassSpec:
        if self.name not in self.concepts:
            object.__setattr__(self, "concepts", [self.name, *self.concepts])
        return self


class MaskSpec(_Strict):
    """The one map `raw value or colour -> class | ignore`, applied once when a raw mask is read.

    Args:
        encoding: "index" (one band of numbers), "color" (RGB or palette, matched by colour) or
            "polygons" (GeoPackage, GeoJSON, ... burned in over the image's ground).
        offset: raw value of the first class; 1 is the `reduce_zero_label` of other frameworks.
        ignore: values (index), (r, g, b) colours (color), or values and names (polygons) that mean
            "no class". The nodata value of a mask counts too, where no class has it.
        attribute: of polygons: field that holds the name or the value of the class.
        outside: of polygons: what lies in none of them, "ignore" or the name of a class.
        all_touched: of polygons: burn every pixel that one touches, not only those whose centre it
            holds.
        layer: of polygons: name of the layer; None: the first.
    """

    encoding: Literal["index", "color", "polygons"] = "index"
    offset: int = 0
    ignore: list[int | Color | str] = [IGNORE]
    attribute: str | None = None
    outside: str = "ignore"
    all_touched: bool = False
    layer: str | None = None

    @model_validator(mode="after")
    def _attribute_is_given(self) -> MaskSpec:
        if self.encoding == "polygons" and self.attribute is None:
            raise ValueError("encoding 'polygons' needs `attribute`, the field with the class")
        if self.encoding != "polygons" and self.attribute is not None:
            raise ValueError(f"attribute is for encoding 'polygons', found {self.encoding!r}")
        return self


class TileSpec(_Strict):
    """How a raw image is cut.

    Args:
        size: side of the tiles in pixels after scaling; None: images stay whole.
        stride: step between tiles in pixels; None: `size`.
        scale: factor by which the raw image is resized first.
        edge: what happens where the last tile does not fit: "shift" moves it back inside (pads an
            image smaller than a tile), "pad" pads with ignore, "drop" leaves the rest out.
        name: template of the tiles' names, of the fields of `files.images` and {x1}, {y1}, {x2},
            {y2} (corners in the scaled image), {row} and {column} (in the grid, from 0). None: the
            group, the image where a group has several, and the corner.
        format: files the tiles are written to. An image that stays whole keeps its own.
    """

    size: int | None = Field(default=None, ge=16)
    stride: int | None = Field(default=None, ge=1)
    scale: float = Field(default=1.0, gt=0, le=16)
    edge: Literal["shift", "pad", "drop"] = "shift"
    name: str | None = None
    format: Literal["png", "tif"] = "png"


class FilesSpec(_Strict):
    """How raw files pair up, as path templates with named fields below the raw folder.

    A field is `{word}`: it matches any characters but a slash, in every template alike. A template
    that begins with `**/` matches below any folder. An archive counts as a folder of its name.

    Args:
        images: template of the images, e.g. "{scene}/images/{part}.jpg".
        labels: template of the masks with fields of `images` only; an image whose mask is not
            there is unlabelled. None: no image has a mask.
        group: name of the unit that is never in both training and validation, e.g.
            "{scene}/{part}". None: every image by itself.
        mask: the value map of these masks, where it is not the dataset's.
        tile: how these images are cut, where it is not as the dataset's.
    """

    images: str
    labels: str | None = None
    group: str | None = None
    mask: MaskSpec | None = None
    tile: TileSpec | None = None


class InfoSpec(_Strict):
    """What `data list` tells about a dataset.

    `labeled` maps a ratio to the authors' count; `needs` says what of the release to fetch.
    """

    title: str = ""
    sensor: str = "unknown"
    resolution: str = "unknown"
    licence: str = "unknown"
    source: str = ""
    needs: str = ""
    notes: list[str] = []
    total: int | None = None
    train: int | None = None
    val: int | None = None
    paper_total: int | None = None
    labeled: dict[str, int] = {}


class DatasetSpec(_Strict):
    """One dataset. See `datasets/*.yaml` and `examples/datasets/` for filled-in descriptions.

    Args:
        name: short name; folder name under the data root.
        classes: in label order: class 0 first.
        crop: side of the training crops in pixels.
        scale: "native" (long side drawn in [lo, hi] times its length) or a reference size
            (long, short), to which images are fitted times a factor drawn in [lo, hi];
            validation then brings the short side to `short`.
        scale_range: (lo, hi).
        bands: bands of the rasters that make the channels, in this order, counted from 1; a
            number N means the first N. None: the first three, or a single one as grey.
        band_names: names of the channels, e.g. [red, green, blue, nir]; pretrained filters go to
            the bands of these three colours, which pictures show, too.
        display: the three of these bands that pictures show; None: the first three channels.
        raster: stretch and nodata of rasters.
        statistics: what `data prepare` found in the training images; None where images are 8-bit
            colour or grey, which pass as they are.
        mask: the value map of the raw masks.
        files: where raw images and masks are, or a list of layouts in which the raw files come:
            the first whose `images` match is taken. Needed by `data prepare` only.
        tile: how raw images are cut.
        val: share of groups held out for validation, or patterns (fnmatch) of their names.
        generated: the dataset is made by the package itself and needs no files.
        info: licence, sensor, source, counts.
    """

    name: str = Field(pattern=NAME)
    classes: list[ClassSpec] = Field(min_length=2, max_length=MAX_CLASSES)
    crop: int = Field(default=512, ge=16)
    scale: Literal["native"] | tuple[int, int] = "native"
    scale_range: tuple[float, float] = (0.5, 2.0)
    bands: list[BandNumber] | None = Field(default=None, min_length=1)
    band_names: list[str] | None = None
    display: tuple[BandNumber, BandNumber, BandNumber] | None = None
    raster: RasterSpec = RasterSpec()
    statistics: BandStatistics | None = None
    mask: MaskSpec = MaskSpec()
    files: FilesSpec | list[FilesSpec] | None = None
    tile: TileSpec = TileSpec()
    val: Annotated[float, Field(gt=0, lt=1)] | list[str] = 0.1
    generated: bool = False
    info: InfoSpec = InfoSpec()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Channels of the images as the students get them."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def display_channels(self) -> tuple[int, int, int]:
        """Channels, counted from 0, that pictures show as red, green and blue."""
        if self.display is not None:
            numbers = self.bands or [1, 2, 3]
            return tuple(numbers.index(band) for band in self.display)
        names = [name.lower() for name in self.band_names or ()]
        if all(color in names for color in RGB):
            return tuple(names.index(color) for color in RGB)
        return (0, 1, 2) if self.channels >= 3 else (0, 0, 0)

    @property
    def class_names(self) -> list[str]:
        return [c.name for c in self.classes]

    @property
    def layouts(self) -> list[FilesSpec]:
        if self.files is None:
            return []
        return self.files if isinstance(self.files, list) else [self.files]

    @property
    def palette(self) -> list[Color]:
        return [c.color for c in self.classes]

    @field_validator("bands", mode="before")
    @classmethod
    def _number_of_bands(cls, bands: Any) -> Any:
        # A number says how many; runs of earlier versions have 3 here.
        if isinstance(bands, int) and not isinstance(bands, bool) and bands > 0:
            return None if bands == 3 else list(range(1, bands + 1))
        return bands

    @model_validator(mode="after")
    def _is_consistent(self) -> DatasetSpec:
        problems = [*_repeated("class name", self.class_names), *_mask_problems(self)]
        problems += _repeated("class color", self.palette)
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            problems.append(f"scale_range {self.scale_range} must be 0 < low <= high")
        problems += _band_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _band_problems(spec: DatasetSpec) -> list[str]:
    bands = [1, 2, 3] if spec.bands is None else spec.bands
    problems = [*_repeated("band", bands)]
    problems += [f"display: band {band} is not one of bands {', '.join(map(str, bands))}"
                 for band in dict.fromkeys(spec.display or ()) if band not in bands]
    if spec.band_names is not None and len(spec.band_names) != spec.channels:
        problems.append(f"band_names has {len(spec.band_names)} names, bands {spec.channels}")
    problems += _repeated("band name", spec.band_names or [])
    found = spec.channels if spec.statistics is None else len(spec.statistics.low)
    if found != spec.channels:
        problems.append(f"statistics are of {found} channels, bands of {spec.channels}")
    return problems


def _repeated(what: str, values: list[Any]) -> list[str]:
    return [f"{what} {v} is used twice" for v in dict.fromkeys(values) if values.count(v) > 1]


def _mask_problems(spec: DatasetSpec) -> list[str]:
    masks = [spec.mask, *(files.mask for files in spec.layouts if files.mask is not None)]
    kinds = [text for mask in masks for text in _kind_problems(mask, spec)]
    return list(dict.fromkeys(kinds)) or _value_problems(spec.mask, spec)


def _kind_problems(mask: MaskSpec, spec: DatasetSpec) -> list[str]:
    if mask.outside not in ("ignore", *spec.class_names):
        return [f"mask.outside {mask.outside!r}: expected 'ignore' or the name of a class"]
    if mask.encoding == "polygons":
        return []
    kind, wanted = (tuple, "colours") if mask.encoding == "color" else (int, "values")
    return [f"mask.ignore {v}: encoding {mask.encoding!r} needs {wanted}"
            for v in mask.ignore if not isinstance(v, kind) and v != IGNORE]


def _value_problems(mask: MaskSpec, spec: DatasetSpec) -> list[str]:
    """What is a class and ignored, or two classes, in masks of the dataset's own encoding."""
    if mask.encoding == "polygons":
        return []
    if mask.encoding == "color":
        return [f"mask color {v} is both a class and ignored" for v in mask.ignore
                if v in spec.palette]
    values = [v for i in range(spec.num_classes) for v in class_values(spec, i)]
    problems = _repeated("mask value", values)
    return problems + [f"mask value {v} is both a class and ignored" for v in mask.ignore
                       if v in values]


def class_values(spec: DatasetSpec, index: int) -> list[int]:
    """Raw mask values of class `index` where the masks' encoding is "index"."""
    return spec.classes[index].values or [index + spec.mask.offset]


def dataset_names() -> list[str]:
    """Names of the built-in datasets, the generated one first."""
    return sorted((p.stem for p in CATALOGUE.glob("*.yaml")), key=lambda n: (n != "demo", n))


def load_dataset(name_or_path: str | Path) -> DatasetSpec:
    """The catalogue entry of that name, or the description in a user's YAML file.

    Raises:
        UsageError: no such entry or file, or the description is wrong; every unknown, missing or
            wrong key is listed.
    """
    path = Path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = CATALOGUE / f"{name_or_path}.yaml"
        if str(name_or_path) not in dataset_names():
            inside = Path(name_or_path) / DESCRIPTION
            hint = f"; this folder has one, {inside}" * inside.is_file()
            raise UsageError(
                f"unknown dataset {str(name_or_path)!r}: expected one of "
                f"{', '.join(dataset_names())}, or the path of a .yaml description{hint}"
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"dataset description {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"dataset description {path} is not YAML: {_one_line(error)}") from error
    return parse_dataset(content, path)


def parse_dataset(content: Any, origin: str | Path) -> DatasetSpec:
    """Check the content of a description; `origin` names it in the error."""
    if not isinstance(content, dict):
        found = type(content).__name__
        raise UsageError(f"dataset description {origin}: expected keys and values, found {found}")
    try:
        return DatasetSpec.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"dataset description {origin}: {explain(error)}") from error


def change_bands(spec: DatasetSpec, bands: str | None = None,
                 stretch: str | None = None) -> DatasetSpec:
    """The dataset with other bands ("4,3,2") and another stretch; None keeps its own.

    Names go with their bands; where a chosen band has none, all channels go without.

    Raises:
        UsageError: no list of numbers, or it does not go with the rest of the description.
    """
    content = spec.model_dump(mode="json")
    if bands is not None:
        try:
            chosen = content["bands"] = [int(part) for part in bands.split(",")]
        except ValueError:
            raise UsageError(f"--bands {bands!r}: expected numbers like 4,3,2") from None
        # Names and colours stay with their bands, where all of the chosen ones have any.
        names = dict(zip(spec.bands or [1, 2, 3], spec.band_names or (), strict=False))
        known = names.keys() >= set(chosen)
        content["band_names"] = [names[band] for band in chosen] if known else None
        if not set(spec.display or ()) <= set(chosen):
            content["display"] = None
    if stretch is not None:
        content["raster"]["stretch"] = stretch
    return parse_dataset(content, f"of {spec.name!r} with --bands and --stretch")


def explain(error: ValidationError) -> str:
    """All problems of a pydantic error in one line: `key: what is wrong; key: ...`."""
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
        text = {"extra_forbidden": "unknown key", "missing": "missing"}.get(kind, message)
        if kind not in ("extra_forbidden", "missing", "value_error"):
            text += f", found {problem['input']!r}"
        if kind == "string_type" and not isinstance(problem["input"], (list, dict)):
            text += " (words like no or null, and numbers, are text in quotes only)"
        parts.append(f"{key}: {text}" if key else text)
    return "; ".join(dict.fromkeys(parts))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
