"""The DALI graph of a training step: one graph, whose images live on the GPU or on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from co2s_fast.data.dali.colour import Node, strong_view
from co2s_fast.data.dali.source import encoded_image, input_names
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.plan import STRONG, Plan

QUEUE = 2
"""Steps that DALI works on ahead of the one that is asked for."""


def build_pipeline(plan: Plan, source: Callable[[], tuple], *, threads: int,
                   gpu: int | None) -> Pipeline:
    """The pipeline of one rank, not yet built.

    Args:
        plan: views, crop and batch of the run.
        source: called once a step; one list of arrays, image by image, for each `graph_inputs`.
        threads: of DALI on the CPU.
        gpu: number of the GPU that the images are decoded and augmented on; None: the CPU.

    Returns:
        A pipeline whose outputs are those of `graph_outputs`, in order.
    """
    return _graph(
        plan, source, batch_size=len(plan.positions), num_threads=threads, device_id=gpu,
        prefetch_queue_depth=QUEUE, exec_dynamic=True, seed=0,
    )  # fmt: skip


def graph_inputs(plan: Plan) -> list[str]:
    """Names of the arrays of a step."""
    return input_names(plan, LABELED) + input_names(plan, UNLABELED)


def graph_outputs(plan: Plan) -> list[str]:
    """Names of the outputs, all of them fields of `Batch`."""
    names = ["x", "y"]
    if plan.has_unlabeled:
        strong = [view for view in STRONG if view in plan.views]
        names += [*(["w"] if "w" in plan.views else []), *strong, "ignore"]
        names += [f"boxes{view[1:]}" for view in strong]
        names += ["truth"] if plan.truth else []
    return names


@pipeline_def(enable_conditionals=True)
def _graph(plan: Plan, source: Callable[[], tuple]) -> tuple[Any, ...]:
    names = graph_inputs(plan)
    on_gpu = Pipeline.current().device_id is not None
    nodes = fn.external_source(source=source, num_outputs=len(names), batch=True, no_copy=True)
    inputs = dict(zip(names, nodes))  # noqa: B905 - DALI's zip takes no `strict`
    crop, antialias = plan.recipe.crop, plan.antialias
    outputs = {"x": planar(crop_image(pick(inputs, "x_"), crop, antialias, on_gpu))}
    if plan.has_unlabeled:
        image = crop_image(pick(inputs, "u_"), crop, antialias, on_gpu)
        outputs["w"] = planar(image)
        for view in STRONG:
            if view in plan.views:
                outputs[view] = planar(strong_view(image, pick(inputs, f"{view}_")))
    for name in graph_outputs(plan):
        if name not in outputs:
            outputs[name] = inputs[name].gpu() if on_gpu else inputs[name]
    return tuple(outputs[name] for name in graph_outputs(plan))


def can_decode(path: Path) -> bool:
    """Whether DALI's decoder on the CPU takes an image file."""
    encoded, _ = encoded_image(path)
    pipeline = _decoder(lambda: [encoded], batch_size=1, num_threads=1, device_id=None)
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


@pipeline_def
def _decoder(source: Callable[[], list]) -> Node:
    return decode(fn.external_source(source=source, batch=True), on_gpu=False)


def pick(inputs: dict[str, Node], prefix: str) -> dict[str, Node]:
    """Inputs whose name begins with the prefix, without it."""
    return {name[len(prefix):]: node for name, node in inputs.items() if name.startswith(prefix)}


def crop_image(image: dict[str, Node], crop: int, antialias: bool, on_gpu: bool) -> Node:
    """Decode, rescale, crop, flip, pad with zeros and turn: uint8 [crop, crop, 3].

    Only the crop's window is resized; a region given from right to left is mirrored.
    """
    part = fn.resize(
        decode(image["image"], on_gpu), size=image["size"], roi_start=image["start"],
        roi_end=image["end"], interp_type=types.INTERP_LINEAR, antialias=antialias,
    )  # fmt: skip
    whole = pad_if(part, image["padded"], image["corner"], crop)
    if "transposed" not in image:
        return whole
    turned = transpose_if(whole, image["transposed"])
    return fn.flip(turned, vertical=image["upside_down"], horizontal=image["mirrored"])


def decode(encoded: Node, on_gpu: bool) -> Node:
    """uint8 [H, W, 3], not turned by EXIF: labels are not, either."""
    return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB,
                             adjust_orientation=False, jpeg_fancy_upsampling=True)


def pad_if(part: Node, wanted: Node, corner: Node, crop: int) -> Node:
    if wanted:
        padded = fn.slice(part, start=corner, shape=[crop, crop], axes=[0, 1],
                          out_of_bounds_policy="pad", fill_values=0)
    else:
        padded = part
    return padded


def transpose_if(part: Node, wanted: Node) -> Node:
    if wanted:
        transposed = fn.transpose(part, perm=[1, 0, 2], transpose_layout=False)
    else:
        transposed = part
    return transposed


def planar(image: Node) -> Node:
    """[H, W, 3] to [3, H, W]."""
    return fn.transpose(image, perm=[2, 0, 1])
