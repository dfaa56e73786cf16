"""Every kernel compiles for the GPUs we name, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
    "_mean_of_partials_kernel",
}
MOST_SHARED_BYTES = 48 * 1024  # what a block gets without asking, on every GPU


CASES = {"few": ("86", "90"), "many": ("90",)}


@pytest.fixture(scope="module")
def compilers(tmp_path_factory) -> Iterator[dict[str, subprocess.Popen]]:
    """A process a case, both at once; this process's Triton is bound to the interpreter."""
    script = Path(__file__).with_name("compile_kernels.py")
    running = {}
    for case, capabilities in CASES.items():
        folder = tmp_path_factory.mktemp(case)
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
        running[case] = subprocess.Popen(
            [sys.executable, str(script), case, *capabilities], env=environment, text=True,
            stdout=(folder / "out").open("w+"), stderr=(folder / "err").open("w+"),
        )  # fmt: skip
        running[case].folder = folder
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_kernels_compile(case: str, compilers) -> None:
    process = compilers[case]
    code = process.wait(timeout=900)
    assert code == 0, (process.folder / "err").read_text()[-3000:]
    results = json.loads((process.folder / "out").read_text().splitlines()[-1])
    for capability in map(int, CASES[case]):
        built = {r["kernel"] for r in results if r["capability"] == capability}
        assert built == KERNELS
    for result in results:
        assert result["bytes"] > 0
        assert result["shared"] <= MOST_SHARED_BYTES, result
        assert not result["unaligned"], f"equal grids must be read 16 bytes a thread: {result}"
        if "stability" in result["kernel"]:
            assert result["fusable"] == 0, f"equal students must stay equal: {result}"
