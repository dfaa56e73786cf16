"""A raster several times larger than the memory that preparing it may take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from rasterio.transform import from_origin
from rasterio.windows import Window
from toy_rasters import POLYGONS, raster_spec, rectangle, write_geojson

from co2s_fast.data.writing import write_text

SIDE, TILE = 8192, 1024
ALLOWED = 120 << 20  # beyond the imports; the raster is 512 MiB, its mask would be 64 MiB

_CHILD = """
import sys
from pathlib import Path
from co2s_fast.data import load_dataset, prepare_dataset
from co2s_fast.data import burn, raw, statistics, split_maker  # noqa: F401 - loaded before counting
import fiona, rasterio.features, rasterio.warp

root = Path(sys.argv[1])
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
prepare_dataset(load_dataset(root / "toy.yaml"), root / "raw", root / "out", progress=False)
print(status("VmHWM") - before)
"""


def write_large(path: Path) -> None:
    """4 bands of uint16, tiled; most blocks are missing from the file, which GDAL reads as 0."""
    path.parent.mkdir(parents=True)
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 4, "height": SIDE, "width": SIDE,
               "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate",
               "zlevel": 1, "photometric": "MINISBLACK", "crs": "EPSG:32640",
               "transform": from_origin(400_000, 2_700_000, 10, 10), "sparse_ok": True}
    block = np.random.default_rng(0).integers(1, 5000, (4, 256, 256), np.uint16)
    with rasterio.open(path, "w", **profile) as target:
        for at in range(0, SIDE, 256):
            target.write(block, window=Window(at, at, 256, 256))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_memory_does_not_grow_with_the_raster(tmp_path):
    write_large(tmp_path / "raw/images/a.tif")
    write_geojson(tmp_path / "raw/polygons/a.geojson",
                  [(rectangle((0, SIDE), (0, SIDE)), {"class": "sea"})])
    spec = raster_spec(**POLYGONS, bands=4, tile={"size": TILE}, val=0.5)
    content = spec.model_dump(mode="json", exclude_defaults=True)
    write_text(tmp_path / "toy.yaml", yaml.safe_dump(content))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GDAL_CACHEMAX": "32",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True,
                          text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out/images").iterdir())) == (SIDE // TILE) ** 2
    assert int(done.stdout) < ALLOWED, f"{int(done.stdout) >> 20} MiB"
