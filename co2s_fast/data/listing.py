"""What `data list` prints about the catalogue."""

from __future__ import annotations

from pathlib import Path

from co2s_fast.data.catalogue import DatasetSpec, dataset_names, load_dataset
from co2s_fast.data.config import DataConfig
from co2s_fast.data.splits import candidate_roots, find_root
from co2s_fast.data.tiles import list_images
from co2s_fast.errors import DataError


def describe_catalogue() -> str:
    """The built-in datasets: classes, counts, sensor, licence, where to get and where found."""
    return "\n\n".join(describe_dataset(load_dataset(name)) for name in dataset_names())


def describe_dataset(spec: DatasetSpec) -> str:
    """One dataset, a fact a line."""
    info = spec.info
    counts = f"{info.total} images: {info.train} training, {info.val} validation"
    if info.paper_total is not None:
        counts += f" (the paper says {info.paper_total})"
    rows = {
        "sensor": f"{info.sensor}; {info.resolution}",
        "counts": counts if info.total is not None else "",
        "labelled": ", ".join(f"{ratio}: {n}" for ratio, n in info.labeled.items()),
        "training": f"crop {spec.crop}, scale {_scale(spec)}",
        "licence": info.licence,
        "get it": f"{info.source}: {info.needs}" if info.needs else info.source,
        "here": _found(spec),
        "note": "; ".join(info.notes),
    }
    lines = [f"{spec.name}: {info.title or 'no title'}, {spec.num_classes} classes"]
    lines += [f"  {key:<9} {text}" for key, text in rows.items() if text]
    for index, entry in enumerate(spec.classes):
        color = "#{:02x}{:02x}{:02x}".format(*entry.color)
        concepts = ", ".join(entry.concepts[1:])
        lines.append(f"  {index:>3} {color} {entry.name}: {concepts}")
    return "\n".join(lines)


def _scale(spec: DatasetSpec) -> str:
    low, high = spec.scale_range
    if spec.scale == "native":
        return f"{low} to {high} times native"
    return f"{low} to {high} times a fit into {spec.scale[0]} x {spec.scale[1]}"


def _found(spec: DatasetSpec) -> str:
    try:
        root = _existing_root(spec)
    except DataError as error:
        return f"unusable: {error}"
    if root is None:
        return "made on first use" if spec.generated else "not found"
    return f"{root}, {len(list_images(root))} images"


def _existing_root(spec: DatasetSpec) -> Path | None:
    """Where the dataset is, without generating it and without saying how to fetch it."""
    config = DataConfig(dataset=spec.name)
    if not any((root / "images").is_dir() for root in candidate_roots(config, spec)):
        return None
    return find_root(config, spec)
