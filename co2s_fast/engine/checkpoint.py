"""Checkpoints without pickled code: safetensors for arrays, JSON for everything else.

`checkpoints/last` and `checkpoints/best` each hold `<student>.<tag>.safetensors`, for `last` also
`optimizer.<tag>.safetensors`, and `state.json`, which names them. New arrays are written beside the
old ones; replacing state.json is the one atomic step that makes them the checkpoint; only then are
the old arrays deleted. So there is a whole checkpoint at every moment, whatever stops the process.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.weights.files import save_tensors

STATE_FILE = "state.json"
FORMAT = 1


def save_checkpoint(
    folder: Path, tag: str, arrays: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping
) -> None:
    """Write a checkpoint so that `folder` holds a whole one before, during and after.

    Args:
        folder: e.g. RUN/checkpoints/last; made where missing.
        tag: distinguishes these files from the ones they replace, e.g. "step-000100".
        arrays: file stem -> named tensors.
        state: JSON-able values; "format" and "files" are added.

    Raises:
        DataError: the disk is full or not writable. The former checkpoint is intact.
    """
    files = {stem: f"{stem}.{tag}.safetensors" for stem in arrays}
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem, tensors in arrays.items():
            temporary = folder / (files[stem] + ".tmp")
            written.append(temporary)
            save_tensors(temporary, {name: on_cpu(tensor) for name, tensor in tensors.items()})
            sync_to_disk(temporary)
            written[-1] = temporary.replace(folder / files[stem])
        temporary = folder / (STATE_FILE + ".tmp")
        written.append(temporary)
        temporary.write_text(json.dumps({"format": FORMAT, "files": files, **state}, indent=1))
        sync_to_disk(temporary)
    except (OSError, SafetensorError) as error:
        remove_unless_current(folder, written)
        raise DataError(write_problem(folder, error)) from error
    temporary.replace(folder / STATE_FILE)
    sync_to_disk(folder)
    for path in folder.iterdir():
        if path.name not in {STATE_FILE, *files.values()}:
            path.unlink()


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous host copy; safetensors refuses tensors that share or skip memory."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def sync_to_disk(path: Path) -> None:
    """Have a file's (or a folder's list of) bytes survive a power cut."""
    if path.is_file():
        with path.open("r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        return
    if os.name == "nt":
        return  # cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts cannot sync a folder.
        if error.errno not in {errno.EINVAL, errno.EACCES, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


def remove_unless_current(folder: Path, written: list[Path]) -> None:
    """Clear away a failed attempt; files of the checkpoint in force share no name with it."""
    current = set()
    if (folder / STATE_FILE).is_file():
        current = set(json.loads((folder / STATE_FILE).read_text())["files"].values())
    for path in written:
        if path.name not in current:
            path.unlink(missing_ok=True)


def write_problem(folder: Path, error: Exception) -> str:
    """One line for a checkpoint that could not be written."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "no space left on the disk" if full else str(error)
    kept = "the former checkpoint is intact" if (folder / STATE_FILE).is_file() else "none is there"
    return f"cannot write checkpoint {folder}: {reason}; {kept}"


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        DataError: there is none, or it is damaged or of another version.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise DataError(f"no checkpoint at {folder} (no {STATE_FILE} in it)")
    try:
        state = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise DataError(f"checkpoint {path} is damaged: {error}") from None
    if not isinstance(state, dict):
        raise DataError(f"checkpoint {path} is damaged: expected keys, found {state!r:.40}")
    if state.get("format") != FORMAT:
        raise DataError(
            f"checkpoint {path} has format {state.get('format')!r}; this version reads {FORMAT}"
        )
    if not isinstance(state.get("files"), dict):
        raise DataError(f"checkpoint {path} is damaged: it names no files")
    return state


def read_arrays(folder: Path, state: Mapping[str, Any], stem: str) -> dict[str, torch.Tensor]:
    """The tensors of one file of a checkpoint, on the CPU."""
    if stem not in state["files"]:
        raise DataError(f"checkpoint {folder} has no {stem}; it has {sorted(state['files'])}")
    path = folder / state["files"][stem]
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"checkpoint file {path} cannot be read: {error}") from None


@contextmanager
def unpacking(folder: Path) -> Iterator[None]:
    """Within the block, what is not as `save_checkpoint` was given it is a DataError."""
    try:
        yield
    except (DataError, UsageError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"checkpoint {folder} is damaged: {type(error).__name__}: {text}"
        ) from error


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load every tensor of a module, or say in one line what does not fit.

    Raises:
        DataError: names or shapes differ.
    """
    own = module.state_dict()
    differing = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    differing += [f"{name} is missing" for name in own if name not in weights]
    differing += [f"{name} is unknown" for name in weights if name not in own]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise DataError(f"{source} does not fit the student: {'; '.join(differing[:3])}{more}")
    module.load_state_dict(dict(weights))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """Split `optimizer.state_dict()` into tensors and a JSON-able structure."""
    packed = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in packed["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    groups = [
        {key: as_plain(value) for key, value in group.items()} for group in packed["param_groups"]
    ]
    return tensors, {"groups": groups, "scalars": scalars}


def as_plain(value: Any) -> Any:
    """A value of a parameter group as JSON can hold it."""
    return value.item() if isinstance(value, torch.Tensor) else value


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], structure: Mapping
) -> None:
    """Restore what `pack_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **structure["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    own = optimizer.state_dict()["param_groups"]
    saved = structure["groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
        raise DataError("the checkpoint's optimizer has other parameter groups than this run")
    groups = [
        {**group, **{key: as_before(key, value) for key, value in kept.items()}}
        for group, kept in zip(own, saved, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # Files hold contiguous tensors; a fused update walks through the memory of a parameter and of
    # its moments side by side, so these must lie as the parameter does (channels last, say).
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def as_before(key: str, value: Any) -> Any:
    """JSON turns tuples into lists; AdamW's betas are a tuple."""
    return tuple(value) if key == "betas" else value


def pack_rng() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of all random generators of this process: tensors, and a JSON-able rest."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    rest = {
        "python": random.getstate(),
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
    }
    return tensors, rest


def unpack_rng(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Restore what `pack_rng` took; generators of GPUs that are not here are skipped."""
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    name, position, has_gauss, gauss = rest["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    version, internal, gauss_next = rest["python"]
    random.setstate((version, tuple(internal), gauss_next))
