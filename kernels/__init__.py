"""Triton kernels, one module an op; installed as `co2s_fast.kernels`.

Each module has the functions of its op under their names in the catalogue, e.g.
`co2s_fast.kernels.masked_cross_entropy.masked_cross_entropy_backward`. Importing this package does
not import triton; importing a module does. The other modules are shared: `pixel_math` (device
functions), `launch` (host side), `sums` and `corner_sums` (second, fixed-order steps of sums).
"""

from __future__ import annotations

MODULES = (
    "softmax_confidence",
    "masked_cross_entropy",
    "stability_loss",
    "confusion_matrix",
    "cutmix",
)
