"""The DALI graph's parts on the CPU: colours, formats, distributions in its output, placement."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from toy_data import ramps, two_classes

from co2s_fast.data import DataConfig, Item, Split, build_loader, load_image
from co2s_fast.data.draws import UNLABELED, Colour, draw_colour, generator
from co2s_fast.data.plan import Plan
from co2s_fast.data.transforms import strong_view
from co2s_fast.errors import DataError

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'co2s-fast[dali]'")
from nvidia.dali import backend, fn, pipeline_def

from co2s_fast.data.dali import colour as dali_colour
from co2s_fast.data.dali.graph import build_pipeline, decode, graph_inputs, graph_outputs
from co2s_fast.data.dali.source import colour_arrays, encoded_image

ALL = {"x", "w", "s1", "s2"}


def picture(height=80, width=100, seed=0):
    """Smooth colours with noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


@pipeline_def(enable_conditionals=True)
def coloured(images, numbers):
    names = list(colour_arrays(Colour()))
    nodes = fn.external_source(source=lambda: numbers, num_outputs=len(names), batch=True)
    image = fn.external_source(source=lambda: images, batch=True, layout="HWC")
    return dali_colour.strong_view(image, dict(zip(names, nodes)))  # noqa: B905 - DALI's zip


def dali_views(images, colours):
    """Strong views by the graph's own functions, [N, 3, H, W]."""
    arrays = [colour_arrays(colour) for colour in colours]
    numbers = tuple([a[name] for a in arrays] for name in arrays[0])
    pipeline = coloured(images, numbers, batch_size=len(images), num_threads=1, device_id=None)
    (views,) = pipeline.run()
    return np.stack([np.array(view) for view in views]).transpose(0, 3, 1, 2)


# DALI rounds after each part, the torch pipeline once; a later contrast, brightness or saturation
# of up to 1.5 enlarges half a level, and so does hue where colours are dull.
BOUNDS = [
    (Colour((0, 1, 2, 3), brightness=1.4), 1),
    (Colour((0, 1, 2, 3), contrast=0.6), 1),
    (Colour((0, 1, 2, 3), contrast=1.5), 2),
    (Colour((0, 1, 2, 3), saturation=1.45), 2),
    (Colour((0, 1, 2, 3), hue=0.2), 1),
    (Colour((3, 0, 1, 2), hue=-0.25), 1),
    (Colour((3, 2, 1, 0), 0.7, 1.3, 0.6, -0.2), 6),
    (Colour((1, 3, 0, 2), 1.45, 0.55, 1.4, 0.24), 6),
    (Colour((2, 0, 3, 1), 1.2, 0.9, 1.3, 0.1, gray=True), 6),
    (Colour(gray=True), 1),
    (Colour(), 0),
]


def test_each_part_means_what_it_means_in_the_torch_pipeline():
    image = picture()
    views = dali_views([image] * len(BOUNDS), [colour for colour, _ in BOUNDS])
    for view, (colour, bound) in zip(views, BOUNDS, strict=True):
        expected = strong_view(image.transpose(2, 0, 1), colour).astype(int)
        assert np.abs(view - expected).max() <= bound, colour


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.3, 2.0])
def test_blur_differs_at_the_border_only(sigma):
    """DALI mirrors the image at its edge, Pillow and the torch pipeline repeat the edge."""
    image = picture()
    (view,) = dali_views([image], [Colour(sigma=sigma)])
    expected = strong_view(image.transpose(2, 0, 1), Colour(sigma=sigma)).astype(int)
    margin = int(np.ceil(3 * sigma))
    inside = (slice(None), slice(margin, -margin), slice(margin, -margin))
    assert np.abs(view - expected)[inside].max() <= 2
    assert np.abs(view - expected).mean() < 1


def test_random_colours_of_different_images_in_one_batch():
    """Each image gets its own numbers: the batch is split and merged by the graph's conditions."""
    images = [picture(seed=i) for i in range(48)]
    colours = [draw_colour(generator(9, i, 0, UNLABELED)) for i in range(48)]
    differences = []
    for view, image, colour in zip(dali_views(images, colours), images, colours, strict=True):
        expected = strong_view(image.transpose(2, 0, 1), colour).astype(int)
        difference = np.abs(view - expected)
        assert difference.mean() < 1.2, colour
        assert (difference[:, 6:-6, 6:-6] > 8).mean() < 1e-3, colour
        differences.append(difference.mean())
    assert np.mean(differences) < 0.5


