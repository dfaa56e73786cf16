"""Every kernel compiles for the GPUs we name, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_softmax_confidence_kernel",
    "_masked_cross_entropy_kernel",
    "_masked_cross_entropy_backward_kernel",
    "_masked_cross_entropy_interval_kernel",
    "_stability_loss_kernel",
    "_stability_loss_backward_kernel",
    "_stability_loss_interval_kernel",
    "_confusion_matrix_kernel",
    "_cutmix_copy_kernel",
    "_gather_corners_kernel",
    "_sum_partials_kernel",
}
MOST_SHARED_BYTES = 48 * 1024  # what a block gets without asking, on every GPU


@pytest.mark.slow
@pytest.mark.parametrize(("case", "capabilities"), [("few", (86, 90)), ("many", (90,))])
def test_all_kernels_compile(case: str, capabilities: tuple[int, ...], tmp_path: Path) -> None:
    # a process of its own: this one's Triton is bound to the interpreter
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), case, *map(str, capabilities)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for capability in capabilities:
        built = {r["kernel"] for r in results if r["capability"] == capability}
        assert built == KERNELS
    for result in results:
        assert result["bytes"] > 0
        assert result["shared"] <= MOST_SHARED_BYTES, result
        assert not result["unaligned"], f"equal grids must be read 16 bytes a thread: {result}"
