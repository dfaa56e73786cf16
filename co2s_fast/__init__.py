"""co2s-fast: semi-supervised segmentation of remote-sensing imagery with two ViT students."""

from __future__ import annotations

from co2s_fast.version import __version__

__all__ = ["__version__"]
