"""Where the heads of a student's backbone look: attention from one token to the grid of patches.

Nothing is computed a second time by other code. The layers themselves are asked for their weights:
timm's through the softmax that its unfused path hands to its dropout (rotary embedding, register
tokens and norms of queries and keys are in it), open_clip's through `need_weights` of
`nn.MultiheadAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from co2s_fast.errors import UsageError
from co2s_fast.models.clip import ClipBackbone
from co2s_fast.models.ssm import TimmBackbone
from co2s_fast.models.student import Student

MAX_BYTES = 2_000_000_000
Keep = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one image.

    Attributes:
        maps: float32 [layers, heads, h, w] on the grid of patches of the padded image. With the
            weights on the other tokens (class, registers), each head's add up to 1.
        covers: height and width in pixels of the image that the grid lies over: more than the
            image where that was padded to whole patches.
        query: whose attention it is: "class token", "patch (row, column)" or "mean of all patches".
        used: how many layers, from the first, have an attention that the student uses. The CLIP
            student reads its last block along the value path, so its attention counts for nothing.
    """

    maps: Tensor
    covers: tuple[int, int]
    query: str
    used: int

    @property
    def on_patches(self) -> Tensor:
        """Share of each head's attention that lies on patches, [layers, heads]."""
        return self.maps.sum((2, 3))

    def layer(self, index: int, whose: str = "this backbone") -> int:
        """The layer that `index` names; negative ones count back from the last in use.

        Args:
            index: of the layer.
            whose: backbone or student, for the error.

        Raises:
            UsageError: there is no such layer.
        """
        count = len(self.maps)
        chosen = index if index >= 0 else max(self.used, 1) + index
        if not 0 <= chosen < count:
            raise UsageError(
                f"layer {index}: {whose} has layers 0 to {count - 1}; expected one of them, "
                f"or -1 to -{max(self.used, 1)}, counted from the last that the student uses"
            )
        return chosen


