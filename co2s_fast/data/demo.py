"""The demo dataset: generated scenes that need shape and texture, not colour alone.

Every scene draws its own land cover, illumination, colour cast, haze and season, and the colours
of the classes overlap on purpose: ripe fields look like bare soil, meadows like woods, roofs like
roads, cloud shadow like water. What tells them apart is what tells them apart in an orthophoto:
rows, crowns, smoothness, outline and cast shadow.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from tqdm import tqdm

from co2s_fast.data.catalogue import IGNORE, DatasetSpec, load_dataset
from co2s_fast.data.files import save_image, save_label, write_description
from co2s_fast.errors import DataError

FIELD, WOODS, WATER, ROAD, ROOF, SOIL = range(6)
SCENES, SIDE, TILE = 80, 256, 128

# Colour families per class, RGB in [0, 1]; each parcel, river or house draws one and varies it.
_COLORS = {
    FIELD: [(0.36, 0.43, 0.24), (0.52, 0.50, 0.30), (0.58, 0.49, 0.34), (0.30, 0.40, 0.22),
            (0.46, 0.40, 0.31)],
    WOODS: [(0.25, 0.33, 0.20), (0.31, 0.38, 0.23), (0.38, 0.37, 0.24), (0.22, 0.28, 0.20)],
    WATER: [(0.22, 0.29, 0.33), (0.27, 0.34, 0.33), (0.36, 0.38, 0.33), (0.20, 0.27, 0.27)],
    ROAD: [(0.47, 0.47, 0.46), (0.56, 0.53, 0.48), (0.36, 0.36, 0.37), (0.55, 0.47, 0.38)],
    ROOF: [(0.55, 0.38, 0.32), (0.50, 0.50, 0.50), (0.64, 0.61, 0.57), (0.40, 0.34, 0.31),
           (0.37, 0.39, 0.42)],
    SOIL: [(0.54, 0.46, 0.36), (0.47, 0.41, 0.34), (0.61, 0.55, 0.45), (0.42, 0.39, 0.30)],
}


@dataclass
class _Scene:
    """A scene while it is drawn: colours, classes, and the height that casts shadows."""

    rng: np.random.Generator
    image: NDArray[np.float32]  # [S, S, 3]
    label: NDArray[np.uint8]  # [S, S]
    height: NDArray[np.float32]  # [S, S], pixels

    @property
    def side(self) -> int:
        return self.label.shape[0]

    def color(self, kind: int) -> NDArray[np.float32]:
        base = np.array(_COLORS[kind][self.rng.integers(len(_COLORS[kind]))], np.float32)
        return base * self.rng.uniform(0.85, 1.15) + self.rng.normal(0, 0.013, 3).astype(np.float32)


def _noise(rng: np.random.Generator, side: int, sigma: float) -> NDArray[np.float32]:
    """Smooth noise of unit spread; drawn coarse and enlarged where it is smooth anyway."""
    step = max(int(sigma / 2), 1)
    small = rng.standard_normal((-(-side // step),) * 2, np.float32)
    small = ndimage.gaussian_filter(small, sigma / step, mode="wrap", truncate=3)
    small = (small - small.mean()) / max(float(small.std()), 1e-6)
    if step == 1:
        return small
    return np.array(Image.fromarray(small).resize((side, side), Image.Resampling.BILINEAR))


def _parcels(scene: _Scene) -> NDArray[np.intp]:
    """Parcels: a Voronoi diagram with bent borders; each gets a class, a colour and a texture."""
    rng, side = scene.rng, scene.side
    count = int(rng.integers(9, 18))
    centres = rng.uniform(-20, side + 20, (count, 2))
    bend = np.stack([_noise(rng, side, 14), _noise(rng, side, 14)], -1) * rng.uniform(2, 7)
    grid = np.stack(np.mgrid[:side, :side], -1).astype(np.float32)
    parcel = cKDTree(centres).query(grid + bend)[1].reshape(side, side)
    kinds = rng.choice([FIELD, WOODS, SOIL, ROOF], count, p=[0.44, 0.24, 0.14, 0.18])
    rows, speckle, crowns = _textures(scene, parcel, count)
    colors = np.stack([scene.color(SOIL if k == ROOF else int(k)) for k in kinds])
    gardens = rng.random(count) < 0.6
    for i in np.flatnonzero((kinds == ROOF) & gardens):
        colors[i] = scene.color(FIELD)
    kind = kinds[parcel]
    texture = np.select([kind == FIELD, kind == WOODS], [rows, crowns], speckle)
    scene.image[:] = colors[parcel] * (1 + texture[..., None])
    # Built-up parcels are open ground between their houses, soil or garden.
    ground = np.where(kinds == ROOF, np.where(gardens, FIELD, SOIL), kinds)
    scene.label[:] = ground[parcel]
    scene.height[:] = np.where(scene.label == WOODS, 3 + 14 * np.maximum(crowns, -0.1), 0)
    return np.where(kinds == ROOF, np.arange(count), -1)[parcel]


def _textures(scene: _Scene, parcel: NDArray[np.intp], count: int) -> tuple[NDArray, ...]:
    rng, side = scene.rng, scene.side
    angle = rng.uniform(0, np.pi, count)
    frequency = 2 * np.pi / rng.uniform(3.5, 9, count)
    strength = rng.uniform(0.05, 0.16, count)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    phase = (np.cos(angle)[parcel] * x + np.sin(angle)[parcel] * y) * frequency[parcel]
    rows = strength[parcel] * np.sin(phase + 0.6 * _noise(rng, side, 8))
    rows += 0.03 * _noise(rng, side, 9)
    fine = rng.standard_normal((side, side), np.float32)
    speckle = 0.05 * fine + 0.06 * _noise(rng, side, 1.2) + 0.05 * _noise(rng, side, 12)
    crowns = 0.17 * _noise(rng, side, float(rng.uniform(1.6, 2.6))) + 0.05 * fine
    return rows, speckle, crowns


def _water(scene: _Scene) -> None:
    """Lakes where slow noise is low, and in most scenes a river along a bent line."""
    rng, side = scene.rng, scene.side
    mask = _noise(rng, side, 30) < -rng.uniform(1.4, 2.4)
    if rng.random() < 0.45:
        mask |= np.abs(_bent_line(scene, 25)) < rng.uniform(7, 16) + 3 * _noise(rng, side, 30)
    ripple = 0.02 * _noise(rng, side, 3) + 0.05 * _noise(rng, side, 40)
    _paint(scene, mask, WATER, scene.color(WATER) * (1 + ripple[..., None]))


def _bent_line(scene: _Scene, bend: float) -> NDArray[np.float32]:
    """Signed distance (about) from a line of random direction, bent by slow noise."""
    rng, side = scene.rng, scene.side
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35) * side
    y, x = np.mgrid[:side, :side].astype(np.float32) - side / 2
    return np.cos(angle) * x + np.sin(angle) * y - offset + bend * _noise(rng, side, 45)


def _roads(scene: _Scene) -> None:
    """Roads cross everything (bridges included); some have a centre line, some are dirt tracks."""
    rng = scene.rng
    for _ in range(int(rng.integers(1, 4))):
        distance = np.abs(_bent_line(scene, float(rng.uniform(0, 12))))
        half = rng.uniform(2.2, 5.5)
        color = scene.color(ROAD) * (1 + 0.02 * rng.standard_normal((scene.side,) * 2)[..., None])
        if half > 3.5 and rng.random() < 0.6:
            color = np.where((distance < 0.6)[..., None], color + 0.16, color)
        _paint(scene, distance < half, ROAD, color)


def _houses(scene: _Scene, blocks: NDArray[np.intp]) -> None:
    """Rectangular roofs in rows, one direction a block; pitched ones are darker on one side."""
    sun = scene.rng.uniform(0, 2 * np.pi)
    for number, where in enumerate(ndimage.find_objects(blocks + 1), 0):
        if where is not None:
            _block(scene, blocks[where] == number, where, sun)


def _block(scene: _Scene, inside: NDArray[np.bool_], where: tuple[slice, slice],
           sun: float) -> None:
    rng = scene.rng
    y, x = np.mgrid[where].astype(np.float32)
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(26, 44)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    column, row = np.floor(along / pitch).astype(int), np.floor(across / pitch).astype(int)
    lot = column - column.min(), row - row.min()
    lots = lot[0].max() + 1, lot[1].max() + 1
    half = rng.uniform(0.2, 0.38, (2, *lots)) * pitch
    built, pitched = (rng.random((2, *lots)) < [[[0.85]], [[0.7]]])
    colors = np.stack([scene.color(ROOF) for _ in range(12)])[rng.integers(12, size=lots)]
    u, v = along % pitch - pitch / 2, across % pitch - pitch / 2
    roof = inside & built[lot] & (np.abs(u) < half[0][lot]) & (np.abs(v) < half[1][lot])
    roof &= np.isin(scene.label[where], (FIELD, SOIL))
    slope = rng.uniform(0.06, 0.2) * np.cos(angle + np.pi / 2 - sun)
    shade = 1 + slope * np.sign(v) * pitched[lot]
    scene.image[where][roof] = (colors[lot] * shade[..., None])[roof]
    scene.label[where][roof] = ROOF
    scene.height[where][roof] = rng.uniform(4, 9)


def _paint(scene: _Scene, mask: NDArray[np.bool_], kind: int, color: NDArray) -> None:
    scene.image[mask] = color[mask]
    scene.label[mask] = kind
    scene.height[mask] = 0


def _shadows(scene: _Scene) -> NDArray[np.float32]:
    """Share of sunlight: pixels that something higher stands before, towards the sun, are dark."""
    angle = scene.rng.uniform(0, 2 * np.pi)
    length = scene.rng.uniform(0.6, 1.3)
    shade = np.zeros_like(scene.height)
    for step in range(1, 10):
        move = (round(step * np.sin(angle)), round(step * np.cos(angle)))
        caster = np.roll(scene.height, move, (0, 1)) - step / length
        shade = np.maximum(shade, (caster > scene.height).astype(np.float32))
    return 1 - 0.5 * ndimage.gaussian_filter(shade, 0.6)


def _atmosphere(scene: _Scene) -> NDArray[np.float32]:
    """Shadows, clouds and their shadows, haze, colour cast, gamma, blur and sensor noise."""
    rng, side = scene.rng, scene.side
    light = _shadows(scene) * (1 + 0.06 * _noise(rng, side, 60))
    cloud = np.clip(_noise(rng, side, 38) + 0.25 * _noise(rng, side, 8) - rng.uniform(1.1, 2.6),
                    0, 1.2) / 1.2
    shift = (int(rng.integers(25, 60)), int(rng.integers(-40, 40)))
    light = light * (1 - 0.55 * np.roll(cloud, shift, (0, 1)))
    image = scene.image * light[..., None]
    image = image * rng.uniform(0.95, 1.06, 3) * rng.uniform(0.88, 1.15)
    image = image + rng.uniform(-0.03, 0.05, 3)
    image = image + cloud[..., None] * (0.92 - image)
    image = np.clip(image, 0, 1) ** rng.uniform(0.88, 1.15)
    haze = rng.uniform(0, 0.12)
    blur = rng.uniform(0.3, 0.8)
    image = ndimage.gaussian_filter(image * (1 - haze) + haze * 0.7, (blur, blur, 0), truncate=3)
    image += rng.uniform(0.008, 0.025) * rng.standard_normal(image.shape, np.float32)
    scene.label[cloud > 0.75] = IGNORE
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def demo_scene(seed: int, number: int, side: int = SIDE) -> tuple[NDArray, NDArray]:
    """One scene: image uint8 [side, side, 3], label uint8 [side, side], 255 under thick cloud."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number))))
    scene = _Scene(rng, np.zeros((side, side, 3), np.float32), np.zeros((side, side), np.uint8),
                   np.zeros((side, side), np.float32))
    blocks = _parcels(scene)
    _water(scene)
    _roads(scene)
    _houses(scene, blocks)
    return _atmosphere(scene), scene.label