def test_numbers_of_a_colour():
    numbers = colour_arrays(Colour((1, 3, 2, 0), 1.1, 0.8, 1.3, 0.25, gray=True, sigma=1.5))
    assert numbers["parts"].tolist() == [1, -1, -1, 2, 0, -1]
    np.testing.assert_allclose(numbers["factors"], [0.8, 1, 1, 1.3, 1.1, 1], rtol=1e-6)
    assert numbers["turns"] and numbers["gray"] and numbers["blurred"]
    np.testing.assert_allclose(numbers["places"], [4.5, 0.5, 2.5])
    nothing = colour_arrays(Colour())
    assert set(nothing["parts"].tolist()) == {-1} and nothing["sigma"] > 0
    assert not (nothing["turns"] or nothing["gray"] or nothing["blurred"])


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One picture in every form that `load_image` takes."""
    folder = tmp_path_factory.mktemp("formats")
    image = Image.fromarray(picture(70, 90))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    return {
        "png": saved(folder / "rgb.png", image),
        "interlaced png": saved(folder / "gray.png", image.convert("L")),
        "palette png": saved(folder / "palette.png", image.quantize(64)),
        "png with alpha": saved(folder / "alpha.png", image.convert("RGBA")),
        "jpeg": saved(folder / "rgb.jpg", image, quality=90),
        "jpeg 4:2:0": saved(folder / "chroma.jpg", image, quality=75, subsampling=2),
        "progressive jpeg": saved(folder / "progressive.jpg", image, progressive=True),
        "gray jpeg": saved(folder / "gray.jpg", image.convert("L")),
        "cmyk jpeg": saved(folder / "cmyk.jpg", image.convert("CMYK")),
        "turned jpeg": saved(folder / "turned.jpg", image, exif=turned),
        "tiff": saved(folder / "rgb.tif", image),
        "lzw tiff": saved(folder / "lzw.tif", image, compression="tiff_lzw"),
        "bmp": saved(folder / "rgb.bmp", image),
        "jpeg with a tail": tail(saved(folder / "tail.jpg", image)),
    }


def tail(path):
    path.write_bytes(path.read_bytes() + b"what a camera appends")
    return path


def test_every_format_decodes_to_what_the_torch_pipeline_reads(files):
    encoded = [encoded_image(path) for path in files.values()]

    @pipeline_def
    def decoded():
        return decode(fn.external_source(source=lambda: [e for e, _ in encoded]), on_gpu=False)

    (images,) = decoded(batch_size=len(files), num_threads=1, device_id=None).run()
    for (kind, path), (_, size), image in zip(files.items(), encoded, images, strict=True):
        expected, found = load_image(path).astype(int), np.array(image)
        assert found.shape == expected.shape and size == expected.shape[:2], kind
        # Both decode by libjpeg-turbo, but not by the same build.
        bound = 2 if "jpeg" in kind and "cmyk" not in kind and "tail" not in kind else 0
        assert np.abs(found - expected).max() <= bound, kind


def test_what_the_torch_pipeline_refuses_is_refused(tmp_path):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    with pytest.raises(DataError, match=r"deep.png: mode I;16"):
        encoded_image(deep)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"text.png: damaged or not an image"):
        encoded_image(tmp_path / "text.png")
    cut = io.BytesIO()
    Image.fromarray(picture()).save(cut, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(cut.getvalue()[:-400])
    with pytest.raises(DataError, match=r"cut.jpg: damaged"):
        encoded_image(tmp_path / "cut.jpg")


BATCH, STEPS = 50, 60
TRIALS = BATCH * STEPS
# Four standard errors of a frequency near one half, over all trials.
FREQUENCY = 4 * 0.5 / np.sqrt(TRIALS)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the graph made of coordinate tiles: small crops, many of them."""
    folder = tmp_path_factory.mktemp("colourful")
    spec = two_classes(crop=32)
    y, x = np.mgrid[:100, :100]
    # Red counts columns, blue rows, both linearly; green is noise that jitter and blur change.
    noise = np.random.default_rng(0).integers(0, 256, (100, 100))
    path = folder / "tile.png"
    Image.fromarray(np.stack([2 * x + 20, noise, 2 * y + 20], -1).astype(np.uint8)).save(path)
    label = folder / "label.png"
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(label)
    items = [Item("tile", path, label)] * BATCH
    config = DataConfig(crop=32, scale=(400, 100), scale_range=(0.5, 2), batch_size=BATCH,
                        loader="dali", workers=1, truth=False)
    loader = build_loader(config, spec, Split(items, items, []), views=ALL, seed=11, start_step=0,
                          total_steps=STEPS)
    batches = list(loader)
    return {name: torch.cat([getattr(batch, name) for batch in batches])
            for name in (*ALL, "boxes1", "boxes2", "ignore")}


