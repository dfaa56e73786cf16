"""A section small enough for tests: squares, one of them wrong, one absent, one hungry."""

from __future__ import annotations

import torch

from benchmarks.harness import Case, NotMeasured, Workload

SECTION = "toy"
MIB = 1 << 20
HUNGRY_MIB = 64


def build(provider: str, device: torch.device) -> Workload:
    leaf = torch.arange(8.0, device=device).requires_grad_()
    if provider == "absent":
        raise NotMeasured("it is absent for a reason")
    if provider == "off":
        return Workload(lambda: (leaf**2).sum() * 1.01, (leaf,))
    if provider == "hungry":
        return Workload(lambda: torch.full((HUNGRY_MIB * MIB // 4,), 1.0), items=4)
    return Workload(lambda: (leaf * leaf).sum(), (leaf,))


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [
        Case("squares", ("eager", "same", "off", "absent"), build, 32, 64, memory=()),
        Case("memory", ("hungry",), build, memory=("hungry",)),
    ]
