"""A whole co2s training step: forward, losses, backward, optimizers; ours and the released form.

The released form, in our words, per student: a pass without gradient over the CutMix partners'
weak views; a pass over [labelled, weak] whose features are decoded clean and perturbed, for the
labelled half too, although nothing uses that; a pass over the two strong views; each pass through
the networks as the release writes them (`released.py`); logits brought to full resolution; masked
losses with counts fetched to the host; an AdamW per student. On a GPU it runs in float32 with
TF32, and cuDNN times its algorithms, as released; `eager_autocast` is the same in bfloat16,
`compile_autocast` that under torch.compile. Ours is in bfloat16, `ours_float32` in float32 with
TF32; cuDNN does not time its algorithms for it.

`eager_our_networks` is the released order of passes and losses on our own decoder and backbones,
to show how much of the ratio is theirs. Ours is `co2s_fast.methods.co2s` as the trainer runs it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager, released
from benchmarks.bench_cutmix import eager_mix
from benchmarks.harness import Case, NotMeasured, Workload
from benchmarks.inputs import BATCH, CLASSES, make_batch

SECTION = "step"
TITLE = "Whole co2s training step"
LEARNING_RATE = 1e-5
# Fresh students are sure of nothing, and losses that nothing enters cost little. With this
# threshold every pixel takes part, which is the most work there can be.
THRESHOLD = 0.0
STEP, TOTAL_STEPS = 100, 200  # past the ramp, so that the stability loss has its full weight
GPU_ONLY = "compiling two students takes minutes on a CPU, and no goal is set for it there"


@dataclass
class Images:
    """uint8 [B, 3, H, W] each; `other_*` are the CutMix partners, which peers load separately."""

    views: dict[str, Tensor]

    @classmethod
    def random(cls, crop: int, device: torch.device) -> Images:
        generator = torch.Generator().manual_seed(5)
        shape = (BATCH, 3, crop, crop)
        names = ("x", "w", "s1", "s2", "w_other")
        views = {n: torch.randint(256, shape, generator=generator).byte() for n in names}
        return cls({name: image.to(device) for name, image in views.items()})


def make_students(device: torch.device, tiny: bool) -> dict[str, Any]:
    """A provider's own copy of the two students."""
    return {name: copy.deepcopy(s).to(device).train() for name, s in random_students(tiny).items()}


