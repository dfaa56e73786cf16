"""The students' networks evaluated the way the authors' release does, on our students' weights.

Same result as `Student.features` and `Student.decode` (a test holds them to it), more work:

- decoder: skips are repeated for every class and concatenated, so that the 3x3 convolution runs
  over them K times; the pooled branch is spread over the map and concatenated; dilated convolutions
  read padding with all their taps; class attention computes the text half it then drops; maps are
  in the usual (channels first) layout;
- CLIP tower: value paths compute queries and keys, too, the last block's ordinary path is run
  though nothing reads it, and positions are resized in every pass;
- layers are the libraries' own (`with_plain_layers`): norms that autocast evaluates in float32, an
  activation that keeps two tensors for the backward pass, rotary embedding half by half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from open_clip import transformer as open_clip
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from co2s_fast.models.clip import ClipBackbone, resize_positions
from co2s_fast.models.decoder import ASPP, ClassAttention, QueryDecoder, Upsample
from co2s_fast.models.layers import GroupNorm, LayerNorm, QuickMlp
from co2s_fast.models.rotary import RotaryAttention
from co2s_fast.models.stem import ConvStem
from co2s_fast.models.student import Student


def with_plain_layers(student: Student) -> Student:
    """The student, its layers exchanged for the libraries' own: same parameters and results."""
    plain = {
        GroupNorm: nn.GroupNorm,
        LayerNorm: nn.LayerNorm,
        QuickMlp: nn.Sequential,
        RotaryAttention: EvaAttention,
    }
    if isinstance(student.backbone, ClipBackbone):  # its norms give back the type they were given
        _exchange(student.backbone, plain | {LayerNorm: open_clip.LayerNorm})
    _exchange(student, plain)
    return student


def _exchange(module: nn.Module, plain: Mapping[type, type]) -> None:
    for each in module.modules():
        each.__class__ = plain.get(type(each), type(each))


def features(student: Student, images: Tensor) -> tuple[Tensor, ...]:
    """Feature maps of uint8 images [B, 3, H, W] whose sides are multiples of the patch."""
    if not isinstance(student.backbone, ClipBackbone):
        return tuple(level.contiguous() for level in student.features(images))
    x = (images.to(student.mean.dtype) / 255 - student.mean) / student.std
    return tuple(level.contiguous() for level in _clip_features(student.backbone, x))


def _clip_features(backbone: ClipBackbone, images: Tensor) -> list[Tensor]:
    visual, maps = backbone.visual, []
    if isinstance(visual.conv1, ConvStem):  # tiny students only; no release has one
        stem_maps, x = visual.conv1(images)
        maps = visual.conv1.skip_maps(stem_maps, backbone.stem_skips)
    else:
        x = visual.conv1(images)
    grid = x.shape[-2:]
    x = backbone._tokens(x, resize_positions(visual.positional_embedding, backbone.grid_size, grid))
    for index, block in enumerate(visual.transformer.resblocks):
        value = _value_path(block, x)[:, 1:]
        if index in backbone.levels:
            maps.append(_to_map(value, grid))
        x = block(x)
    deep = F.normalize(visual.ln_post(value) @ visual.proj, dim=-1)
    return [*maps, _to_map(deep, grid)]


def _value_path(block: nn.Module, x: Tensor) -> Tensor:
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    x = x + block.ls_1(attention.out_proj(qkv.chunk(3, -1)[2]))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def decode(student: Student, levels: Sequence[Tensor]) -> Tensor:
    """Logits [B, K, h, w] from feature maps [B, C_i, h_i, w_i], shallow to deep."""
    decoder: QueryDecoder = student.decoder
    deep = F.normalize(levels[-1], dim=1)
    queries = F.normalize(student.queries, dim=-1).expand(len(deep), -1, -1)
    classes = queries.shape[1]
    x = torch.einsum("bchw,bkc->bkhw", deep, queries).flatten(0, 1)[:, None]
    x = _aspp(decoder.aspp, decoder.similarity(x))
    text = F.relu(decoder.text(queries))
    for layer in decoder.layers:
        x = _class_attention(layer, x, text)
    skips = zip(decoder.ups, decoder.skips, reversed(levels[:-1]), strict=True)
    for up, project, skip in skips:
        x = _upsample(up, x, F.relu_(project(skip)), classes)
    return decoder.head(x).squeeze(1).unflatten(0, (-1, classes))


def _aspp(aspp: ASPP, x: Tensor) -> Tensor:
    pairs = zip(aspp.convs, aspp.norms, strict=True)
    branches = [F.relu_(norm(nn.Conv2d.forward(conv, x))) for conv, norm in pairs]
    pooled = F.adaptive_avg_pool2d(x, 1)
    pooled = F.relu_(aspp.pool_norm(aspp.pool_conv(pooled)))
    branches.append(F.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=False))
    return x + F.relu_(aspp.norm(aspp.project(torch.cat(branches, 1))))


def _class_attention(layer: ClassAttention, x: Tensor, text: Tensor) -> Tensor:
    channels, classes, size = x.shape[1], text.shape[1], x.shape[-2:]
    pooled = F.avg_pool2d(x, tuple(min(p, n) for p, n in zip(layer.pool, size, strict=True)))
    grid = pooled.shape[-2:]
    visual = pooled.flatten(2).unflatten(0, (-1, classes)).permute(0, 3, 1, 2)  # B, P, K, C
    tokens = torch.cat([visual, text[:, None].expand(-1, visual.shape[1], -1, -1)], -1)
    tokens = tokens.flatten(0, 1)
    normed = layer.norm1(tokens)
    tokens = tokens + layer.attention(normed, normed, normed, need_weights=False)[0]
    tokens = tokens + layer.fc2(F.gelu(layer.fc1(layer.norm2(tokens))))
    out = tokens[..., :channels].unflatten(0, (len(text), -1)).permute(0, 2, 3, 1)
    out = out.flatten(0, 1).unflatten(2, grid)
    return x + F.interpolate(out, size, mode="bilinear", align_corners=True)


def _upsample(up: Upsample, x: Tensor, skip: Tensor, classes: int) -> Tensor:
    x = up.up(x)
    skip = F.interpolate(skip, x.shape[-2:], mode="bilinear", align_corners=True)
    x = torch.cat([x, skip.repeat_interleave(classes, 0)], 1)
    x = F.relu_(up.norm1(up.conv1(x)))
    return F.relu_(up.norm2(up.conv2(x)))