def attention_maps(
    student: Student, image: Tensor, point: tuple[int, int] | None = None
) -> AttentionMaps:
    """The attention of every layer and head, as the student computes it, in evaluation mode.

    Args:
        student: the student.
        image: one image [1, N, H, W] as the student takes it, any size.
        point: (x, y) in pixels: take the attention of the patch there. None: of the class token,
            or where the backbone has none, the mean over all patches.

    Raises:
        UsageError: a backbone whose attention cannot be told, a point outside the image, or an
            image whose weights would take more than 2 GB a layer.
    """
    if image.dim() != 4 or len(image) != 1:
        raise ValueError(f"image must be [1, N, H, W], got {tuple(image.shape)}")
    backbone, patch = student.backbone, student.patch_size
    height, width = image.shape[-2:]
    grid = (-(-height // patch), -(-width // patch))
    # A student that does not pad brings the image to whole patches by resizing it.
    covers = (grid[0] * patch, grid[1] * patch) if student.pads_to > 1 else (height, width)
    prefix, has_class = _prefix(backbone)
    _check_memory(backbone, prefix + grid[0] * grid[1])
    query, row = _query(point, (height, width), grid, covers, prefix, has_class)

    def keep(weights: Tensor) -> Tensor:
        rows = weights[0, :, prefix:].mean(1) if row is None else weights[0, :, row]
        return rows[:, prefix:].float().unflatten(1, grid)

    training = student.training
    student.eval()
    try:
        with torch.inference_mode(), recorded_attention(backbone, keep) as found:
            student.features(image)
    finally:
        student.train(training)
    maps = torch.stack([found[index] for index in sorted(found)])
    used = backbone.depth - 1 if isinstance(backbone, ClipBackbone) else len(maps)
    return AttentionMaps(maps, covers, query, used)


@contextmanager
def recorded_attention(backbone: nn.Module, keep: Keep) -> Iterator[dict[int, Tensor]]:
    """Record the attention of every block that runs while the context is open.

    Args:
        backbone: a student's.
        keep: what to keep of a block's weights [B, heads, queries, keys]: whole ones of a large
            image fill the memory.

    Yields:
        block -> `keep(weights)`, filled as the backbone runs. Of a CLIP backbone, also of the last
        block, whose attention the student does not use: from the tokens that come into it.

    Raises:
        UsageError: blocks without an attention of a known kind.
    """
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        if isinstance(backbone, ClipBackbone):
            _record_clip(backbone, keep, found, stack)
        else:
            _record_timm(backbone, keep, found, stack)
        yield found


def _record_clip(
    backbone: ClipBackbone, keep: Keep, found: dict[int, Tensor], stack: ExitStack
) -> None:
    visual = backbone.visual
    if not all(isinstance(b.attn, nn.MultiheadAttention) for b in visual.transformer.resblocks):
        raise UsageError(
            "attention with low-rank adapters tells no weights: merge them first "
            "(Student.merge_adapters)"
        )
    *ordinary, last = visual.transformer.resblocks
    wanted = {"need_weights": True, "average_attn_weights": False}

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, {**kwargs, **wanted}

    def take(index: int, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        found[index] = keep(output[1])

    def take_last(module: nn.Module, args: tuple, tokens: Tensor) -> None:
        tokens = last.ln_1(tokens)
        found[len(ordinary)] = keep(last.attn(tokens, tokens, tokens, **wanted)[1])

    for index, block in enumerate(ordinary):
        asking = block.attn.register_forward_pre_hook(ask, with_kwargs=True)
        stack.callback(asking.remove)
        stack.callback(block.attn.register_forward_hook(partial(take, index)).remove)
    before = ordinary[-1] if ordinary else visual.ln_pre
    stack.callback(before.register_forward_hook(take_last).remove)


def _record_timm(
    backbone: TimmBackbone, keep: Keep, found: dict[int, Tensor], stack: ExitStack
) -> None:
    def take(index: int, module: nn.Module, args: tuple[Tensor]) -> None:
        found[index] = keep(args[0])

    for index, block in enumerate(backbone.model.blocks):
        attention = getattr(block, "attn", None)
        if not (hasattr(attention, "attn_drop") and hasattr(attention, "fused_attn")):
            name = type(backbone.model).__name__
            raise UsageError(
                f"block {index} of {name} has no attention whose weights could be drawn"
            )
        stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
        attention.fused_attn = False
        stack.callback(attention.attn_drop.register_forward_pre_hook(partial(take, index)).remove)


def _check_memory(backbone: nn.Module, tokens: int) -> None:
    clip = isinstance(backbone, ClipBackbone)
    block = backbone.visual.transformer.resblocks[0] if clip else backbone.model.blocks[0]
    weights = 4 * getattr(block.attn, "num_heads", 1) * tokens**2
    if weights > MAX_BYTES:
        raise UsageError(
            f"the attention between {tokens} tokens takes {weights / 1e9:.1f} GB a layer, more "
            f"than {MAX_BYTES / 1e9:.0f} GB: take a smaller part of the image (--size)"
        )


def _prefix(backbone: nn.Module) -> tuple[int, bool]:
    """How many tokens come before the patches, and whether the first is a class token."""
    if isinstance(backbone, ClipBackbone):
        return 1, True
    count = int(getattr(backbone.model, "num_prefix_tokens", 0))
    return count, getattr(backbone.model, "cls_token", None) is not None


def _query(
    point: tuple[int, int] | None,
    size: tuple[int, int],
    grid: tuple[int, int],
    covers: tuple[int, int],
    prefix: int,
    has_class: bool,
) -> tuple[str, int | None]:
    """What the query is called, and its row among the tokens; None for the mean of the patches."""
    if point is None:
        return ("class token", 0) if has_class else ("mean of all patches", None)
    x, y = point
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise UsageError(f"point {x},{y}: outside of the image, {size[1]} x {size[0]} pixels")
    row, column = y * grid[0] // covers[0], x * grid[1] // covers[1]
    return f"patch ({row}, {column})", prefix + row * grid[1] + column
