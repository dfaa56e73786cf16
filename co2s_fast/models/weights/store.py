"""Where weights lie on this machine, and how they come here."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from co2s_fast.data.writing import replacing, write_text
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.weights.files import (
    file_sha256,
    is_file_name,
    is_torchscript,
    read_state_dict,
)
from co2s_fast.models.weights.registry import REGISTRY, Kind, WeightEntry, entry_for
from co2s_fast.offline import go_offline, is_offline

LOCK_FILE = "checksums.json"


def folder() -> Path:
    """$CO2S_WEIGHTS, else co2s-fast/weights in the user's cache."""
    given = os.environ.get("CO2S_WEIGHTS")
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "co2s-fast" / "weights"


def file_name(entry: WeightEntry) -> str:
    """The name that a fetched file has outside the caches of other packages."""
    source = entry.url or (entry.files[0] if entry.files else ".pth")
    return entry.name + Path(source).suffix


def locate(entry: WeightEntry) -> Path | None:
    """The entry's file on this machine, without asking the network; None where there is none.

    Looked for in `folder()` (NAME.safetensors, as `weights import` writes it, then any other
    suffix), then in Hugging Face's cache.
    """
    for suffix in (".safetensors", ".pth", ".pt", ".bin"):
        path = folder() / f"{entry.name}{suffix}"
        if path.is_file():
            return path
    if entry.hub is not None:
        from huggingface_hub import try_to_load_from_cache

        for file in entry.files:
            found = try_to_load_from_cache(entry.hub, file)
            if isinstance(found, str):
                return Path(found)
    return None


def fetch(entry: WeightEntry, out: Path | None = None) -> Path:
    """Bring the entry's file here, check it and note its checksum.

    Args:
        entry: what to fetch.
        out: folder for a copy and its checksum, to take to another machine; None: it lies in
            Hugging Face's cache or in `folder()`.

    Returns:
        The file.

    Raises:
        UsageError: no program can fetch it; the message says how to get it.
        DataError: offline, unreachable, or not the file that its publisher names.
    """
    path = locate(entry)
    if path is None:
        path = _download(entry)
    digest = check(entry, path)
    if out is not None:
        target = out / (entry.name + path.suffix)
        with replacing(target) as temporary:
            shutil.copyfile(path, temporary)
        _note(out, entry, target, digest)
        path = target
    return path


def require(entry: WeightEntry) -> None:
    """Make sure that the entry's file is here or can be asked for; asks for nothing itself.

    Raises:
        UsageError: it is not here, and no program can fetch it.
        DataError: it is not here, and it is offline.
    """
    if locate(entry) is not None:
        return
    if entry.url is None and entry.hub is None:
        raise UsageError(
            f"weights {entry.name}: not on this machine, and no program can fetch them; "
            f"{entry.origin}: {entry.manual}; then co2s-fast weights import FILE --as {entry.name}"
        )
    if is_offline():
        raise DataError(missing(entry))


def _download(entry: WeightEntry) -> Path:
    require(entry)
    try:
        if entry.hub is not None:
            return _from_hub(entry)
        target = folder() / file_name(entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            _from_url(entry.url, temporary)
            if entry.sha256 and not (found := file_sha256(temporary)).startswith(entry.sha256):
                raise OSError(f"invalid hash value, expected {entry.sha256}, found {found}")
            # Without a published checksum a file that can be read is what there is to go by.
            if entry.sha256 is None and not is_torchscript(temporary):
                read_state_dict(temporary)
        return target
    except (DataError, UsageError):
        raise
    except Exception as error:  # of urllib, of the hub's client and of what it is built on
        raise DataError(f"weights {entry.name}: not fetched from {entry.url or entry.hub}: "
                        f"{first_line(error)}") from error  # fmt: skip


def _from_url(url: str, target: Path) -> None:
    """Fetch a file, or raise an OSError where less came than was announced.

    `torch.hub.download_url_to_file` takes a connection that closes early for the end of the file.
    """
    from tqdm import tqdm

    with urllib.request.urlopen(url) as answer, target.open("wb") as file:
        announced = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=announced or None, unit="B", unit_scale=True, desc=target.name) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if announced and file.tell() != announced:
            raise OSError(f"{file.tell()} of {announced} bytes came; try again")


def _from_hub(entry: WeightEntry) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in entry.files:
        try:
            return Path(hf_hub_download(entry.hub, file))
        except LocalEntryNotFoundError:
            raise  # no connection: another name would not help
        except EntryNotFoundError as error:
            absent = error
    raise absent


