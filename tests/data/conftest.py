"""Small datasets that the tests of the data room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from co2s_fast.data import DataConfig, DatasetSpec, generate_demo, load_dataset


@pytest.fixture(scope="session")
def demo_spec() -> DatasetSpec:
    return load_dataset("demo").model_copy(update={"val": ["scene1[2-5]"]})


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory, demo_spec) -> Path:
    """Sixteen scenes of the demo dataset: 48 training and 16 validation tiles."""
    root = tmp_path_factory.mktemp("data") / "demo"
    return generate_demo(root, demo_spec, scenes=16, progress=False)


@pytest.fixture
def demo_config(demo_root) -> DataConfig:
    return DataConfig(root=demo_root, ratio="1/4", batch_size=4, workers=0)
