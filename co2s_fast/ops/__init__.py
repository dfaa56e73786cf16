"""The operators `torch.ops.co2s.*` and the choice of the backend that runs them.

Importing this package registers the operators; it needs neither a GPU, nor a compiler, nor Triton.
"""

from __future__ import annotations

from co2s_fast.ops import (  # noqa: F401 - each registers its op
    confusion_matrix,
    cutmix,
    masked_cross_entropy,
    softmax_confidence,
    stability_loss,
)
from co2s_fast.ops.dispatch import (
    BACKENDS,
    BackendStatus,
    backend,
    backend_status,
    debug_checks,
    load_native,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "backend",
    "backend_status",
    "debug_checks",
    "load_native",
    "use_backend",
]
