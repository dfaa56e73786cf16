"""Working without a network: one switch, which huggingface_hub, timm and open_clip obey."""

from __future__ import annotations

import os
import sys

VARIABLE = "HF_HUB_OFFLINE"


def go_offline() -> None:
    """Open no connection from here on, in this process and those it starts."""
    os.environ[VARIABLE] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the variable already
        constants.HF_HUB_OFFLINE = True


def is_offline() -> bool:
    """Whether `--offline` or HF_HUB_OFFLINE (1, on, yes or true) forbids connections."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "on", "yes", "true")
