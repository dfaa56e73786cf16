"""Small, odd-sized passes through every op on every live backend, for a memory checker to watch.

    compute-sanitizer python benchmarks/smoke.py

Compares each backend's loss section, gradients included, with the reference. Exits with 1 when one
is off, and with 2 when no backend but the reference is live.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import harness, inputs, ours, providers  # noqa: E402 - needs the path above
from co2s_fast.losses import CutMix, confusion_matrix  # noqa: E402

SIZES = ((8, 32), (13, 51), (33, 33), (19, 17))  # whole, fractional, no, and down-sampling
TOLERANCE = 1e-4


def run_ops(device: torch.device, grid: int, crop: int) -> list[Tensor]:
    """Loss and gradients of the section, a confusion matrix, and mixed images."""
    batch = inputs.make_batch(device, crop)
    logits = inputs.make_section_logits(grid, device, torch.float32, batch)
    leaves = [z for views in logits.values() for z in views.values() if z.requires_grad]
    loss = ours.loss_section(logits, batch)
    gradients = torch.autograd.grad(loss, leaves)
    counts = confusion_matrix(leaves[0].detach(), batch.labels)
    images = torch.arange(4 * 3 * crop * crop, device=device).reshape(4, 3, crop, crop)
    CutMix(batch.boxes[0], batch.partner).mix_(images)
    return [t.detach().cpu().double() for t in (loss, *gradients, counts, images)]


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compared, failed = 0, 0
    for grid, crop in SIZES:
        with providers.forced("reference"):
            expected = run_ops(device, grid, crop)
        for name in providers.BACKENDS[1:]:
            reason = providers.unavailable(name, device)
            if reason is not None:
                print(f"{name} {grid}->{crop}: not run: {reason}")
                continue
            with providers.forced(name):
                error = harness.disagreement(run_ops(device, grid, crop), expected)
            compared += 1
            failed += not error <= TOLERANCE
            print(f"{name} {grid}->{crop}: relative error {error:.2g}")
    return 1 if failed else 0 if compared else 2


if __name__ == "__main__":
    sys.exit(main())
