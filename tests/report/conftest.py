from __future__ import annotations

from pathlib import Path

import pytest
from invented import make_run


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return make_run(tmp_path / "demo-8-co2s")