@functools.cache
def random_students(tiny: bool) -> dict[str, Any]:
    """The two students with random weights: speed does not depend on their values."""
    from co2s_fast.models import StudentConfig, build_student, tiny_clip_config, tiny_ssm_config

    if tiny:
        configs = {"clip": tiny_clip_config(), "ssm": tiny_ssm_config()}
    else:
        text = {"source": "hash"}  # needs no download
        configs = {
            "clip": StudentConfig(backbone="clip", weights=None, text=text),
            "ssm": StudentConfig(backbone="timm", weights=None),
        }
    classes = [SimpleNamespace(name=f"class {i}", concepts=[f"class {i}"]) for i in range(CLASSES)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random frozen weights are what we want here
        try:
            return {
                name: build_student(config, classes, seed=i)
                for i, (name, config) in enumerate(configs.items())
            }
        except ImportError as error:
            raise NotMeasured(f"the students cannot be built: {error}") from error


@dataclass(frozen=True)
class Networks:
    """How one student's networks are evaluated."""

    features: Callable[[Tensor], tuple[Tensor, ...]]
    decode: Callable[[tuple[Tensor, ...]], Tensor]


def networks(student: Any, ours: bool, compiled: bool) -> Networks:
    """Those of `student`: our way or the released one, compiled or not."""
    ways = (student.features, student.decode)
    if not ours:
        ways = (partial(released.features, student), partial(released.decode, student))
    return Networks(*(torch.compile(way) if compiled else way for way in ways))


def eager_logits(
    student: Any, evaluate: Networks, images: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Logits of one student by the released order of passes."""
    with torch.no_grad():
        student.eval()
        other = evaluate.decode(evaluate.features(images["w_other"]))
        student.train()
    clean = evaluate.features(torch.cat([images["x"], images["w"]]))
    perturbed = student.perturb(clean)
    both = tuple(torch.cat(pair) for pair in zip(clean, perturbed, strict=True))
    x, w, _, fp = evaluate.decode(both).chunk(4)
    strong = evaluate.features(torch.cat([images["s1"], images["s2"]]))
    s1, s2 = evaluate.decode(strong).chunk(2)
    return {"x": x, "w": w, "fp": fp, "s1": s1, "s2": s2, "w_other": other}


def eager_step(
    device: torch.device, tiny: bool, crop: int, *, compiled: bool = False, ours: bool = False,
    half: bool = False,
) -> Callable[[], Tensor]:
    """One released training step as a function without arguments; compiled or `half`: bfloat16."""
    students = make_students(device, tiny)
    if not ours:
        students = {name: released.with_plain_layers(s) for name, s in students.items()}
    ways = {name: networks(student, ours, compiled) for name, student in students.items()}
    batch = make_batch(device, crop, THRESHOLD)
    images = Images.random(crop, device).views
    losses: Callable[..., Tensor] = eager.loss_section
    optimizers = [
        torch.optim.AdamW(s.parameter_groups(LEARNING_RATE, 0.01)) for s in students.values()
    ]
    if compiled:
        losses = torch.compile(losses)

    def step() -> Tensor:
        mixed = dict(images)
        for view, box in zip(("s1", "s2"), batch.box_maps, strict=True):
            mixed[view] = eager_mix(images[view].clone(), box, batch.partner)
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled or half):
            logits = {name: eager_logits(s, ways[name], mixed) for name, s in students.items()}
            loss = losses(logits, batch, released=True, plain_indexing=not compiled)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return with_tuned_cudnn(step) if device.type == "cuda" else step


def with_tuned_cudnn(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step` with `cudnn.benchmark`, which the release turns on; warm-up times the algorithms."""

    def tuned() -> Tensor:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            return step()
        finally:
            torch.backends.cudnn.benchmark = before

    return tuned


def our_step(device: torch.device, tiny: bool, crop: int, provider: str) -> Callable[[], Tensor]:
    """One step as the trainer makes it, with its options `channels_last` and `compile`."""
    from co2s_fast.data import Batch
    from co2s_fast.methods import get_method
    from co2s_fast.models.compiled import compile_student

    method_class = get_method("co2s")
    students = make_students(device, tiny)
    method = method_class(students, method_class.Config(threshold=THRESHOLD)).to(device)
    autocast = device.type == "cuda" and provider != "ours_float32"
    if provider == "ours_channels_last":
        method.to(memory_format=torch.channels_last)
    if provider == "ours_compile":
        for student in students.values():
            compile_student(student)
    groups = [g for s in students.values() for g in s.parameter_groups(LEARNING_RATE, 0.01)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    batch = make_batch(device, crop, THRESHOLD)
    views = Images.random(crop, device).views

    def step() -> Tensor:
        data = Batch(
            x=views["x"],
            y=batch.labels.byte(),
            w=views["w"],
            s1=views["s1"].clone(),  # mixed in place
            s2=views["s2"].clone(),
            ignore=batch.ignore,
            boxes1=batch.boxes[0],
            boxes2=batch.boxes[1],
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = method(data, STEP, TOTAL_STEPS)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build(provider: str, device: torch.device, tiny: bool, crop: int) -> Workload:
    if provider in ("eager", "eager_our_networks"):
        step = eager_step(device, tiny, crop, ours=provider == "eager_our_networks")
    elif provider == "eager_autocast":
        step = eager_step(device, tiny, crop, half=True)
    elif provider == "compile_autocast":
        if device.type == "cpu":
            raise NotMeasured(GPU_ONLY)
        step = eager_step(device, tiny, crop, compiled=True)
    else:
        step = our_step(device, tiny, crop, provider)
    return Workload(step, mode="step", items=2 * BATCH)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Tiny students at 128² on a CPU; the paper's ViT-B/16 pair at 512² on a GPU."""
    tiny = device.type == "cpu"
    name, crop = ("tiny", 128) if tiny else ("vit_b16", 512)
    providers = ("eager", "eager_our_networks", "compile_autocast", "ours")
    if not tiny:
        providers += ("eager_autocast", "ours_float32", "ours_channels_last", "ours_compile")
    # Dropout draws differ between the forms, so their results are not compared here; the tests of
    # the training step do that with dropout off.
    builder = partial(build, tiny=tiny, crop=crop)
    return [Case(name, providers, builder, tolerance=None, memory=providers)]
