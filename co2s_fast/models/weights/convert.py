"""`co2s-fast weights import` and `verify`: files of any known layout into safetensors of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from co2s_fast.data.writing import replacing
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.inflate import NORMALIZATION
from co2s_fast.models.weights import files, store
from co2s_fast.models.weights.architecture import clip_architecture, ssm_architecture
from co2s_fast.models.weights.layouts import Converted, Layout, detect, layout_named, translate
from co2s_fast.models.weights.registry import REGISTRY, Kind, WeightEntry, entry_named

FORMAT = "co2s-fast weights"


@dataclass(frozen=True)
class About:
    """What a file of weights says of itself, or what its tensors say of it.

    Attributes:
        kind: "clip" or "ssm".
        model, overrides: the architecture, as a student's configuration names it.
        mean, std: of the images it was trained on, in [0, 1], one a channel.
        text: it has a text tower.
        depth, patch: number of blocks, side of a token in pixels.
        layout: of the file.
    """

    kind: Kind
    model: str
    overrides: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: bool
    depth: int
    patch: int
    layout: str


def convert(
    path: Path,
    kind: Kind | None = None,
    layout: Layout | None = None,
    entry: WeightEntry | None = None,
) -> Converted:
    """A file's tensors under the library's names, with the model they belong to.

    Args:
        path: the file.
        kind: what it must be; None: either.
        layout: None: told by the keys.
        entry: what it must be; None: told by names and shapes. Then a CLIP model's activation,
            which no tensor tells, is QuickGELU for OpenAI's and transformers' layouts, which are
            of OpenAI's models, and GELU for open_clip's.

    Raises:
        DataError: unreadable, unknown, or not whole: every missing and unexpected key is listed.
    """
    state = files.read_state_dict(path)
    layout = layout or detect(state, path, kind)
    state = translate(layout, state, path)
    if entry is not None:
        model, overrides = entry.model, dict(entry.overrides)
    elif layout.kind == "clip":
        quick = layout.name in ("openai", "clip-hf", "co2s")
        model, overrides = clip_architecture(state, path, quick=quick)
    else:
        model, overrides = ssm_architecture(state, path)
    found = Converted(layout, state, model, overrides)
    told = files.mismatches(skeleton(found), state)
    if told:
        raise DataError(f"weights {path}, layout {layout.name}, do not fit {model}: {told}")
    return found


def skeleton(found: Converted) -> files.State:
    """Names and shapes that the model of converted weights has; no memory behind them."""
    with torch.device("meta"):
        if found.layout.kind == "ssm":
            import timm

            model = timm.create_model(found.model, num_classes=0, **found.overrides)
            return model.state_dict()
        import open_clip

        from co2s_fast.models.loading import clip_description

        model = open_clip.CLIP(**clip_description(found.model, found.overrides))
    state = model.state_dict()
    if found.whole_clip:
        return state
    return {key: value for key, value in state.items() if key.startswith("visual.")}


def import_weights(
    source: Path, out: Path | None = None, *, name: str | None = None, layout: str | None = None
) -> Path:
    """Convert a file and write it as safetensors with its model, mean and deviation inside.

    Args:
        source: a file of a known layout.
        out: the file to write; None: NAME.safetensors where names are looked for.
        name: a known name that the file is; it must then fit that entry.
        layout: of the file; None: told by its keys.

    Returns:
        The file written.

    Raises:
        UsageError: neither `out` nor `name`, or an unknown one.
        DataError: see `convert`; a file of another model, or with another checksum, than the name.
    """
    entry = None if name is None else entry_named(name)
    if out is None and entry is None:
        raise UsageError("weights import: give -o FILE, or --as NAME")
    if out is not None and out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: expected a name that ends with .safetensors")
    kind = None if entry is None else entry.kind
    chosen = None if layout is None else layout_named(layout, kind)
    found = convert(source, kind, chosen, entry)
    digest = files.file_sha256(source)
    # What is made of OpenAI's TorchScript archive is not the published file, byte for byte.
    published = None if entry is None or entry.layout == "openai" else entry.sha256
    if published is not None and not digest.startswith(published):
        raise DataError(f"weights {source}: sha256 {digest}, {entry.origin} publishes {published} "
                        f"for {entry.name}")  # fmt: skip
    target = out or store.folder() / f"{name}.safetensors"
    about = _metadata(found, entry, source, digest)
    with replacing(target) as temporary:
        files.save_tensors(temporary, found.state, about)
    return target


def _metadata(
    found: Converted, entry: WeightEntry | None, source: Path, digest: str
) -> dict[str, str]:
    kind = found.layout.kind
    mean, std = NORMALIZATION[entry.normalization if entry else _normalization(found, source)]
    return {
        "format": FORMAT,
        "kind": kind,
        "name": entry.name if entry else "",
        "model": found.model,
        "overrides": json.dumps(found.overrides),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "text": json.dumps(found.whole_clip),
        "depth": str(found.depth),
        "patch": str(found.patch),
        "licence": entry.licence if entry else "",
        "source": source.name,
        "source_layout": found.layout.name,
        "source_sha256": digest,
        "tensors_sha256": files.state_sha256(found.state),
    }


def _normalization(found: Converted, path: Path) -> str:
    """Of a file that is known by no name: that of its kind, of Meta's satellite DINOv3 its own."""
    if found.layout.name.startswith("dinov3") and "sat493m" in path.name:
        return "satellite"
    return "clip" if found.layout.kind == "clip" else "imagenet"


