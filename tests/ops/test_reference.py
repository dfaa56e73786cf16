"""The specification itself, against PyTorch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.ops import catalogue, reference


def z(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_every_schema_is_registered_in_both_kinds_of_kernel():
    import co2s_fast.ops  # noqa: F401

    for name, schema in catalogue.SCHEMAS.items():
        declared = torch._C.parse_schema(f"co2s::{name}{schema}")
        assert getattr(torch.ops.co2s, name).default._schema == declared
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"co2s::{name}", key)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(4, 5), (8, 10), (3, 7), (1, 1)])
def test_up_and_its_transpose(size, align_corners):
    x = z(2, 3, 4, 5)
    y = reference.up(x, *size, align_corners)
    torch.testing.assert_close(
        y, F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
    )
    upstream = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(reference.up_transposed(upstream, 4, 5, align_corners), expected)


def test_up_computes_in_float32():
    assert reference.up(torch.zeros(1, 1, 2, 2).half(), 4, 4, False).dtype == torch.float32


def test_equal_grids_keep_a_nan_in_its_place():
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = float("nan")
    assert reference.up(x, 3, 3, False).isnan().sum() == 1
