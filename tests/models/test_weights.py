"""Loaded weights stay what they were; files that do not fit are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import StudentConfig, build_student
from co2s_fast.models.loading import checksum, read_state_dict
from co2s_fast.models.queries import concepts_of, load_queries
from co2s_fast.models.released import load_released, released_config

DINO = {"embed_dim": 64, "depth": 4, "num_heads": 2}


def clip_config(clip_files, small_decoder, **changes) -> StudentConfig:
    model, weights = clip_files
    settings = {
        "backbone": "clip",
        "model": model,
        "weights": weights,
        "levels": (0, 1, 3),
        "decoder": small_decoder,
        "text": {"source": "hash"},
    }
    return StudentConfig(**(settings | changes))


def dino_config(path, small_decoder, **changes) -> StudentConfig:
    settings = {
        "backbone": "timm",
        "model": "vit_tiny_patch16_dinov3_qkvb",
        "weights": str(path),
        "overrides": DINO,
        "levels": (0, 2, 3),
        "decoder": small_decoder,
    }
    return StudentConfig(**(settings | changes))


@pytest.fixture
def dino_file(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0, **DINO)
    state = {k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "dino.safetensors")
    return tmp_path / "dino.safetensors"


def test_clip_weights_survive_building(clip_files, small_decoder, classes):
    student = build_student(clip_config(clip_files, small_decoder), classes, seed=0)
    saved = load_file(clip_files[1])
    state = student.backbone.state_dict()
    assert state.keys() == {k for k in saved if k.startswith("visual.")}
    for name, value in state.items():
        assert torch.equal(value, saved[name]), name
    assert student.provenance["source"] == clip_files[1]
    assert student.provenance["sha256"] == checksum(student.backbone)


def test_dinov3_weights_survive_building(dino_file, small_decoder, classes):
    student = build_student(dino_config(dino_file, small_decoder), classes, seed=0)
    saved = load_file(dino_file)
    state = student.backbone.model.state_dict()
    assert state.keys() == saved.keys()
    for name, value in state.items():
        assert torch.equal(value, saved[name]), name
    seeds = [build_student(dino_config(dino_file, small_decoder), classes, seed=s) for s in (1, 2)]
    assert {s.provenance["sha256"] for s in seeds} == {student.provenance["sha256"]}


def test_training_moves_only_attention(dino_file, small_decoder, classes):
    student = build_student(dino_config(dino_file, small_decoder), classes, seed=0)
    optimizer = torch.optim.AdamW(student.parameter_groups(1e-2, 0.1, 1.0, 1.0))
    student(torch.rand(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    for name, value in load_file(dino_file).items():
        same = torch.equal(student.backbone.model.state_dict()[name], value)
        assert same == (".attn." not in name), name


def test_a_bare_student_takes_a_state_dict(clip_files, small_decoder, classes, recwarn):
    text = {"source": "open_clip", "model": clip_files[0], "weights": clip_files[1]}
    config = clip_config(clip_files, small_decoder, text=text)
    trained = build_student(config, classes, seed=0).eval()
    absent = {"weights": "/nowhere/x.pth", "text": {"source": "file", "path": "/nowhere/x.npy"}}
    gone = clip_config(clip_files, small_decoder, **absent)
    bare = build_student(gone, classes, seed=1, load=False).eval()
    assert not recwarn.list
    assert bare.config is gone
    assert bare.queries.isnan().all()
    bare.load_state_dict(trained.state_dict())
    images = torch.rand(1, 3, 40, 64)
    assert torch.equal(bare(images), trained(images))


def test_checksum_sees_every_bit():
    layer = torch.nn.Linear(3, 2)
    before = checksum(layer)
    with torch.no_grad():
        layer.bias[0] = torch.nextafter(layer.bias[0], torch.tensor(9.0))
    assert checksum(layer) != before


def test_meta_style_names_load(dino_file, small_decoder, classes, tmp_path):
    official = {}
    for name, value in load_file(dino_file).items():
        name = name.replace("reg_token", "storage_tokens")
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        official[name] = value
    for i in range(4):
        q, v = (official.pop(f"blocks.{i}.attn.{part}_bias") for part in "qv")
        official[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 9.0), v])
        official[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(64)
    official["mask_token"] = torch.zeros(1, 64)
    torch.save(official, tmp_path / "meta.pth")
    plain = build_student(dino_config(dino_file, small_decoder), classes, seed=0)
    meta = build_student(dino_config(tmp_path / "meta.pth", small_decoder), classes, seed=0)
    assert meta.provenance["sha256"] == plain.provenance["sha256"]
    official["blocks.0.attn.qkv.bias_mask"].fill_(torch.nan)
    torch.save(official, tmp_path / "bad.pth")
    with pytest.raises(DataError, match=r"bad\.pth.*bias_mask is not 1, 0, 1"):
        build_student(dino_config(tmp_path / "bad.pth", small_decoder), classes, seed=0)


def test_files_that_do_not_fit(dino_file, small_decoder, classes, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        build_student(dino_config(tmp_path / "x.pth", small_decoder), classes, seed=0)
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"x\.pth: cannot be read"):
        build_student(dino_config(tmp_path / "x.pth", small_decoder), classes, seed=0)
    state = load_file(dino_file)
    state["norm.weight"] = torch.zeros(3)
    state["other"] = state.pop("cls_token")
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"missing: 1.*cls_token.*unexpected: 1.*shapes: 1"):
        build_student(dino_config(tmp_path / "x.pth", small_decoder), classes, seed=0)


def test_pickled_objects_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match=r"evil\.pth: cannot be read"):
        read_state_dict(tmp_path / "evil.pth")


def test_text_queries_from_a_tower(clip_files, small_decoder, classes):
    import open_clip

    text = {"source": "open_clip", "model": clip_files[0], "weights": clip_files[1]}
    student = build_student(clip_config(clip_files, small_decoder, text=text), classes, seed=0)
    assert not isinstance(student.queries, torch.nn.Parameter)
    assert "queries" in student.state_dict()

    model = open_clip.CLIP(**json.loads(Path(clip_files[0]).read_text()))
    model.load_state_dict(load_file(clip_files[1]))
    prompts = [f"a photo of a {c}" for c in ("building", "residential building", "high-rise")]
    with torch.no_grad():
        rows = model.eval().encode_text(open_clip.SimpleTokenizer(context_length=20)(prompts))
    expected = rows.mean(0) / rows.mean(0).norm()
    torch.testing.assert_close(student.queries[0], expected)
    torch.testing.assert_close(student.queries.norm(dim=1), torch.ones(5))


def test_the_text_towers_width_must_fit(dino_file, clip_files, small_decoder, classes):
    text = {"source": "open_clip", "model": clip_files[0], "weights": clip_files[1]}
    config = dino_config(dino_file, small_decoder, queries="text", text=text)
    with pytest.raises(UsageError, match=r"width 48, but .* has 64 channels"):
        build_student(config, classes, seed=0)


def test_an_untrained_text_tower_is_refused(clip_files, small_decoder, classes):
    text = {"source": "open_clip", "model": clip_files[0], "weights": None}
    with pytest.raises(UsageError, match="needs text weights"):
        build_student(clip_config(clip_files, small_decoder, text=text), classes, seed=0)


def test_published_embeddings_are_used(shared_dir, classes, tmp_path, clip_files, small_decoder):
    path = shared_dir / "data" / "text-embeddings" / "potsdam_conceptavg5_single.npy"
    array = np.load(path)
    found = load_queries(path, 6, 512)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(array.astype(np.float32)))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6), rtol=0, atol=5e-4)
    np.save(tmp_path / "five.npy", array[:5, :48])
    text = {"source": "file", "path": str(tmp_path / "five.npy")}
    student = build_student(clip_config(clip_files, small_decoder, text=text), classes, seed=0)
    assert torch.equal(student.queries, found[:5, :48])
    assert student.provenance["queries"] == f"file {tmp_path / 'five.npy'}"
    text["path"] = str(path)
    with pytest.raises(DataError, match=r"found shape \(6, 512\), expected \(5, 48\)"):
        build_student(clip_config(clip_files, small_decoder, text=text), classes, seed=0)


def test_bad_query_files(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}] * 2, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: not a readable"):
        load_queries(tmp_path / "objects.npy", 2, 4)
    np.save(tmp_path / "nan.npy", np.full((2, 4), np.nan))
    with pytest.raises(DataError, match="finite floats"):
        load_queries(tmp_path / "nan.npy", 2, 4)
    np.save(tmp_path / "whole.npy", np.ones((2, 4), np.int64))
    with pytest.raises(DataError, match="expected finite floats, found int64"):
        load_queries(tmp_path / "whole.npy", 2, 4)
    with pytest.raises(DataError, match=r"gone\.npy: not a readable"):
        load_queries(tmp_path / "gone.npy", 2, 4)


def test_hashed_queries_are_fixed_and_apart(clip_files, small_decoder, classes):
    first, second = (
        build_student(clip_config(clip_files, small_decoder), classes, seed=s).queries
        for s in (0, 1)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    cosine = first @ first.T - torch.eye(5)
    assert cosine.abs().max() < 0.7


def test_hashed_queries_do_not_depend_on_the_spelling(clip_files, small_decoder):
    names = ("Bare_Soil", "water"), ("bare soil", "water")
    first, second = (
        build_student(clip_config(clip_files, small_decoder),
                      [SimpleNamespace(name=n, concepts=[]) for n in each], seed=0).queries
        for each in names
    )  # fmt: skip
    assert torch.equal(first, second)


def test_the_class_name_comes_first(classes):
    assert concepts_of(classes[0]) == ["building", "residential building", "high-rise"]
    assert concepts_of(classes[4]) == ["water", "lake"]
    assert concepts_of(classes[1]) == ["land"]


def released_names(student, backbone: str) -> dict[str, torch.Tensor]:
    """A state dict as the released trainer saves it, made from one of ours."""
    own = student.state_dict()
    official = {}
    for name, value in own.items():
        if name == "queries":
            official["_cached_text" if backbone == "clip" else "text_provider.emb.weight"] = value
        elif name.startswith("decoder."):
            official["decode_head." + released_decoder_name(name[8:])] = value
        elif backbone == "clip":
            key, value = released_clip_entry(name.removeprefix("backbone.visual."), value)
            official["backbone." + key] = value
        elif not name.endswith("v_bias"):
            if name.endswith("q_bias"):
                other = own[name.replace("q_bias", "v_bias")]
                value = torch.cat([value, torch.zeros_like(value), other])
            key = name.removeprefix("backbone.model.").replace("reg_token", "storage_tokens")
            key = re.sub(r"gamma_(\d)", r"ls\1.gamma", key).replace("q_bias", "qkv.bias")
            official["backbone." + key] = value
    return {f"module.{name}": value for name, value in official.items()}


def released_clip_entry(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    if name == "class_embedding":
        return "cls_token", value[None, None]
    if name == "positional_embedding":
        return "pos_embed", value[None]
    if name == "proj":
        return "proj.weight", value.T[..., None, None]
    for ours, theirs in [
        ("conv1.", "patch_embed.projection."),
        ("ln_pre.", "ln0."),
        ("ln_post.", "ln1."),
        ("transformer.resblocks.", "layers."),
        (".attn.", ".attn.attn."),
        (".ln_", ".ln"),
        (".mlp.c_fc.", ".ffn.layers.0.0."),
        (".mlp.c_proj.", ".ffn.layers.1."),
    ]:
        name = name.replace(ours, theirs)
    return name, value


def released_decoder_name(name: str) -> str:
    stage = re.match(r"ups\.(\d)\.(\w+)\.(\w+)", name)
    if stage:
        part = {"conv1": "conv.0", "norm1": "conv.1", "conv2": "conv.3", "norm2": "conv.4"}
        return f"up{int(stage[1]) + 1}.{part.get(stage[2], stage[2])}.{stage[3]}"
    for ours, theirs in [
        (r"^similarity\.", "conv1."),
        (r"^text\.", "text_proj.0."),
        (r"^skips\.(\d)\.", r"skip_proj.\1.0."),
        (r"^aspp\.project\.", "aspp.project.0."),
        (r"^aspp\.norm\.", "aspp.project.1."),
        (r"^aspp\.convs\.(\d)\.", r"aspp.aspp_convs.\1.0."),
        (r"^aspp\.norms\.(\d)\.", r"aspp.aspp_convs.\1.1."),
        (r"^aspp\.pool_conv\.", "aspp.aspp_convs.4.gap.1."),
        (r"^aspp\.pool_norm\.", "aspp.aspp_convs.4.gap.2."),
        (r"^layers\.(\d)\.norm(\d)\.", r"layers.\1.transformer.ln\2."),
        (r"^layers\.(\d)\.attention\.", r"layers.\1.transformer.attn.attn."),
        (r"^layers\.(\d)\.fc1\.", r"layers.\1.transformer.ffn.layers.0.0."),
        (r"^layers\.(\d)\.fc2\.", r"layers.\1.transformer.ffn.layers.1."),
    ]:
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:backbone:UserWarning")
@pytest.mark.parametrize(("backbone", "entries"), [("clip", 221), ("timm", 257)])
def test_released_student(backbone, entries, classes, tmp_path):
    student = build_student(released_config(backbone), classes, seed=3)
    state = released_names(student, backbone)
    if backbone == "timm":
        state["module.backbone.mask_token"] = torch.zeros(1, 768)
        state["module.backbone.rope_embed.periods"] = torch.ones(16, dtype=torch.bfloat16)
        mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(768)
        state |= {f"module.backbone.blocks.{i}.attn.qkv.bias_mask": mask for i in range(12)}
    assert len(state) == entries
    torch.save({"model": state, "optimizer": {}, "epoch": 3}, tmp_path / "best.pth")
    loaded = load_released(tmp_path / "best.pth", classes)
    assert loaded.provenance["reinitialised"] == (backbone == "timm")  # timm, too, starts at 1e-5
    found = loaded.state_dict()
    for name, value in student.state_dict().items():
        if not value.isnan().any():  # a CLIP student of this kind waits for its class vectors
            assert torch.equal(found[name], value), name
    with pytest.raises(DataError, match="trained for 5 classes, the dataset has 4"):
        load_released(tmp_path / "best.pth", classes[:4])


def test_not_a_released_checkpoint(clip_files, classes):
    with pytest.raises(DataError, match="neither a released CLIP nor"):
        load_released(clip_files[1], classes)
