"""BEiT's relative position biases on other grids."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from scipy.interpolate import RectBivariateSpline
from timm.models.beit import RelativePositionBias

from co2s_fast.errors import UsageError
from co2s_fast.models.relative import _geometric, bias_of, free_grid, resize_biases
from co2s_fast.models.ssm import TimmBackbone


def table(window, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
    return torch.randn(count, heads, generator=generator, dtype=torch.float64)


def test_the_same_grid_keeps_the_table():
    given = table((4, 4))
    assert resize_biases(given, (4, 4), (4, 4)) is given


@pytest.mark.parametrize("grid", [(7, 9), (3, 6), (14, 14)])
def test_against_a_spline_of_scipy(grid):
    window = (5, 5)
    given = table(window)
    found = resize_biases(given, window, grid)
    assert torch.equal(found[-3:], given[-3:])
    rows, columns = (_geometric(4, side - 1) for side in grid)
    wanted = [np.arange(1 - side, side).clip(k[0], k[-1])
              for side, k in zip(grid, (rows, columns), strict=True)]  # fmt: skip
    for head in range(2):
        values = given[:-3, head].reshape(9, 9).numpy()
        expected = RectBivariateSpline(rows, columns, values)(*wanted)
        ours = found[:-3, head].reshape(2 * grid[0] - 1, 2 * grid[1] - 1)
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-9)


def test_distances_grow_by_a_ratio_between_1_01_and_1_5():
    far = [1, 2.5, 4.75, 8.125]  # a window of 9 tokens reaches no farther
    assert _geometric(4, 100) == pytest.approx([-d for d in far[::-1]] + [0, *far], abs=1e-4)
    assert _geometric(4, 2)[5:] == pytest.approx([1, 2.01, 3.0301, 4.060401], abs=1e-4)
    steps = np.diff(_geometric(4, 6)[5:])
    assert steps.sum() == pytest.approx(5, abs=1e-4)
    assert steps[1:] / steps[:-1] == pytest.approx([steps[0]] * 2, abs=1e-4)


def test_a_window_of_one_token_has_one_bias_for_all_distances():
    given = table((1, 1))
    found = bias_of(given, (1, 1), (2, 2))
    assert found.shape == (2, 5, 5)
    assert (found[:, 1:, 1:] == given[0, :, None, None]).all()


def test_near_tokens_keep_their_biases():
    """On a finer grid, distances 0 and 1 have what the table has for them."""
    given = table((14, 14))
    found = resize_biases(given, (14, 14), (32, 32))
    before, after = given[:-3, 0].reshape(27, 27), found[:-3, 0].reshape(63, 63)
    torch.testing.assert_close(after[30:33, 30:33], before[12:15, 12:15])
    assert _geometric(13, 31)[-1] == pytest.approx(31, abs=1e-3)


def test_a_constant_stays_one_and_gradients_flow():
    given = torch.full((52, 2), 0.7, dtype=torch.float64, requires_grad=True)
    found = bias_of(given, (4, 4), (6, 3))
    assert found.shape == (2, 19, 19)
    torch.testing.assert_close(found, torch.full_like(found, 0.7))
    assert torch.autograd.gradcheck(lambda t: bias_of(t, (2, 2), (3, 2)), table((2, 2), 1)
                                    .requires_grad_())  # fmt: skip


def test_the_index_is_timms():
    own = RelativePositionBias((3, 4), 2)
    with torch.no_grad():
        own.relative_position_bias_table.normal_()
    assert torch.equal(bias_of(own.relative_position_bias_table, (3, 4), (3, 4)), own())


@pytest.mark.parametrize("shared", [False, True])
def test_any_size_in_any_mode(shared):
    """Compiled (the blocks run as they are), after inference mode, with checkpoints, copied."""
    options = {"use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
    model = timm.create_model("beitv2_base_patch16_224", embed_dim=64, depth=2, num_heads=1,
                              num_classes=0, img_size=64, use_fc_norm=False, **options)  # fmt: skip
    backbone = TimmBackbone(model, (0, 1))
    compiled = torch.compile(backbone, backend="eager")
    for height, width in [(48, 96), (64, 64), (80, 32)]:
        images = torch.rand(1, 3, height, width)
        with torch.inference_mode():
            found = compiled(images)
        expected = backbone(images)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        expected[-1].sum().backward()
    model.set_grad_checkpointing(True)
    backbone(images)[-1].sum().backward()
    copy = deepcopy(backbone)
    copy(images[..., :16])
    assert backbone(images)[-1].shape[-2:] == (5, 2)


def test_absolute_positions_are_refused():
    model = timm.create_model("beitv2_base_patch16_224", use_abs_pos_emb=True, embed_dim=64,
                              depth=1, num_heads=1)  # fmt: skip
    with pytest.raises(UsageError, match="absolute positions"):
        free_grid(model)
