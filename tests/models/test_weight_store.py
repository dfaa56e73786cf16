"""Weights by name: where they are looked for, how they come, and what is said where they cannot."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from co2s_fast.cli import main
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import StudentConfig, build_student
from co2s_fast.models.inflate import NORMALIZATION
from co2s_fast.models.weights import registry, store
from co2s_fast.models.weights.architecture import clip_architecture, ssm_architecture
from co2s_fast.models.weights.choose import levels, put_students, settings, students_for
from co2s_fast.models.weights.convert import import_weights, verify
from co2s_fast.models.weights.layouts import LAYOUTS
from co2s_fast.models.weights.registry import REGISTRY, WeightEntry

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 1, "img_size": 64}


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Path:
    """Every cache in an empty folder."""
    monkeypatch.setenv("CO2S_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """HF_HUB_OFFLINE=1, and sockets that fail the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def vit() -> torch.nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=0, **SMALL)


@pytest.fixture
def mae_file(vit, tmp_path) -> Path:
    torch.save({"model": vit.state_dict()}, tmp_path / "small_mae.pth")
    return tmp_path / "small_mae.pth"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def call(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def put(monkeypatch, **changes) -> WeightEntry:
    """A small entry called "small"."""
    values = {"name": "small", "kind": "ssm", "model": "vit_base_patch16_224", "layout": "mae",
              "licence": "none", "origin": "a test", "overrides": SMALL}  # fmt: skip
    entry = WeightEntry(**(values | changes))
    monkeypatch.setitem(REGISTRY, entry.name, entry)
    return entry


def test_entries_are_whole():
    layouts = {layout.name: layout.kind for layout in LAYOUTS}
    for entry in REGISTRY.values():
        assert layouts[entry.layout] == entry.kind, entry.name
        assert entry.tag or entry.hub or entry.url or entry.manual, entry.name
        assert not entry.hub or entry.files, entry.name
        if entry.kind == "ssm":
            assert timm.is_model(entry.model), entry.name
            cfg = timm.get_pretrained_cfg(f"{entry.model}.{entry.tag}") if entry.tag else None
        else:
            import open_clip

            assert open_clip.get_model_config(entry.model) is not None, entry.name
            cfg = None
        if cfg is not None:  # what timm says of its own copy
            assert (cfg.mean, cfg.std) == NORMALIZATION[entry.normalization], entry.name
            assert cfg.input_size[-1] == entry.size, entry.name
            assert cfg.hf_hub_id == entry.hub, entry.name


def test_settings_of_every_name_build_a_configuration():
    for entry in REGISTRY.values():
        config = StudentConfig(**settings(entry.kind, entry.name))
        assert config.weights == entry.name
        assert config.odd_sizes == ("resize" if entry.patch == 14 else "pad")
        assert config.levels[-1] == entry.depth - (entry.kind == "ssm")
        if entry.kind == "clip":
            assert (config.text.model, config.text.weights) == (entry.model, entry.name)


def published(entry: WeightEntry) -> dict[str, torch.Tensor]:
    """Names and shapes of the model that a name stands for, at full size, without memory."""
    from co2s_fast.models.weights.convert import skeleton
    from co2s_fast.models.weights.layouts import Converted, layout_named

    layout = layout_named("open_clip" if entry.kind == "clip" else "timm")
    words = {"token_embedding.weight": torch.zeros(1)}  # a whole model
    return skeleton(Converted(layout, words, entry.model, dict(entry.overrides)))


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "beitv2-in22k"])
def test_the_published_shapes_say_which_model_it_is(name):
    """Else `weights import FILE --as NAME` would refuse the very file it is for."""
    entry = REGISTRY[name]
    state = published(entry)
    if entry.kind == "clip":
        quick = entry.model.endswith("quickgelu")
        found = clip_architecture(state, "x", quick=quick)
    else:
        found = ssm_architecture(state, "x")
    assert found == (entry.model, dict(entry.overrides))


def test_a_name_beside_another_model(classes):
    config = StudentConfig(backbone="timm", model="vit_small_patch16_224", weights="ibot")
    with pytest.raises(UsageError, match="for model vit_base_patch16_224, not of kind ssm for"):
        build_student(config, classes, seed=0)


def test_levels_follow_the_depth():
    assert (levels("clip", 12), levels("ssm", 12)) == ([0, 4, 12], [2, 7, 11])
    assert (levels("clip", 24), levels("ssm", 24)) == ([0, 8, 24], [5, 15, 23])
    assert levels("ssm", 3) == [0, 1, 2]