@pytest.mark.slow
def test_geometry_in_the_output_follows_the_specification(output):
    """Scale, place and flip are read off the coordinates that the crops show."""
    for view in ("x", "w"):
        red = output[view][:, 0].float().numpy()
        blue = output[view][:, 2].float().numpy()
        inside = slice(4, 28)  # away from where bilinear meets the source's edge
        slope = np.polyfit(np.arange(4, 28), red[:, 16, inside].T, 1)[0] / 2
        assert abs((slope < 0).mean() - 0.5) < FREQUENCY
        scale = 1 / np.abs(slope)
        assert kstest((scale - 0.5) / 1.5, "uniform").pvalue > 1e-4
        down = 1 / (np.polyfit(np.arange(4, 28), blue[:, inside, 16].T, 1)[0] / 2)
        assert np.abs(scale / down - 1).max() < 0.08  # one scale both ways, read off whole levels
        # The middle of the crop, in source pixels; the crop lies anywhere in the scaled image.
        for middle in ((red[:, 16, 15:17].mean(1) - 20) / 2, (blue[:, 15:17, 16].mean(1) - 20) / 2):
            half = 16 / scale
            place = (middle + 0.5 - half) / (100 - 2 * half)
            assert kstest(place, "uniform").pvalue > 1e-4
    assert (output["ignore"] == 0).all()


@pytest.mark.slow
def test_colours_and_boxes_in_the_output_follow_the_specification(output):
    weak = output["w"]
    changed = {}
    for number, view in ((1, "s1"), (2, "s2")):
        strong = output[view]
        gray = ((strong[:, 0] == strong[:, 1]) & (strong[:, 1] == strong[:, 2])).flatten(1).all(1)
        assert abs(gray.float().mean() - 0.2) < FREQUENCY
        same = (strong == weak).flatten(1).all(1)
        # Neither jitter nor grey nor blur; a blur of less than about 0.27 pixels leaves 8 bits.
        unseen = (0.27 - 0.1) / 1.9
        expected = 0.2 * 0.8 * (0.5 + 0.5 * unseen)
        assert abs(same.float().mean() - expected) < FREQUENCY
        changed[view] = same
        boxes = output[f"boxes{number}"]
        present = boxes[:, 2] > boxes[:, 0]
        assert abs(present.float().mean() - 0.5) < FREQUENCY
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[present] / 32**2
        assert 0.01 < area.min() and area.max() <= 0.4
    both = (changed["s1"] & changed["s2"]).float().mean()
    assert both < 0.03  # independent: 0.09 squared


def test_the_gpu_placement_is_the_same_graph(tmp_path):
    """It cannot run here; that it is defined, with every operator where DALI has it, can be seen.

    Whatever needs images is on the GPU, encoded images are decoded by the mixed operator.
    """
    spec, items = ramps(tmp_path, 4)
    plan = Plan(DataConfig(crop=32, batch_size=2), spec, Split(items, items, []), ALL, 0)

    def source():
        return ()

    found = {}
    for gpu in (None, 0):
        pipeline = build_pipeline(plan, source, threads=1, gpu=gpu)
        pipeline._build_graph()
        found[gpu] = [text_of(op.spec) for op in pipeline._ops]
        devices = {node.device for node in pipeline._graph_outputs}
        assert devices == {"cpu" if gpu is None else "gpu"}
    assert {name for name, _ in found[None]} == {name for name, _ in found[0]} - {"Copy"}
    exist = {"cpu": backend.RegisteredCPUOps(), "gpu": backend.RegisteredGPUOps(),
             "mixed": backend.RegisteredMixedOps()}
    assert all(name in exist[device] for name, device in found[0])
    on_gpu = {name for name, device in found[0] if device != "cpu"}
    assert {"Resize", "GaussianBlur", "BrightnessContrast", "ColorSpaceConversion"} <= on_gpu
    assert ("decoders__Image", "mixed") in {(n, d) for n, d in found[0]}
    assert graph_outputs(plan)[:2] == ["x", "y"] and "u_image" in graph_inputs(plan)


def text_of(spec):
    """Name and device of an operator, from the text form of its specification."""
    lines = str(spec).splitlines()
    name = lines[0].removeprefix("OpSpec for ").rstrip(":")
    given = dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    return name, given["device"]


def test_transparent_pixels_are_ignored_as_in_the_torch_pipeline(tmp_path):
    items = []
    for number in range(2):
        pixels = np.dstack([picture(48, 48, number), np.full((48, 48), 255, np.uint8)])
        pixels[: 10 + number, :, 3] = 0
        label = np.full((48, 48), number, np.uint8)
        item = Item(f"t{number}", tmp_path / f"t{number}.png", tmp_path / f"l{number}.png")
        Image.fromarray(pixels).save(item.image)
        Image.fromarray(label).save(item.label)
        items.append(item)
    spec, split = two_classes(), Split(items, items, items)
    batches = []
    for loader in ("torch", "dali"):
        config = DataConfig(root=tmp_path, labels=2, batch_size=2, workers=0, loader=loader)
        batches.append(next(iter(build_loader(config, spec, split, views=ALL, seed=0, start_step=0,
                                              total_steps=1))))
    assert (batches[0].ignore == 255).any() and (batches[0].y == 255).any()
    assert torch.equal(batches[0].ignore, batches[1].ignore)
    assert torch.equal(batches[0].y, batches[1].y)
