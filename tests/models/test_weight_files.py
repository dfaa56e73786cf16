"""Weight files that are larger than usual, damaged, or not what they are taken for."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.errors import DataError
from co2s_fast.models.weights.architecture import clip_architecture, ssm_architecture
from co2s_fast.models.weights.convert import verify


@pytest.mark.parametrize(("width", "family", "heads"), [
    (1280, "vit", 16), (1280, "dinov3", 20), (1536, "dinov2", 24), (1024, "vit", 16),
])  # fmt: skip
def test_heads_of_the_larger_models(width, family, heads):
    state = {"patch_embed.proj.weight": torch.zeros(width, 3, 14, 14),
             "blocks.0.mlp.fc1.weight": torch.zeros(4 * width, width)}  # fmt: skip
    state |= {"vit": {}, "dinov2": {"blocks.0.ls1.gamma": torch.zeros(width)},
              "dinov3": {"reg_token": torch.zeros(1)}}[family]  # fmt: skip
    if family != "dinov3":
        state["pos_embed"] = torch.zeros(1, 257, width)
    assert ssm_architecture(state, "x")[1].get("num_heads", 12) == heads


def test_a_width_that_no_published_model_has():
    state = {"patch_embed.proj.weight": torch.zeros(1300, 3, 14, 14),
             "blocks.0.mlp.fc1.weight": torch.zeros(5200, 1300)}  # fmt: skip
    with pytest.raises(DataError, match=r"1300 channels wide.*up to 1024 and 1280, 1408"):
        ssm_architecture(state, "x")
    clip = {"visual.conv1.weight": torch.zeros(1280, 3, 14, 14),
            "visual.proj": torch.zeros(1280, 1024),
            "visual.positional_embedding": torch.zeros(257, 1280),
            "visual.transformer.resblocks.31.x": torch.zeros(1)}  # fmt: skip
    assert clip_architecture(clip, "x", quick=False)[1]["vision_cfg"]["head_width"] == 80


def test_a_released_student_is_no_pretrained_weights(tmp_path):
    torch.save({"backbone.storage_tokens": torch.zeros(1), "decode_head.head.weight":
                torch.zeros(1)}, tmp_path / "best.pth")  # fmt: skip
    with pytest.raises(DataError, match="import-checkpoint"):
        verify(tmp_path / "best.pth")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(("content", "said"), [
    ({"model": {"w": torch.zeros(1)}, "extra": Evil()}, "an object of .*print"),
    ({"state": {0: {"step": torch.zeros(1)}}, "param_groups": []}, "entries without names"),
])  # fmt: skip
def test_what_a_file_may_not_hold(tmp_path, capfd, content, said):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(DataError, match=said) as error:
        verify(tmp_path / "a.pth")
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)
    assert "executed" not in capfd.readouterr().out


def test_a_damaged_zip_is_one_line(tmp_path):
    torch.save({"w": torch.zeros(100)}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    place = content.rfind(b"PK\x01\x02")
    content[place : place + 4] = b"XXXX"
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.pth: cannot be read"):
        verify(tmp_path / "a.pth")
