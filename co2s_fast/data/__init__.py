"""Datasets: the catalogue, preparation, splits and the input pipelines.

Names are loaded on first use, so that the catalogue can be read without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ClassSpec": "catalogue",
    "DatasetSpec": "catalogue",
    "dataset_names": "catalogue",
    "load_dataset": "catalogue",
    "DataConfig": "config",
    "Item": "files",
    "load_image": "files",
    "load_label": "files",
    "Split": "splits",
    "open_dataset": "splits",
    "open_split": "splits",
    "find_root": "splits",
    "read_split": "splits",
    "split_dataset": "split_maker",
    "describe_catalogue": "listing",
    "describe_folder": "describe",
    "prepare_dataset": "prepare",
    "check_dataset": "check",
    "check_split": "check",
    "generate_demo": "demo",
    "Batch": "batch",
    "build_loader": "loader",
    "choose_loader": "loader",
    "steps_per_epoch": "plan",
    "val_dataset": "validation",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
