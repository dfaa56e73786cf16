"""Weights known by name: what they are, where they come from, what they must be fed with.

Sources: the registries of timm and open_clip, the README files of
the original releases (each entry's `origin`), and NOTICE for licences. A checksum stands here only
where the release itself states it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from co2s_fast.errors import UsageError

Kind = Literal["clip", "ssm"]


@dataclass(frozen=True)
class WeightEntry:
    """One set of weights.

    Attributes:
        name: what `--clip`, `--ssm` and `students.X.weights` take.
        kind: "clip" (both towers) or "ssm" (a self-supervised vision transformer).
        model: open_clip or timm model name.
        layout: how the source file names its tensors, see `layouts`.
        licence: of the weights.
        origin: page that publishes them.
        normalization: name of the mean and standard deviation of its images, as
            `StudentConfig.normalization` takes it.
        patch: side of a token in pixels.
        size: side of the images it was trained on.
        depth: number of blocks.
        overrides: changes to the model that the file needs.
        tag: pretrained tag under which timm or open_clip load it by themselves.
        hub: Hugging Face repository; `files`: its file, alternatives in order of preference.
        url: of the original release's file, where it can be downloaded without a login.
        manual: how to get a file that no program can download.
        sha256: of the source file, where its publisher states it; a prefix where only that is.
        note: one line for people.
    """

    name: str
    kind: Kind
    model: str
    layout: str
    licence: str
    origin: str
    normalization: str = "imagenet"
    patch: int = 16
    size: int = 224
    depth: int = 12
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tag: str | None = None
    hub: str | None = None
    files: tuple[str, ...] = ()
    url: str | None = None
    manual: str | None = None
    sha256: str | None = None
    note: str = ""

    @property
    def source(self) -> str:
        """Where `fetch` gets it, in a few words."""
        if self.tag is not None:
            return f"{'open_clip' if self.kind == 'clip' else 'timm'} {self.tag}"
        if self.hub is not None:
            return f"hub {self.hub}"
        return self.url or "by hand"


_OPENAI_SHA = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
_META_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
_BEIT_SHARED = {"use_fc_norm": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}

_ENTRIES = (
    WeightEntry(
        "clip-openai", "clip", "ViT-B-16-quickgelu", "open_clip", "MIT",
        "https://github.com/openai/CLIP", "clip", tag="openai",
        hub="timm/vit_base_patch16_clip_224.openai", files=("open_clip_model.safetensors",),
        note="the paper's CLIP student",
    ),
    WeightEntry(
        "clip-openai-file", "clip", "ViT-B-16-quickgelu", "openai", "MIT",
        "https://github.com/openai/CLIP", "clip",
        url=f"https://openaipublic.azureedge.net/clip/models/{_OPENAI_SHA}/ViT-B-16.pt",
        sha256=_OPENAI_SHA, note="OpenAI's own file, a TorchScript archive: convert it first",
    ),
    WeightEntry(
        "clip-hf", "clip", "ViT-B-16-quickgelu", "clip-hf", "MIT",
        "https://huggingface.co/openai/clip-vit-base-patch16", "clip",
        hub="openai/clip-vit-base-patch16", files=("model.safetensors", "pytorch_model.bin"),
        note="the same weights as transformers names them",
    ),
    WeightEntry(
        "remoteclip", "clip", "ViT-L-14", "open_clip", "Apache-2.0",
        "https://github.com/ChenDelong1999/RemoteCLIP", "clip", patch=14, depth=24,
        hub="chendelong/RemoteCLIP", files=("RemoteCLIP-ViT-L-14.pt",),
        note="published as ViT-L/14 and ViT-B/32, not as ViT-B/16",
    ),
    WeightEntry(
        "remoteclip-b32", "clip", "ViT-B-32", "open_clip", "Apache-2.0",
        "https://github.com/ChenDelong1999/RemoteCLIP", "clip", patch=32,
        hub="chendelong/RemoteCLIP", files=("RemoteCLIP-ViT-B-32.pt",),
    ),
    WeightEntry(
        "dinov3", "ssm", "vit_base_patch16_dinov3_qkvb", "timm", "DINOv3 License",
        "https://github.com/facebookresearch/dinov3", size=256, tag="lvd1689m",
        hub="timm/vit_base_patch16_dinov3_qkvb.lvd1689m", files=("model.safetensors",),
        note="the paper's SSM student",
    ),
    WeightEntry(
        "dinov3-file", "ssm", "vit_base_patch16_dinov3_qkvb", "dinov3", "DINOv3 License",
        _META_DINOV3, size=256, sha256="73cec8be",
        manual="ask for access there, download dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
        note="Meta's own file",
    ),
    WeightEntry(
        "dinov3-hf", "ssm", "vit_base_patch16_dinov3_qkvb", "dinov3-hf", "DINOv3 License",
        "https://huggingface.co/facebook/dinov3-vitb16-pretrain-lvd1689m", size=256,
        hub="facebook/dinov3-vitb16-pretrain-lvd1689m", files=("model.safetensors",),
        note="gated: accept the terms there, then log in with `hf auth login`",
    ),
    WeightEntry(
        "dinov3-sat", "ssm", "vit_large_patch16_dinov3_qkvb", "timm", "DINOv3 License",
        "https://github.com/facebookresearch/dinov3", "satellite", size=256, depth=24,
        tag="sat493m",
        hub="timm/vit_large_patch16_dinov3_qkvb.sat493m", files=("model.safetensors",),
        note="ViT-L/16 trained on satellite images",
    ),
    WeightEntry(
        "dinov2", "ssm", "vit_base_patch14_dinov2", "timm", "Apache-2.0",
        "https://github.com/facebookresearch/dinov2", patch=14, size=518, tag="lvd142m",
        hub="timm/vit_base_patch14_dinov2.lvd142m", files=("model.safetensors",),
        note="patch 14: images are resized to the next multiple",
    ),
    WeightEntry(
        "dinov2-file", "ssm", "vit_base_patch14_dinov2", "dinov2", "Apache-2.0",
        "https://github.com/facebookresearch/dinov2", patch=14, size=518,
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ),
    WeightEntry(
        "mae", "ssm", "vit_base_patch16_224", "timm", "CC BY-NC 4.0",
        "https://github.com/facebookresearch/mae", tag="mae",
        hub="timm/vit_base_patch16_224.mae", files=("model.safetensors",),
    ),
    WeightEntry(
        "mae-file", "ssm", "vit_base_patch16_224", "mae", "CC BY-NC 4.0",
        "https://github.com/facebookresearch/mae",
        url="https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth",
    ),
    WeightEntry(
        "beitv2", "ssm", "beitv2_base_patch16_224", "beitv2", "MIT",
        "https://github.com/microsoft/unilm/tree/master/beit2", overrides=_BEIT_SHARED,
        url="https://github.com/addf400/files/releases/download/BEiT-v2/"
        "beitv2_base_patch16_224_pt1k.pth",
        note="self-supervised only; timm has no such weights",
    ),
    WeightEntry(
        "beitv2-in22k", "ssm", "beitv2_base_patch16_224", "timm", "MIT",
        "https://github.com/microsoft/unilm/tree/master/beit2", tag="in1k_ft_in22k",
        hub="timm/beitv2_base_patch16_224.in1k_ft_in22k", files=("model.safetensors",),
        note="then trained on the labels of ImageNet-22k; what timm has",
    ),
    WeightEntry(
        "ibot", "ssm", "vit_base_patch16_224", "ibot", "Apache-2.0",
        "https://github.com/bytedance/ibot",
        url="https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitb_16/"
        "checkpoint_teacher.pth",
        note="ImageNet-1k, teacher",
    ),
    WeightEntry(
        "simmim", "ssm", "beitv2_base_patch16_224", "simmim", "MIT",
        "https://github.com/microsoft/SimMIM", overrides=_BEIT_SHARED,
        manual="download https://drive.google.com/file/d/1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw "
        "(simmim_pretrain__vit_base__img224__800ep.pth)",
    ),
)  # fmt: skip

REGISTRY: dict[str, WeightEntry] = {entry.name: entry for entry in _ENTRIES}


def names(kind: Kind | None = None) -> list[str]:
    """Names of the known weights, all or those of one kind."""
    return [entry.name for entry in REGISTRY.values() if kind in (None, entry.kind)]


def entry_named(name: str, kind: Kind | None = None) -> WeightEntry:
    """The entry of a name.

    Raises:
        UsageError: unknown, or of the other kind.
    """
    entry = REGISTRY.get(name)
    if entry is None or kind not in (None, entry.kind):
        option = f"--{kind} " if kind else ""
        what = "" if entry is None else f" (which is of kind {entry.kind})"
        raise UsageError(
            f"{option}{name}{what}: expected one of {', '.join(names(kind))}, or a file"
        )
    return entry


def entry_for(kind: Kind, model: str, weights: str | None) -> WeightEntry | None:
    """The entry that a student's `model` and `weights` (a name or a pretrained tag) mean."""
    for entry in REGISTRY.values():
        same = entry.kind == kind and entry.model == model.split(".")[0]
        if same and weights is not None and weights in (entry.name, entry.tag):
            return entry
    return None