def describe(path: Path, kind: Kind | None = None) -> About:
    """What kind of weights a file holds, from its metadata or else from its tensors.

    Raises:
        DataError: unreadable, unknown, not whole, or of the other kind.
    """
    said = files.metadata(path)
    if said.get("format") != FORMAT:
        found = convert(path, kind)
        rule = NORMALIZATION[_normalization(found, path)]
        return About(found.layout.kind, found.model, found.overrides, *rule, found.whole_clip,
                     found.depth, found.patch, found.layout.name)  # fmt: skip
    if kind not in (None, said["kind"]):
        raise DataError(f"weights {path}: of kind {said['kind']}, expected kind {kind}")
    try:
        mean, std = (tuple(map(float, json.loads(said[key]))) for key in ("mean", "std"))
        overrides = dict(json.loads(said["overrides"]))
        own, depth, patch = said["kind"], int(said["depth"]), int(said["patch"])
        return About(own, said["model"], overrides, mean, std, said["text"] == "true", depth,
                     patch, "open_clip" if own == "clip" else "timm")  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"weights {path}: damaged metadata ({error})") from error


def verify(path: Path) -> str:
    """Check a file's tensors: all keys there, none too many, and the checksum inside, if any.

    Returns:
        What was found, in a line.

    Raises:
        DataError: it does not hold what it should.
    """
    said = files.metadata(path)
    if said.get("format") == files.OWN_BACKBONE["format"]:
        state = files.read_state_dict(path)
        digest, written = files.state_sha256(state), _pretrained_sha256(path)
        if digest != (written or digest):
            raise DataError(f"weights {path}: its tensors have sha256 {digest}, written were "
                            f"{written}")
        return (f"a backbone of `co2s-fast pretrain`, {len(state)} tensors, sha256 {digest[:12]}"
                f"{' as written' if written else ''}")
    if said.get("format") != FORMAT:
        found = convert(path)
        return f"layout {found.layout.name}, {found.model}, {len(found.state)} tensors fit"
    about = describe(path)
    state = files.read_state_dict(path)
    layout = layout_named(about.layout)
    told = files.mismatches(skeleton(Converted(layout, state, about.model, about.overrides)), state)
    if told:
        raise DataError(f"weights {path} do not fit {about.model}: {told}")
    digest = files.state_sha256(state)
    if digest != said.get("tensors_sha256"):
        raise DataError(f"weights {path}: its tensors have sha256 {digest}, written were "
                        f"{said.get('tensors_sha256')}")  # fmt: skip
    return f"{about.model}, {len(state)} tensors fit, sha256 {digest[:12]} as written"


def _pretrained_sha256(path: Path) -> str | None:
    """What the record beside a file of `pretrain` says of it; None where it says nothing."""
    try:
        record = json.loads((path.parent / files.PRETRAINED).read_text(encoding="utf-8"))
        return str(record["students"][path.stem]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify_all() -> list[tuple[str, str, bool]]:
    """(name, what was found, all is well) of every known name that is on this machine."""
    results = []
    for entry in REGISTRY.values():
        path = store.locate(entry)
        if path is None:
            continue
        try:
            digest = store.check(entry, path)
            code = files.is_torchscript(path)
            told = f"{path}: {'a TorchScript archive, to convert' if code else verify(path)}"
            if files.metadata(path).get("format") != FORMAT:
                told += f", file sha256 {digest[:12]}"
            results.append((entry.name, told, True))
        except DataError as error:
            results.append((entry.name, str(error), False))
    return results


def table() -> str:
    """The known weights: name, kind, model, patch, licence, source, whether they are here."""
    rows = [("name", "kind", "model", "patch", "licence", "source", "here")]
    for entry in REGISTRY.values():
        path = store.locate(entry)
        here = "no" if path is None else str(path)
        rows.append((entry.name, entry.kind, entry.model, str(entry.patch), entry.licence,
                     _shortened(entry.source), here))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in rows
    ]
    notes = [f"{entry.name}: {entry.note}" for entry in REGISTRY.values() if entry.note]
    return "\n".join([*lines, "", *notes])


def _shortened(source: str) -> str:
    return source.split("/")[2] if source.startswith("https://") else source
