"""Stability loss between two students: the less confident one learns from the other."""

from __future__ import annotations

import torch
from torch import Tensor

from co2s_fast.losses._checks import (
    check_device,
    check_flag,
    check_ignore_index,
    check_logits,
    check_map,
    check_size,
    check_threshold,
    recordable,
)
from co2s_fast.ops.stability_loss import stability_loss_pair


def stability_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    threshold: float = 0.95,
    size: tuple[int, int] | None = None,
    ignore_mask: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Squared distance of the class probabilities where the other student is surer.

    .. math:: L_a = \frac{\sum_i m^a_i \sum_k (p^a_{ik} - p^b_{ik})^2}{K \sum_i m^a_i}, \quad
        m^a_i = [c^b_i \ge \tau \wedge c^b_i \ge c^a_i], \quad c_i = \max_k p_{ik}

    and L_b mirrored; both learn where they are equally confident. With ``p = F.interpolate(logits,
    size, mode="bilinear", align_corners=align_corners).softmax(1)`` and ``c = p.amax(1)`` it is::

        a_learns = (c_b >= threshold) & (c_b >= c_a) & (ignore_mask != ignore_index)
        loss_a = (p_a - p_b.detach()).square().mean(1)[a_learns].mean()

    Args:
        logits_a: [B,K,h,w] float16, bfloat16, float32 or float64 (the last on the CPU).
        logits_b: of the same shape, dtype and device.
        threshold: τ in [0, 1]; a compiled graph is made for one value of it.
        size: (H, W) in pixels of the grid on which pixels are compared; None: that of
            `ignore_mask`, or else h × w.
        ignore_mask: [B,H,W] uint8, int32 or int64; a pixel is left out where it is `ignore_index`.
        ignore_index: value that marks padding in `ignore_mask`.
        align_corners: as in `F.interpolate`; matters when h × w is not H × W.

    Returns:
        (loss_a, loss_b), scalars, float32 (float64 for float64 logits). The gradient of loss_a
        flows into `logits_a` only, that of loss_b into `logits_b` only, and each may have its own
        `backward()`. Where no pixel learns the loss is 0 with gradient 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or `threshold` outside [0, 1].

    Source:
        The dual-student stability term of Co2S, with the teacher detached as the paper says.
    """
    loss_a, loss_b, _counts = _terms(
        logits_a, logits_b, threshold, size, ignore_mask, ignore_index, align_corners, mean=True
    )
    return loss_a, loss_b


def stability_terms(
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    threshold: float = 0.95,
    size: tuple[int, int] | None = None,
    ignore_mask: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums and counts of `stability_loss`, for a global mean over processes.

    ``loss_a = sum_a / (K * count_a.clamp(min=1))``, and so for b.

    Args:
        logits_a: as in `stability_loss`, and so are the others.
        logits_b: [B,K,h,w].
        threshold: τ in [0, 1].
        size: (H, W) in pixels, or None.
        ignore_mask: [B,H,W] or None.
        ignore_index: value that marks padding.
        align_corners: as in `F.interpolate`.

    Returns:
        (sum_a, sum_b, count_a, count_b): differentiable sums over pixels and classes, float
        scalars; counts of the pixels where a, and b, learns, int64 scalars.

    Raises:
        TypeError, ValueError: as `stability_loss`.
    """
    sum_a, sum_b, counts = _terms(
        logits_a, logits_b, threshold, size, ignore_mask, ignore_index, align_corners, mean=False
    )
    return sum_a, sum_b, counts[0], counts[1]


def _terms(
    logits_a: Tensor,
    logits_b: Tensor,
    threshold: float,
    size: tuple[int, int] | None,
    ignore_mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    *,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked arguments into the op: sums or means of a and of b, counts [2]."""
    check_logits("logits_a", logits_a)
    check_logits("logits_b", logits_b)
    if logits_a.shape != logits_b.shape:
        raise ValueError(
            f"logits_b: expected shape {list(logits_a.shape)} like logits_a, "
            f"got {list(logits_b.shape)}"
        )
    if logits_a.dtype != logits_b.dtype:
        raise TypeError(f"logits_b: expected {logits_a.dtype} like logits_a, got {logits_b.dtype}")
    check_device("logits_b", logits_b, logits_a.device)
    threshold = check_threshold(threshold)
    ignore_index = check_ignore_index(ignore_index)
    check_flag("align_corners", align_corners)
    if size is not None:
        size = check_size(size)
    if ignore_mask is not None:
        check_map("ignore_mask", ignore_mask, logits_a, size, "integer")
        size = ignore_mask.shape[1:]
    height, width = logits_a.shape[2:] if size is None else size
    # On equal grids a saved gradient is as large as the logits: recomputing it moves fewer bytes.
    recording = torch.is_grad_enabled() and logits_a.shape[2:] != (height, width)
    if logits_a.requires_grad or logits_b.requires_grad:
        logits_a, logits_b, ignore_mask = map(recordable, (logits_a, logits_b, ignore_mask))
    return stability_loss_pair(
        logits_a, logits_b, threshold, height, width, ignore_mask, ignore_index, align_corners,
        logits_a.requires_grad and recording, logits_b.requires_grad and recording,
        mean,
    )  # fmt: skip