def check(entry: WeightEntry, path: Path) -> str:
    """Compare a file with its publisher's checksum, or with the one noted when it came here.

    A checksum that nobody has stated is noted at the first sight. Files that `weights import`
    wrote carry their own and are not compared here.

    Returns:
        The file's SHA-256.

    Raises:
        DataError: it is another file.
    """
    found = file_sha256(path)
    noted = read_lock().get(entry.name, {})
    published = entry.sha256 if path.suffix != ".safetensors" else None
    same_source = noted.get("file") == path.name
    expected = published or (noted.get("sha256") if same_source else None)
    if expected is not None and not found.startswith(expected):
        who = "published" if published else f"noted in {folder() / LOCK_FILE}"
        again = "remove it and fetch it again" if published else (
            "remove it and fetch it again; where its publisher has replaced it, remove "
            f"{entry.name!r} from {LOCK_FILE}, too"
        )  # fmt: skip
        raise DataError(f"weights {entry.name}: {path} has sha256 {found}, {who} is {expected}; "
                        f"{again}")  # fmt: skip
    # A folder that somebody else looks after may be read, which is all that is needed.
    if not same_source and (not folder().exists() or os.access(folder(), os.W_OK)):
        _note(folder(), entry, path, found)
    return found


def _note(where: Path, entry: WeightEntry, path: Path, digest: str) -> None:
    about = {"file": path.name, "sha256": digest, "bytes": path.stat().st_size,
             "source": entry.source}  # fmt: skip
    where.mkdir(parents=True, exist_ok=True)
    with FileLock(where / f".{LOCK_FILE}.lock"):  # another process may note another name
        write_text(where / LOCK_FILE, json.dumps({**read_lock(where), entry.name: about}, indent=1))


def read_lock(where: Path | None = None) -> dict[str, Any]:
    """The checksums noted so far in `folder()` or another folder, by name.

    Raises:
        DataError: the file is damaged.
    """
    path = (where or folder()) / LOCK_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a table of checksums ({error})") from error


def missing(entry: WeightEntry) -> str:
    """What to say where the entry's file is needed, is not here, and no network may be asked."""
    return (
        f"weights {entry.name} ({entry.model}): not on this machine, which works offline; "
        f"{elsewhere(entry)}"
    )


def elsewhere(entry: WeightEntry) -> str:
    """How to bring the entry's file from another machine."""
    return (
        f"on one with a network run `co2s-fast weights fetch {entry.name} --out DIR`, then put "
        f"DIR/{file_name(entry)} into {folder()} (or a folder that CO2S_WEIGHTS names)"
    )


def resolve(kind: Kind, model: str, weights: str | None) -> str | None:
    """What a student's `weights` mean: a file, a pretrained tag of the library, or None.

    A known name, or the tag that it stands for, is its file on this machine where there is one;
    else the tag where the library loads it, else what is fetched now.

    Raises:
        UsageError: a name that is for another model. UsageError, DataError: see `fetch`.
    """
    if weights is None or is_file_name(weights):
        return weights
    if weights == "pretrained" and kind == "ssm":
        weights = _default_tag(model)
    entry = entry_for(kind, model, weights)
    if entry is None:
        _refuse_for_another(kind, model, weights)
        return weights
    path = locate(entry)
    if path is not None and (entry.tag is None or path.parent == folder()):
        return str(path)
    if entry.tag is not None:
        if path is None and is_offline():
            raise DataError(missing(entry))
        return entry.tag  # through the library, which knows its own files best
    return str(fetch(entry))


def _refuse_for_another(kind: Kind, model: str, weights: str) -> None:
    """A known name beside a model that is not its own, unless a library has a tag of that name."""
    entry = REGISTRY.get(weights)
    if entry is not None and weights not in {each.tag for each in REGISTRY.values()}:
        raise UsageError(
            f"weights {weights!r} are of kind {entry.kind} for model {entry.model}, not of kind "
            f"{kind} for {model}; --{entry.kind} {weights} sets both"
        )


def _default_tag(model: str) -> str:
    """The tag that timm takes where none is named."""
    import timm

    known = timm.is_model(model) and timm.get_pretrained_cfg(model)
    return (known and known.tag) or "pretrained"


@contextmanager
def from_hub(kind: Kind, model: str, tag: str | None) -> Iterator[None]:
    """While a library loads the weights of a tag: what goes wrong there becomes one line.

    Raises:
        DataError: the weights cannot be had, or are not what the library expects.
    """
    if tag is None:
        yield
        return
    if is_offline():
        go_offline()  # the library may have been imported before the variable was set
    try:
        yield
    except (DataError, UsageError):
        raise
    except Exception as error:  # of the library, of the hub's client and of what it is built on
        entry = entry_for(kind, model, tag)
        hint = elsewhere(entry) if entry else (
            "fetch them on a machine with a network and copy its Hugging Face cache, or give a file"
        )  # fmt: skip
        raise DataError(f"weights {tag!r} of {model}: {first_line(error)}; {hint}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