def test_unknown_names_and_kinds():
    with pytest.raises(UsageError, match=r"--ssm dinov9: expected one of dinov3, .*, or a file"):
        settings("ssm", "dinov9")
    with pytest.raises(UsageError, match=r"--clip mae \(which is of kind ssm\)"):
        settings("clip", "mae")


def test_recipes_keep_what_is_not_of_the_model(monkeypatch):
    monkeypatch.setattr(store, "locate", lambda entry: Path("here"))
    recipe = {"seed": 1, "students": {
        "clip": {"backbone": "clip", "model": "x", "weights": "y", "trainable": "full"},
        "ssm": {"backbone": "timm", "model": "tiny-ssm", "stem": "conv", "feature_dropout": 0.1},
    }}  # fmt: skip
    students = put_students(recipe, students_for((), ("mae", "ibot")))["students"]
    assert list(students) == ["ssm", "ssm2"]
    assert [each["feature_dropout"] for each in students.values()] == [0.1, 0.1]
    assert [each["weights"] for each in students.values()] == ["mae", "ibot"]
    assert "stem" not in students["ssm"]
    kept = put_students(recipe, students_for(("remoteclip",), ()))["students"]
    assert kept["ssm"] == recipe["students"]["ssm"]
    assert (kept["clip"]["model"], kept["clip"]["trainable"]) == ("ViT-L-14", "full")
    recipe["students"]["ssm2"] = {"feature_dropout": 0.3}  # as of a run with two: not the first's
    again = put_students(recipe, students_for((), ("mae", "ibot")))["students"]
    assert [each["feature_dropout"] for each in again.values()] == [0.1, 0.3]


def test_import_by_name_then_offline(monkeypatch, mae_file, vit, places, offline, classes,
                                     small_decoder):  # fmt: skip
    put(monkeypatch, normalization="satellite")
    path = import_weights(mae_file, name="small")
    assert path == places / "weights" / "small.safetensors"
    assert path.stat().st_mode == mae_file.stat().st_mode  # for colleagues to read
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert json.loads(said["std"]) == [0.213, 0.156, 0.143]
    assert (said["source_sha256"], said["model"]) == (sha(mae_file), "vit_base_patch16_224")
    assert json.loads(said["overrides"]) == SMALL
    for value in ("small", str(path)):
        config = StudentConfig(**{**settings("ssm", value), "levels": [0, 1, 2]},
                               decoder=small_decoder)  # fmt: skip
        assert config.normalization == "satellite"
        student = build_student(config, classes, seed=0)
        for name, tensor in vit.state_dict().items():
            assert torch.equal(student.backbone.model.state_dict()[name], tensor)
    assert "as written" in call("weights", "verify").output


