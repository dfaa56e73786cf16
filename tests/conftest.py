"""Fixtures shared by all rooms: reference data that may or may not be on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if PROCESSES > 1:  # they share the cores, and so do the processes that tests start
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max((cores or 1) // PROCESSES, 1)))
    torch.set_num_threads(int(threads))

if not torch.cuda.is_available():  # before anything imports triton, which reads it only then
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with golden outputs, real imagery and split lists (`CO2S_TEST_DATA`, or ../shared)."""
    folder = Path(os.environ.get("CO2S_TEST_DATA", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set CO2S_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def golden(shared_dir: Path):
    """A function that opens a golden .npz file by name, or skips the test where it is missing."""

    def load(name: str) -> np.lib.npyio.NpzFile:
        path = shared_dir / "golden" / name
        if not path.is_file():
            pytest.skip(f"golden file {path} is not here")
        return np.load(path, allow_pickle=False)

    return load


@pytest.fixture
def no_room():
    """A context manager in which no file grows beyond some bytes, as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
