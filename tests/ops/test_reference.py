"""The specification itself: against PyTorch's own functions, and gradcheck of its derivatives."""

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


def test_cross_entropy_gradients_by_autograd():
    label = torch.tensor([[[0, 1], [255, 2]]])
    confidence = torch.tensor([[[1.0, 0.2], [1.0, 0.97]]])
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def loss(x, per_pixel):
        return reference.masked_cross_entropy(
            x, label, confidence, 0.95, None, 255, weight, None, None, per_pixel, False
        )[0]

    x = z(1, 3, 2, 2)
    for per_pixel in (False, True):
        assert torch.autograd.gradcheck(lambda x, p=per_pixel: loss(x, p), (x,))
    expected = F.cross_entropy(x[:, :, 0, 0], torch.tensor([0]))
    expected = expected + 3 * F.cross_entropy(x[:, :, 1, 1], torch.tensor([2]))
    torch.testing.assert_close(loss(x, False), expected)


def test_stability_by_hand():
    """Three pixels: a learns, both learn (equal), nobody is confident."""
    p_a = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    p_b = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    a, b = (p.log().T[None, :, None, :] for p in (p_a, p_b))
    sums, counts = reference.stability_loss(a, b, 0.8, 1, 3, None, 255, False)
    assert counts.tolist() == [2, 1]
    torch.testing.assert_close(sums, torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_paste_reads_originals_and_clips():
    maps = torch.arange(3.0)[:, None, None].expand(3, 4, 4)
    boxes = torch.tensor([[0, 0, 2, 4], [-5, -5, 1, 1], [2, 2, 2, 4]])
    mixed = reference.paste(maps, boxes, torch.tensor([1, 2, 0]))
    assert mixed[0, :, :2].eq(1).all() and mixed[0, :, 2:].eq(0).all()
    assert mixed[1, 0, 0] == 2 and mixed[1].sum() == 15 + 2
    assert mixed[2].eq(2).all()
