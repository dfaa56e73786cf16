"""The one optimizer of a run, over the parameter groups of all its students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from co2s_fast.engine.config import TrainConfig
    from co2s_fast.models import Student


def build_optimizer(
    students: Mapping[str, Student],
    train: TrainConfig,
    own: Mapping[str, list[nn.Parameter]] | None = None,
) -> torch.optim.AdamW:
    """AdamW with a group "<student>/<part>" for each part that learns, `initial_lr` beside `lr`.

    Args:
        students: by name.
        train: rates and the rest.
        own: what the method has beside them (`Method.own_parameters`), at the decoder's rate.
    """
    groups = []
    for name, student in students.items():
        for group in student.parameter_groups(
            train.lr, train.weight_decay, train.backbone_multiplier, train.decoder_multiplier,
            train.adapter_multiplier,
        ):  # fmt: skip
            label = f"{name}/{group.pop('name')}"
            groups.append({**group, "name": label, "initial_lr": group["lr"]})
    rate = train.lr * train.decoder_multiplier
    for label, parameters in (own or {}).items():
        groups.append({"params": parameters, "lr": rate, "weight_decay": train.weight_decay,
                       "name": label, "initial_lr": rate})
    return torch.optim.AdamW(groups, betas=train.betas, eps=train.eps, fused=True)
