"""Class map of an image from an exported model, with NumPy, Pillow and onnxruntime alone.

    co2s-fast export runs/dubai --format onnx
    python examples/predict_onnxruntime.py runs/dubai/export/both.onnx scene.jpg map.png

The model takes images of one size. A larger one goes through in overlapping tiles, and where they
overlap the mean of their probabilities counts (of a model exported with `--output labels`, which
gives no probabilities but the best class's: the most confident tile). Everything the script needs
to know, from the size of the tiles to the colours of the classes, is in the file's metadata.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image

BATCH = 4
OVERLAP = 1 / 6


def open_model(path: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """The model, and its metadata with JSON values decoded."""
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    there = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(path, providers=there)
    about = session.get_modelmeta().custom_metadata_map
    names = ("classes", "palette", "tile", "channels", "scale", "short_side", "outputs")
    return session, {"dtype": about["dtype"]} | {name: json.loads(about[name]) for name in names}


def read_image(path: str, about: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels uint8 [3, H, W] at the scale the model was trained on, and the image's own size."""
    if (about["channels"], about["dtype"]) != (3, "uint8"):
        raise SystemExit(f"this example reads RGB pictures; the model takes {about['channels']} "
                         f"bands of {about['dtype']}")  # fmt: skip
    image = Image.open(path).convert("RGB")
    size = (image.height, image.width)
    factor = about["short_side"] / min(size) if about["short_side"] else about["scale"]
    height, width = (max(round(side * factor), 1) for side in size)
    if (height, width) != size:  # bilinear without antialias, as in training
        matrix = (size[1] / width, 0, 0, 0, size[0] / height, 0)
        image = image.transform((width, height), Image.Transform.AFFINE, matrix,
                                Image.Resampling.BILINEAR)  # fmt: skip
    return np.asarray(image).transpose(2, 0, 1), size


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along an axis; the last one is moved back to end at the border."""
    step = max(int(tile * (1 - OVERLAP)), 1)
    return [min(first, length - tile) for first in range(0, max(length - tile, 0) + step, step)]


def predict(session: onnxruntime.InferenceSession, about: dict, pixels: np.ndarray) -> np.ndarray:
    """Classes uint8 [H, W] of pixels [3, H, W] of any size."""
    tile, (height, width) = about["tile"], pixels.shape[1:]
    pad = [(0, 0), (0, max(tile - height, 0)), (0, max(tile - width, 0))]
    pixels = np.pad(pixels, pad, mode="symmetric")
    places = sorted({(y, x) for y in starts(pixels.shape[1], tile)
                     for x in starts(pixels.shape[2], tile)})  # fmt: skip
    scores = np.zeros((len(about["classes"]), *pixels.shape[1:]), np.float32)
    for first in range(0, len(places), BATCH):
        part = places[first : first + BATCH]
        images = np.stack([pixels[:, y : y + tile, x : x + tile] for y, x in part])
        results = session.run(None, {session.get_inputs()[0].name: images})
        for (y, x), *result in zip(part, *results, strict=True):
            window = scores[:, y : y + tile, x : x + tile]
            if about["outputs"] == ["probabilities"]:
                window += result[0]  # the sum has the same largest class as the mean
            else:
                labels, confidence = (each[None].astype(np.float32) for each in result)
                classes = np.arange(len(window))[:, None, None]
                np.maximum(window, np.where(labels == classes, confidence, 0), out=window)
    return scores[:, :height, :width].argmax(0).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("map", help="PNG to write, in the classes' colours")
    arguments = parser.parse_args()
    session, about = open_model(arguments.model)
    pixels, (height, width) = read_image(arguments.image, about)
    labels = predict(session, about, pixels)
    picture = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    picture.putpalette([channel for color in about["palette"] for channel in color])
    picture.save(arguments.map)
    shares = np.bincount(labels.ravel(), minlength=len(about["classes"])) / labels.size
    for name, share in zip(about["classes"], shares, strict=True):
        print(f"{name:24} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
