from __future__ import annotations

from pathlib import Path

import pytest
from invented import make_run

from co2s_fast.report import write_report


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return make_run(tmp_path / "demo-8-co2s")


@pytest.fixture(scope="session")
def reported(tmp_path_factory) -> Path:
    """A complete run whose report has been written; tests only read it."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo-8-co2s")
    write_report(folder)
    return folder
