from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from co2s_fast.engine.sliding_window import (
    resize_logits,
    sliding_window,
    stream,
    upsample,
    window_rows,
    window_starts,
)


class Toy(nn.Module):
    """The toy network of the reference data; the spatial mean makes windows differ."""

    def __init__(self, data) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1)
        self.load_state_dict(
            {
                key.removeprefix("model/"): torch.from_numpy(data[key])
                for key in data.files
                if key.startswith("model/")
            }
        )
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        hidden = self.c1(images)
        return self.c2(torch.tanh(hidden) + hidden.mean((2, 3), keepdim=True))


@pytest.fixture
def toy(golden):
    data = golden("sliding_window.npz")
    return Toy(data).eval().requires_grad_(False), data


@pytest.fixture
def cases(shared_dir):
    path = shared_dir / "golden" / "metrics.json"
    if not path.is_file():
        pytest.skip(f"golden file {path} is not here")
    return json.loads(path.read_text())["sliding_window"]


OPTIONS = {
    "zegclip_sliding_window": {},
    "sliding_window": {"border": "cut", "average": "probability_sum"},
    "padded_sliding_window": {"border": "pad", "average": "probability_sum"},
}


@pytest.mark.parametrize("batch_windows", [1, 5])
@pytest.mark.parametrize(
    "case",
    [
        "zegclip_70x90",
        "zegclip_exact",
        "zegclip_small_image",
        "zegclip_mask_other_size",
        "sliding_window_70x90",
        "padded_sliding_window_70x90",
    ],
)
def test_official_windows(toy, cases, case, batch_windows):
    network, data = toy
    about = cases[case]
    height, width = about["img"]
    logits = sliding_window(
        network,
        torch.from_numpy(data[f"img_{height}x{width}"]),
        crop=about["crop"],
        stride=about["stride"] or about["crop"] * 2 // 3,
        batch_windows=batch_windows,
        **OPTIONS[about["mode"]],
    )
    assert sum(shape[0] for shape in network.seen) == about["windows"]
    logits = resize_logits(logits, *about["mask"])
    expected = torch.from_numpy(data[f"{case}/final"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) == torch.from_numpy(data[f"{case}/pred"])).float().mean() > 0.9999


def test_starts_reach_the_border_exactly():
    assert window_starts(512, 512, 426) == [0]
    assert window_starts(513, 512, 426) == [0, 1]
    assert window_starts(1024, 512, 426) == [0, 426, 512]
    assert window_starts(20, 32, 26) == [0]
    assert window_starts(70, 32, 26, "cut") == [0, 26, 52]


def test_windows_of_an_image_smaller_than_the_crop_have_its_size():
    (row,) = window_rows(20, 45, 32, 26)
    assert [(w.x, w.height, w.width) for w in row] == [(0, 20, 32), (13, 20, 32)]


@pytest.mark.parametrize("crop,stride,said", [(0, 1, "at least 1"), (8, 9, "at most the crop")])
def test_bad_windows_are_refused(crop, stride, said):
    with pytest.raises(ValueError, match=said):
        window_starts(20, crop, stride)


@pytest.mark.parametrize("blend", ["uniform", "hann"])
def test_a_local_network_sees_no_seams(blend):
    images = torch.rand(2, 3, 50, 37, dtype=torch.float64)
    weight = torch.rand(4, 3, dtype=torch.float64)

    def network(x):
        return torch.einsum("kc,bchw->bkhw", weight, x)

    tiled = sliding_window(network, images, crop=16, stride=11, blend=blend)
    torch.testing.assert_close(tiled, network(images), rtol=1e-12, atol=1e-12)


def test_bands_come_in_order_and_cover_the_image():
    images = torch.rand(1, 3, 41, 20)
    bands = list(
        stream(
            lambda x: x,
            lambda w: images[..., w.y : w.y + w.height, w.x : w.x + w.width],
            41,
            20,
            crop=16,
            stride=10,
        )
    )
    assert [top for top, _ in bands] == [0, 10, 20, 25]
    torch.testing.assert_close(torch.cat([band for _, band in bands], 2), images)


def test_coarse_logits_are_upsampled_and_padding_is_cut_off():
    logits = torch.rand(1, 2, 4, 8)
    torch.testing.assert_close(
        upsample(logits, 16, 32), F.interpolate(logits, (16, 32), mode="bilinear")
    )
    cut = upsample(logits, 13, 27, patch=16)
    torch.testing.assert_close(cut, F.interpolate(logits, (16, 32), mode="bilinear")[..., :13, :27])


def test_patch_size_of_the_network_is_used():
    class Padding(nn.Module):
        patch_size = 8

        def forward(self, images):
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % 8, 0, -height % 8))
            return F.avg_pool2d(images, 2)

    images = torch.rand(1, 3, 12, 20)
    whole = sliding_window(Padding(), images, crop=32, stride=16)
    coarse = F.avg_pool2d(F.pad(images, (0, 4, 0, 4)), 2)
    expected = F.interpolate(coarse, (16, 24), mode="bilinear")[..., :12, :20]
    torch.testing.assert_close(whole, expected)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(toy):
    network, data = toy
    images = torch.from_numpy(data["img_70x90"])
    on_cpu = sliding_window(network, images, crop=32, stride=26)
    on_gpu = sliding_window(network.cuda(), images.cuda(), crop=32, stride=26)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)  # TF32 convolutions
