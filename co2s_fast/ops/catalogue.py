"""The one list of operators: name, schema and the file stem that implements each.

The schemas are defined into the torch.library namespace `co2s`, whose kernels choose a backend,
and, before the native library is loaded, into `co2s_native`, for which the C++ and CUDA code
registers its kernels. Both namespaces therefore cannot disagree.
"""

from __future__ import annotations

import hashlib

import torch

_CROSS_ENTROPY_ARGS = (
    "Tensor logits, Tensor target, Tensor? confidence, float threshold, Tensor? ignore_mask, "
    "int ignore_index, Tensor? class_weight, Tensor? boxes, Tensor? partner, bool per_pixel, "
    "bool align_corners"
)
_STABILITY_ARGS = (
    "Tensor logits_a, Tensor logits_b, float threshold, SymInt height, SymInt width, "
    "Tensor? ignore_mask, int ignore_index, bool align_corners"
)

SCHEMAS: dict[str, str] = {
    # -> confidence float32 [B,H,W] (float64 for float64 logits), label int64 or uint8 [B,H,W]
    "softmax_confidence": (
        "(Tensor logits, SymInt height, SymInt width, bool align_corners, "
        "ScalarType label_dtype=long)"
        " -> (Tensor, Tensor)"
    ),
    # -> sum over the pixels taken (or [B,H,W] map), over max(counts[mean_over], 1) unless mean_over
    #    is -1; counts int64 [2] = (valid, taken);
    #    saved: d(sum)/d(logits) when with_grad and not per_pixel (on a GPU: where `saved_like`
    #    says so), else empty; scale: one over the divisor, or empty
    "masked_cross_entropy": (
        f"({_CROSS_ENTROPY_ARGS}, bool with_grad, int mean_over)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # -> gradient of the logits, in their dtype; grad_loss is that of the sum (or map)
    "masked_cross_entropy_backward": (
        f"(Tensor grad_loss, {_CROSS_ENTROPY_ARGS}, Tensor saved) -> Tensor"
    ),
    # -> sums [2], each over K · max(its count, 1) where `mean`; counts int64 [2]; saved_a, saved_b
    #    and scale [2] (as above)
    "stability_loss": (
        f"({_STABILITY_ARGS}, bool with_grad_a, bool with_grad_b, bool mean)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # -> gradients of logits_a and logits_b; an empty tensor for the one not needed
    "stability_loss_backward": (
        f"(Tensor grad_sums, {_STABILITY_ARGS}, bool need_a, bool need_b, "
        "Tensor saved_a, Tensor saved_b) -> (Tensor, Tensor)"
    ),
    # accumulates into out, int64 [K,K]
    "confusion_matrix": (
        "(Tensor logits, Tensor target, int ignore_index, bool align_corners, Tensor(a!) out) -> ()"
    ),
    # images [B,C,H,W] or [B,H,W], any dtype
    "cutmix_": "(Tensor(a!) images, Tensor boxes, Tensor partner) -> ()",
}


def stem(name: str) -> str:
    """File stem of the op that catalogue entry `name` belongs to, e.g. `cutmix` for `cutmix_`."""
    return name.removesuffix("_backward").removesuffix("_")


def fingerprint() -> str:
    """What a native library must have been built for; another one would abort when it is loaded."""
    return hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:16]


def define(namespace: str) -> torch.library.Library:
    """Define every schema in `namespace`; the returned object must be kept alive."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=())
    return library