def test_a_mean_of_its_own(mae_file, tmp_path, classes, small_decoder):
    path = import_weights(mae_file, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        said = file.metadata()
    said |= {"mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 0.6]"}
    save_file(load_file(path), path, metadata=said)
    config = StudentConfig(**settings("ssm", str(path)), decoder=small_decoder)
    student = build_student(config, classes, seed=0)
    torch.testing.assert_close(student.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(student.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_import_as_another_model_is_refused(mae_file):
    result = call("weights", "import", mae_file, "--as", "mae-file")
    assert result.exit_code == 1
    assert "do not fit vit_base_patch16_224: missing: " in result.output
    assert "blocks.11.norm2.weight" in result.output
    assert call("weights", "import", mae_file).exit_code == 2
    wrong = call("weights", "import", mae_file, "-o", "x.safetensors", "--layout", "nonsense")
    assert wrong.exit_code == 2
    assert "expected one of clip-hf" in wrong.output


def test_a_published_checksum_holds(monkeypatch, mae_file):
    good = sha(mae_file)
    put(monkeypatch, sha256=good[:8])
    import_weights(mae_file, name="small")
    put(monkeypatch, sha256="73cec8be")
    with pytest.raises(DataError, match=f"sha256 {good}, a test publishes 73cec8be"):
        import_weights(mae_file, name="small")


def test_fetch_a_file(monkeypatch, mae_file, places):
    put(monkeypatch, url=mae_file.as_uri())
    result = call("weights", "fetch", "small", "-o", places / "usb")
    assert result.exit_code == 0, (result.output, result.exception)
    stored = places / "weights" / "small.pth"
    assert sha(stored) == sha(places / "usb" / "small.pth") == sha(mae_file)
    for folder in ("weights", "usb"):
        noted = json.loads((places / folder / "checksums.json").read_text())
        assert noted["small"]["sha256"] == sha(mae_file)
    verified = call("weights", "verify")
    assert verified.exit_code == 0
    assert "layout timm, vit_base_patch16_224" in verified.output
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    verified = call("weights", "verify")
    assert verified.exit_code == 1
    assert "has sha256" in verified.output
    assert str(stored) in call("weights", "list").output


def test_a_wrong_download_leaves_nothing(monkeypatch, mae_file, places):
    put(monkeypatch, url=mae_file.as_uri(), sha256="0" * 64)
    result = call("weights", "fetch", "small")
    assert result.exit_code == 1
    assert "invalid hash value" in result.output
    assert not list((places / "weights").iterdir())
    put(monkeypatch, url=(places / "gone.pth").as_uri())
    result = call("weights", "fetch", "small")
    assert result.exit_code == 1
    assert "error: weights small: not fetched from file://" in result.output


@pytest.mark.parametrize("name", ["dinov3", "mae", "beitv2", "remoteclip", "clip-openai"])
def test_offline_says_what_to_bring(name, offline, classes, small_decoder, places):
    entry = REGISTRY[name]
    weights = [name] if entry.tag is None else [name, entry.tag]
    for value in weights:
        config = StudentConfig(**{**settings(entry.kind, name), "weights": value},
                               decoder=small_decoder)  # fmt: skip
        with pytest.raises(DataError) as error:
            build_student(config, classes, seed=0)
        told = str(error.value)
        assert f"co2s-fast weights fetch {name} --out DIR" in told
        assert str(places / "weights") in told
        assert "\n" not in told


def test_offline_is_an_option_of_every_command_that_loads(monkeypatch, places):
    monkeypatch.setattr(socket, "socket", None)
    for command in ("train", "eval", "predict"):
        assert "--offline" in call(command, "--help").output
    result = call("weights", "fetch", "ibot", "--offline")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert result.exit_code == 1
    assert "works offline" in result.output
    # A tag that no entry has goes through the library, which must obey, too.
    config = StudentConfig(backbone="timm", model="vit_tiny_patch16_224", weights="augreg_in21k")
    with pytest.raises(DataError, match=r"weights 'augreg_in21k' of vit_tiny_patch16_224"):
        build_student(config, [SimpleNamespace(name="a", concepts=[])], seed=0)


def test_training_finds_out_before_it_prepares_data(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train", "--dataset", "demo", "--ssm", "mae")
    assert result.exit_code == 1
    assert "weights fetch mae" in result.output
    assert not (tmp_path / "data").exists()
    assert "nothing is fetched" in call("doctor").output


def test_what_no_program_can_fetch():
    with pytest.raises(UsageError, match=r"drive\.google\.com.*weights import FILE --as simmim"):
        store.fetch(REGISTRY["simmim"])


def cached(places: Path, repo: str, file: str, state: dict[str, torch.Tensor]) -> Path:
    """A file in Hugging Face's cache, as a download leaves it."""
    base = places / "hub" / ("models--" + repo.replace("/", "--"))
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("a" * 40)
    path = base / "snapshots" / ("a" * 40) / file
    path.parent.mkdir(parents=True)
    save_file(state, path) if file.endswith("safetensors") else torch.save(state, path)
    return path


def test_a_tag_from_the_hubs_cache_through_timm(monkeypatch, places, offline, classes,
                                                small_decoder):  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", num_classes=21843)
    repo = "timm/vit_tiny_patch16_224.augreg_in21k"
    path = cached(places, repo, "model.safetensors", model.state_dict())
    put(monkeypatch, model="vit_tiny_patch16_224", layout="timm", tag="augreg_in21k", hub=repo,
        files=("model.safetensors",), overrides={})  # fmt: skip
    assert store.locate(REGISTRY["small"]) == path
    config = StudentConfig(**settings("ssm", "small"), decoder=small_decoder)
    student = build_student(config, classes, seed=0)
    own = student.backbone.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items() if k in own)
    assert len(own) == len(model.state_dict()) - 2  # the classifier


def test_a_file_from_the_hubs_cache(monkeypatch, places, offline, vit, classes, small_decoder):
    cached(places, "someone/small", "small.pt", vit.state_dict())
    put(monkeypatch, hub="someone/small", files=("gone.safetensors", "small.pt"))
    config = StudentConfig(**{**settings("ssm", "small"), "levels": [0, 1, 2]},
                           decoder=small_decoder)  # fmt: skip
    student = build_student(config, classes, seed=0)
    assert torch.equal(student.backbone.model.cls_token, vit.cls_token)


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face as a download of a public file asks for."""

    content = b"weights of the second name"

    def answer(self) -> None:
        there = self.path == "/someone/small/resolve/main/second.bin"
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", "b" * 40)
        if there:
            self.send_header("ETag", '"e1"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.content) if there else 0))
        self.end_headers()
        if there and self.command == "GET":
            self.wfile.write(self.content)

    do_GET = do_HEAD = answer

    def log_message(self, *args) -> None:
        pass


@pytest.mark.slow
def test_download_from_a_hub(places):
    """The real huggingface_hub, against a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from co2s_fast.models.weights.registry import REGISTRY, WeightEntry;"
        "from co2s_fast.cli import main;"
        "REGISTRY['small'] = WeightEntry('small', 'ssm', 'vit_base_patch16_224', 'timm', 'none',"
        "'a test', hub='someone/small', files=('first.safetensors', 'second.bin'));"
        "main(['weights', 'fetch', 'small', '-o', 'out'])"
    )
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
           "HF_HOME": str(places / "home"), "HF_HUB_DISABLE_XET": "1",
           "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=places, env=env,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert (places / "out" / "small.bin").read_bytes() == Hub.content
    noted = json.loads((places / "weights" / "checksums.json").read_text())["small"]
    assert noted["sha256"] == hashlib.sha256(Hub.content).hexdigest()


def test_verify_finds_changed_tensors(mae_file, tmp_path):
    path = import_weights(mae_file, tmp_path / "a.safetensors")
    assert "as written" in verify(path)
    assert call("weights", "verify", path).exit_code == 0
    with safe_open(path, "pt") as file:
        said = file.metadata()
    state = load_file(path)
    state["cls_token"] += 1
    save_file(state, path, metadata=said)
    with pytest.raises(DataError, match="its tensors have sha256"):
        verify(path)
    del state["norm.bias"]
    save_file(state, path, metadata=said)
    with pytest.raises(DataError, match=r"missing: 1, norm\.bias"):
        verify(path)
    assert call("weights", "verify", path).exit_code == 1


def test_list_names_everything():
    output = call("weights", "list").output
    for entry in REGISTRY.values():
        row = next(line for line in output.splitlines() if line.startswith(f"{entry.name} "))
        assert entry.model in row
        assert entry.licence in row
        assert row.endswith(" no")


def test_the_names_of_issue_and_paper():
    wanted = {"clip-openai", "clip-openai-file", "clip-hf", "remoteclip", "dinov3", "dinov2", "mae",
              "beitv2", "ibot", "simmim"}  # fmt: skip
    assert wanted <= set(registry.names())
    assert replace(REGISTRY["mae"], name="x").source == "timm mae"


class Broken(BaseHTTPRequestHandler):
    """Announces a whole file, and closes after half of it; then gives all."""

    content, calls = b"", 0

    def do_GET(self) -> None:
        type(self).calls += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // (2 if self.calls == 1 else 1)])

    def log_message(self, *args) -> None:
        pass


def test_a_download_that_breaks_off_is_no_file(monkeypatch, mae_file, places):
    Broken.content, Broken.calls = mae_file.read_bytes(), 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    put(monkeypatch, url=f"http://127.0.0.1:{server.server_port}/small.pth")
    try:
        result = call("weights", "fetch", "small")
        assert result.exit_code == 1 and f"of {len(Broken.content)} bytes came" in result.output
        assert not list((places / "weights").iterdir())  # neither a file nor a checksum
        assert call("weights", "fetch", "small").exit_code == 0
    finally:
        server.shutdown()
    assert (places / "weights/small.pth").read_bytes() == Broken.content


def test_a_file_that_its_publisher_replaced(monkeypatch, mae_file, vit, places):
    put(monkeypatch, url=mae_file.as_uri())
    assert call("weights", "fetch", "small").exit_code == 0
    (places / "weights/small.pth").unlink()
    torch.save({"model": {k: v + 1 for k, v in vit.state_dict().items()}}, mae_file)
    result = call("weights", "fetch", "small")
    assert result.exit_code == 1
    assert "remove 'small' from checksums.json, too" in result.output


def test_a_folder_that_cannot_be_written_to_is_read(monkeypatch, mae_file, places):
    put(monkeypatch)
    (places / "weights").mkdir()
    (places / "weights/small.pth").write_bytes(mae_file.read_bytes())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = call("weights", "verify")
    assert result.exit_code == 0 and "tensors fit" in result.output
    assert not (places / "weights/checksums.json").exists()
