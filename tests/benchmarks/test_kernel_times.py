"""Kernels are named shortly, PyTorch's are added up, and no GPU is no result."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from benchmarks import kernel_times


def test_rows_add_kernels_of_one_name() -> None:
    kernels = [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", 1e-6),
        ("void co2s::cuda::(anonymous namespace)::masked_cross_entropy_tiles<c10::BFloat16, 6, "
         "(co2s::cuda::From)2>(co2s::cuda::CrossEntropyProblem)", 5e-6),
        ("void co2s::cuda::(anonymous namespace)::sum_partials<float>(co2s::cuda::Partial)", 2e-6),
        ("void at::native::unrolled_elementwise_kernel<at::native::BinaryFunctor>", 2e-6),
        ("Memcpy DtoD (Device -> Device)", 1e-6),
    ]  # fmt: skip
    rows = kernel_times.rows_of("128to512", kernels)
    found = {row["provider"]: row["median"] * kernel_times.PASSES for row in rows}
    assert found == pytest.approx({
        "masked_cross_entropy_tiles (bfloat16)": 5e-6, "PyTorch's": 3e-6,
        "sum_partials (float)": 2e-6, "copies": 1e-6, "all kernels": 11e-6,
    })  # fmt: skip
    assert rows[0]["median"] == 5e-6 / kernel_times.PASSES and rows[-1]["provider"] == "all kernels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_written(tmp_path) -> None:
    done = CliRunner().invoke(kernel_times.main, ["--out", str(tmp_path / "file.json")])
    assert done.exit_code == 2 and "no CUDA GPU" in done.output
    assert not list(tmp_path.iterdir())
