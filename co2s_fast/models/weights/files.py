"""Files of weights: written, read without executing anything in them, loaded whole or not."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from co2s_fast.errors import DataError

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
OWN_BACKBONE = {"format": "co2s-fast backbone"}
"""Metadata of a safetensors file that holds a whole backbone under this package's own names."""

PRETRAINED = "pretrain.json"
"""Beside such files: what they come from, and their checksums."""

WRAPPERS = ("teacher", "model", "state_dict", "state", "module")
"""Keys under which releases put the state dict; of a teacher and a student, the teacher."""


# Settings that training scripts store beside the tensors, as objects of classes that are not even
# installed here. torch's safe unpickler makes plain dictionaries of them, which nobody looks at.
INERT = ("argparse.Namespace", "yacs.config.CfgNode")


def is_file_name(weights: str) -> bool:
    """Whether `weights` names a checkpoint file rather than a name or a pretrained tag."""
    return weights.endswith(SUFFIXES) or os.sep in weights


def save_tensors(path: Path, tensors: State, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that those may read who may read other new files.

    Not atomic: give the temporary name that is renamed later.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors writes for the owner alone
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(mode)


def read_state_dict(path: str | Path) -> State:
    """A flat state dict from a safetensors file or a torch file, without unpickling objects.

    Nesting under one of `WRAPPERS` and the prefix `module.` are taken away.

    Raises:
        DataError: missing, unreadable, a TorchScript archive, or not a dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights {path}: no such file")
    state = _read(path)
    for _ in range(2):  # a wrapper may hold another, never more
        for key in WRAPPERS:
            if isinstance(state, dict) and isinstance(state.get(key), dict) and state[key]:
                state = state[key]
                break
    if not isinstance(state, dict) or not state:
        raise DataError(f"weights {path}: expected a dictionary of tensors, found {type(state)}")
    if not all(isinstance(key, str) for key in state):
        raise DataError(f"weights {path}: entries without names, like those of an optimizer's "
                        "state; expected a dictionary of tensors by name")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise DataError(f"weights {path}: entries that are no tensors: {other[:5]}")
    return state


def _read(path: Path) -> Any:
    if is_torchscript(path):
        raise DataError(f"weights {path}: {torchscript_hint(path)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([(OrderedDict, name) for name in INERT]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any of torch's, pickle's, zip's or safetensors' own errors
        raise DataError(f"weights {path}: cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message recommends to run it
        found = re.search(r"Unsupported (?:global|class|operand|operator)[^:]*: (?:GLOBAL )?(\S+)",
                          str(error))
        what = f"an object of {found[1]}" if found else "something other than tensors"
        return f"it holds {what}, which would have to be run, or it is damaged"
    return str(error).strip().split("\n")[0] or type(error).__name__


def is_torchscript(path: Path) -> bool:
    """Whether a zip file is a TorchScript archive, which has code in it."""
    if path.suffix == ".safetensors" or not is_zipfile(path):
        return False
    try:
        with ZipFile(path) as archive:
            return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
    except (BadZipFile, OSError):
        return False  # reading it says what is wrong


def torchscript_hint(path: Path) -> str:
    """What to do with a TorchScript archive."""
    return (
        "a TorchScript archive, which holds code and is not run here; where you trust it, make a "
        f"plain file of it: python -c \"import torch; torch.save(torch.jit.load('{path.name}', "
        f"map_location='cpu').state_dict(), '{path.stem}-state.pt')\", and import that"
    )


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for other files and for damaged ones."""
    from safetensors import safe_open

    if not str(path).endswith(".safetensors") or not Path(path).is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}  # reading the tensors says what is wrong


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_sha256(state: State) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def mismatches(own: State, state: State) -> str:
    """Every missing and unexpected key and every other shape, as one line; "" where all fit."""
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "other shapes": shapes,
    }
    return "; ".join(f"{k}: {len(v)}, {', '.join(v)}" for k, v in problems.items() if v)


def load_strictly(module: nn.Module, state: State, path: str | Path) -> None:
    """`load_state_dict` whose failure names the file and every key that is wrong.

    Raises:
        DataError: missing or unexpected keys, or other shapes.
    """
    told = mismatches(module.state_dict(), state)
    if told:
        raise DataError(f"weights {path} do not fit {type(module).__name__}: {told}")
    module.load_state_dict(state)
