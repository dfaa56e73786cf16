"""Students take the bands of the dataset: their number, names, mean and deviation."""

from __future__ import annotations

from typing import Any

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.engine.config import RunConfig
from co2s_fast.errors import UsageError
from co2s_fast.models import StudentConfig
from co2s_fast.models.inflate import RGB

LEAST_DEVIATION = 1 / 255  # of a band: a constant one must not divide by 0


def fit_students(config: RunConfig, spec: DatasetSpec) -> RunConfig:
    """The configuration with students for the dataset's bands, as a run stores it.

    A student whose configuration gives mean and deviation itself keeps them. Plain RGB changes
    nothing.

    Raises:
        UsageError: a student is configured for another number of channels.
    """
    about = describe_bands(spec)
    students = {
        name: _fit(name, student, about, spec) for name, student in config.students.items()
    }
    return config.model_copy(update={"students": students})


def describe_bands(spec: DatasetSpec) -> dict[str, Any]:
    """`channels`, `bands` (names or None), `mean` and `std` (per channel or None) of a dataset.

    The channels that pictures show as red, green and blue bear these names: pretrained filters see
    what a person sees. No channel does where there are fewer than three.
    """
    statistics = spec.statistics
    return {
        "channels": spec.channels,
        "bands": band_names(spec) if _has_names(spec) else None,
        "mean": None if statistics is None else tuple(statistics.mean),
        "std": None if statistics is None else tuple(
            max(value, LEAST_DEVIATION) for value in statistics.std),
    }  # fmt: skip


def _has_names(spec: DatasetSpec) -> bool:
    """Whether the channels are other than three of which nothing is said, which are RGB."""
    return spec.channels != 3 or spec.display is not None or spec.band_names is not None


def band_names(spec: DatasetSpec) -> tuple[str, ...]:
    """A name for each channel: "red", "green", "blue", or "band 8" by its number in the raster.

    Those of the description, where it names them.
    """
    if spec.band_names is not None:
        return tuple(spec.band_names)
    names = [f"band {number}" for number in spec.bands or (1, 2, 3)]
    if spec.channels >= 3:
        for name, channel in zip(RGB, spec.display_channels, strict=True):
            if names[channel] not in RGB:  # a channel may be shown in more than one colour
                names[channel] = name
    return tuple(names)


def _fit(
    name: str, student: StudentConfig, about: dict[str, Any], spec: DatasetSpec
) -> StudentConfig:
    if student.channels not in (3, about["channels"]):
        raise UsageError(
            f"students.{name}.channels is {student.channels}, the images of dataset {spec.name!r} "
            f"have {about['channels']}"
        )
    given = student.model_dump()
    changes = {key: value for key, value in about.items() if value is not None}
    if student.mean is not None:
        if len(student.mean) != about["channels"]:
            raise UsageError(
                f"students.{name}.mean has {len(student.mean)} values, the images of dataset "
                f"{spec.name!r} have {about['channels']} channels"
            )
        changes = {key: value for key, value in changes.items() if key not in ("mean", "std")}
    if student.bands is not None and len(student.bands) != about["channels"]:
        changes.setdefault("bands", None)  # of another dataset
    return StudentConfig.model_validate(given | changes)