def generate_demo(root: Path, spec: DatasetSpec | None = None, *, seed: int = 0,
                  scenes: int = SCENES, progress: bool = True) -> Path:
    """Write the demo dataset to `root`, in the layout of a prepared one, and return `root`.

    80 scenes of 256 x 256 become 320 tiles of 128 x 128; the last 16 scenes are for validation.
    The same seed gives the same files. Written beside `root` and renamed when complete; where
    another process does the same and is quicker, its files are left.

    Raises:
        DataError: `root` is there and not an empty folder.
    """
    spec = spec or load_dataset("demo")
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.exists() and any(root.iterdir() if root.is_dir() else [root]):
        raise DataError(
            f"{root}: expected no such folder, or an empty one, to generate {spec.name} in"
        )
    temporary = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        _write_scenes(temporary, spec, seed, scenes, progress)
        _rename(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _write_scenes(folder: Path, spec: DatasetSpec, seed: int, scenes: int, progress: bool) -> None:
    bar = tqdm(range(scenes), desc=f"generating the {spec.name} dataset", unit="scene",
               disable=not progress)
    for number in bar:
        image, label = demo_scene(seed, number)
        for y in range(0, SIDE, TILE):
            for x in range(0, SIDE, TILE):
                part, name = np.s_[y : y + TILE, x : x + TILE], f"scene{number:02d}_{y}_{x}.png"
                save_image(folder / "images" / name, image[part])
                save_label(folder / "labels" / name, label[part], spec.palette)
    write_description(folder, spec)


def _rename(temporary: Path, root: Path) -> None:
    """`temporary` becomes `root`, unless another process made that meanwhile."""
    try:
        if root.is_dir():
            root.rmdir()  # an empty one
        temporary.rename(root)
    except OSError:
        if not (root / "images").is_dir():
            raise

