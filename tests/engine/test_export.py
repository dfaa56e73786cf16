"""Exported files: what is in them, that they predict what the run predicts, and what is refused."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import untrained
import yaml
from click.testing import CliRunner
from PIL import Image

from co2s_fast.cli import main
from co2s_fast.data.catalogue import load_dataset
from co2s_fast.engine import export_formats as formats
from co2s_fast.engine.bands import fit_students
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.export import FOLDER, example, export_run
from co2s_fast.engine.export import describe as describe_export
from co2s_fast.engine.export_check import BATCHES, reference, sample_tiles
from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.prediction import predict
from co2s_fast.engine.runs import load_run
from co2s_fast.errors import DataError, UsageError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parents[2] / "examples" / "predict_onnxruntime.py"
NAMES = ["field", "road", "water"]
COLORS = [[200, 180, 60], [90, 90, 90], [40, 80, 200]]


def call(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run_of(content: dict, root: Path, **changes) -> Path:
    return untrained.untrained_run({**content, "out": str(root / "run"), **changes})


@pytest.fixture(scope="module")
def tiny(stripes, tiny_students, tmp_path_factory) -> Path:
    """A run of two tiny students on the stripes."""
    data = {"dataset": str(stripes / "stripes.yaml"), "root": str(stripes),
            "split": str(stripes / "split")}  # fmt: skip
    content = {"data": data, "students": tiny_students, "method": {"name": "co2s"},
               "train": {"steps": 1}}  # fmt: skip
    return run_of(content, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(tiny) -> tuple[Path, str]:
    """Both students as ONNX, through the command line, and what it printed."""
    result = call("export", tiny)
    assert result.exit_code == 0, (result.output, result.exception)
    return tiny / FOLDER / "both.onnx", result.stdout


def noise(batch: int, tile: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, tile, tile), dtype=torch.uint8, generator=generator)


@pytest.mark.slow
def test_onnx_of_both_students(tiny, exported) -> None:
    path, printed = exported
    assert printed.splitlines()[-1] == str(path)
    for words in ("tolerance 1e-04", "validation images", "opset 18", "[batch, 3, 32, 32]"):
        assert words in printed
    run = formats.run_onnx(path)
    _, _, students = load_run(tiny)
    for batch in (1, 3, 5):
        images = noise(batch, 32, seed=batch)
        (found,) = run(images.numpy())
        assert found.shape == (batch, 3, 32, 32)
        assert found.dtype == np.float32
        expected = reference(students, images)
        assert len(np.unique(expected.argmax(1))) == 3  # a comparison of something
        assert np.abs(found - expected).max() < 1e-5
    assert [p.name for p in path.parent.iterdir()] == ["both.onnx"]


@pytest.mark.slow
def test_onnx_graph_is_plain(exported) -> None:
    model = onnx.load(exported[0])
    onnx.checker.check_model(model)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 18)}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    resizes = [n for n in model.graph.node if n.op_type == "Resize"]
    assert any(a.s == b"linear" for n in resizes for a in n.attribute if a.name == "mode")
    (images,) = model.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    (probabilities,) = model.graph.output
    sides = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, 32, 32]
    assert [d.dim_param or d.dim_value for d in probabilities.type.tensor_type.shape.dim] == sides


@pytest.mark.slow
def test_onnx_says_what_it_is(tiny, exported) -> None:
    about = {p.key: p.value for p in onnx.load(exported[0]).metadata_props}
    assert json.loads(about["classes"]) == NAMES
    assert json.loads(about["palette"]) == COLORS
    assert json.loads(about["students"]) == ["clip", "ssm"]
    assert (about["tile"], about["channels"], about["dtype"]) == ("32", "3", "uint8")
    assert json.loads(about["normalisation"])["ssm"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert (about["run"], about["checkpoint"], about["opset"]) == ("run", "best", "18")
    assert {len(v) for v in json.loads(about["weights_sha256"]).values()} == {64}
    assert json.loads(about["licence"])["weights"]["clip"] == "none: trained from random weights"
    assert about["scale"] == "1.0"
    assert json.loads(about["short_side"]) is None


def test_pt2_of_one_student(tiny, tmp_path) -> None:
    result = call("export", tiny, "--format", "pt2", "--student", "ssm", "--output", "labels",
                  "--tile", 41, "-o", tmp_path / "a.pt2")  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    extra = {formats.EXTRA_FILE: ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    about = json.loads(extra[formats.EXTRA_FILE])
    assert about["classes"] == NAMES
    assert about["outputs"] == ["labels", "confidence"]
    assert about["tile"] == 41
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in targets if "co2s" in name]
    assert [name for name in targets if "upsample_bilinear2d" in name]
    _, _, students = load_run(tiny)
    for batch in (1, 3):
        expected = reference({"ssm": students["ssm"]}, noise(batch, 41))
        labels, confidence = program.module()(noise(batch, 41))
        assert labels.dtype == torch.uint8
        np.testing.assert_allclose(confidence, expected.max(1), atol=1e-5)
        assert (labels.numpy() == expected.argmax(1)).mean() > 0.999


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_rasters_of_four_bands_are_stretched_inside(tiny_students, tmp_path, format) -> None:
    """The file takes a raster's own numbers, NaN where there is no data."""
    statistics = {"dtype": "uint16", "low": [0, 100, 200, 50], "high": [1000, 900, 4000, 8000],
                  "mean": [0.3, 0.4, 0.5, 0.2], "std": [0.1, 0.2, 0.3, 0.1]}  # fmt: skip
    classes = [{"name": n, "color": c} for n, c in zip(NAMES, COLORS, strict=True)]
    description = {"name": "four", "crop": 32, "classes": classes, "bands": [2, 3, 4, 8],
                   "display": [4, 3, 2], "statistics": statistics}  # fmt: skip
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(description))
    spec = load_dataset(tmp_path / "four.yaml")
    content = {"data": {"dataset": str(tmp_path / "four.yaml")}, "students": tiny_students,
               "method": {"name": "co2s"}, "train": {"steps": 1}}  # fmt: skip
    content = fit_students(RunConfig.model_validate(content), spec).model_dump()
    run = run_of(content, tmp_path)
    printed = export_run(run, format=format, student="ssm")
    path = Path(printed.splitlines()[-1])
    assert "images float32 [batch, 4, 32, 32]" in printed
    _, _, students = load_run(run)
    raw = torch.randint(0, 9000, (2, 4, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    low, high = (torch.tensor(statistics[k])[:, None, None] for k in ("low", "high"))
    shares = ((raw - low) / (high - low)).clamp(0, 1)
    raw[0, 2, :5] = float("nan")
    shares[0, 2, :5] = 0
    runner = formats.run_onnx(path) if format == "onnx" else formats.run_pt2(path)
    found = torch.from_numpy(runner(raw.numpy())[0])
    expected = reference({"ssm": students["ssm"]}, shares)
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=0)
    about = describe_export(run, *load_run(run), "best", 32, "probabilities")
    assert about["bands"] == [2, 3, 4, 8] and about["channels"] == 4
    assert about["stretch"]["low"] == statistics["low"]


def test_a_file_that_differs_is_not_left(tiny, tmp_path, monkeypatch) -> None:
    out = tmp_path / "a.pt2"
    out.write_bytes(b"the former file")

    class Mirrored(formats.FusedStudents):
        def forward(self, images):
            return super().forward(images.flip(3))

    monkeypatch.setattr(formats, "FusedStudents", Mirrored)
    result = call("export", tiny, "--format", "pt2", "--student", "clip", "-o", out)
    assert result.exit_code == 1
    (line,) = [x for x in result.output.splitlines() if x.startswith("error:")]
    assert str(out) in line
    assert "tolerance 1e-04" in line
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt2"]
    assert out.read_bytes() == b"the former file"


def test_the_tolerance_is_the_users(tiny, tmp_path) -> None:
    with pytest.raises(DataError, match=r"tolerance 0e\+00"):
        export_run(tiny, student="clip", out=tmp_path / "a.onnx", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tiny, tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"\.onnx"):
        export_run(tiny, out=tmp_path / "a.bin")
    with pytest.raises(UsageError, match="patch size, 16"):
        export_run(tiny, tile=15, out=tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="run folder"):
        export_run(tmp_path, out=tmp_path / "a.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        export_run(tiny, out=tmp_path / "file" / "a.onnx")
    found = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec",
                        lambda name: None if name == "onnxscript" else found(name))  # fmt: skip
    result = call("export", tiny)
    assert result.exit_code == 2
    assert "pip install onnxscript" in result.output


def test_tiles_without_the_runs_data(tiny, stripes, tmp_path, capsys) -> None:
    config, spec, students = load_run(tiny)
    like = example(students, 24, load_run(tiny)[1])
    tiles, source = sample_tiles(config.data, spec, like, 24)
    assert (tiles.shape, tiles.dtype) == ((sum(BATCHES), 3, 24, 24), torch.uint8)
    assert "validation" in source
    bigger, _ = sample_tiles(config.data, spec, like, 50)
    assert bigger.shape[-2:] == (50, 50)
    gone = config.data.model_copy(update={"root": tmp_path / "gone"})
    tiles, source = sample_tiles(gone, spec, like, 24)
    assert source == "generated tiles"
    assert "gone" in capsys.readouterr().err
    assert tiles.shape == (sum(BATCHES), 3, 24, 24)
    assert tiles.float().std() > 20
    demo = load_dataset("demo")
    nowhere = config.data.model_copy(update={"dataset": "demo", "root": tmp_path, "split": None})
    assert sample_tiles(nowhere, demo, like, 24)[1] == "generated tiles"
    assert list(tmp_path.iterdir()) == []


ABSOLUTE = {**untrained.DINOV3, "model": "vit_base_patch16_224", "queries": "learnable",
            "overrides": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64}}  # fmt: skip
SHAPES = {
    "paper": {"clip": untrained.CLIP, "ssm": {**untrained.DINOV3, "gradient_checkpointing": True}},
    "absolute positions": {"one": ABSOLUTE},
    "bf16 rope": {"one": {**untrained.DINOV3, "rope": "bf16"}},
}


@pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")
@pytest.mark.parametrize(
    ("shape", "format"),
    [("paper", "pt2"), ("bf16 rope", "pt2"), ("bf16 rope", "onnx"),
     *(pytest.param(shape, "onnx", marks=pytest.mark.slow) for shape in list(SHAPES)[:2])],
)  # fmt: skip
def test_students_of_the_papers_shape(shape, format, tiny, tmp_path) -> None:
    """Position tables and rotary embeddings on another grid than the model's own."""
    config = load_run(tiny)[0].model_dump(mode="json")
    run = run_of(config, tmp_path, students=SHAPES[shape])
    out = tmp_path / f"a.{format}"
    if (shape, format) == ("bf16 rope", "onnx"):
        with pytest.raises(UsageError, match="pt2"):
            export_run(run, format=format, tile=80, out=out)
        return
    export_run(run, format=format, tile=80, out=out)
    runner = formats.run_onnx(out) if format == "onnx" else formats.run_pt2(out)
    images = noise(3, 80)
    expected = reference(load_run(run)[2], images)
    assert np.ptp(expected, axis=(0, 2, 3)).max() > 0.1
    np.testing.assert_allclose(runner(images.numpy())[0], expected, atol=1e-4)


@pytest.mark.slow
def test_weights_of_their_own_file_follow_the_graph(tiny, tmp_path, monkeypatch) -> None:
    """What onnx does above 2 GB."""
    write = formats.write_onnx
    monkeypatch.setattr(formats, "write_onnx", lambda *a: write(*a, external_data=True))
    printed = export_run(tiny, student="clip", out=tmp_path / "a.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data"}
    megabytes = (tmp_path / "a.onnx.data").stat().st_size / 1e6
    assert float(printed.splitlines()[-2].split()[-2]) > megabytes
    (found,) = formats.run_onnx(tmp_path / "a.onnx")(noise(2, 32).numpy())
    _, _, students = load_run(tiny)
    expected = reference({"clip": students["clip"]}, noise(2, 32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def run_example(*arguments: object) -> subprocess.CompletedProcess:
    """The example in a process where neither torch nor this package can be imported."""
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'co2s_fast', 'onnx']);"
        f"sys.argv[0] = {str(EXAMPLE)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.mark.slow
def test_example_with_onnxruntime_alone(tiny, exported, stripes, tmp_path) -> None:
    image = stripes / "images" / "12.png"
    printed = run_example(exported[0], image, tmp_path / "map.png").stdout
    assert [line.split()[0] for line in printed.splitlines()] == NAMES
    _, spec, students = load_run(tiny)
    exact = EvalConfig(precision="float32")  # as exported, also where bfloat16 is the default
    (expected,) = predict(students, [image], tmp_path / "run", spec, config=exact,
                          progress=False)  # fmt: skip
    found = Image.open(tmp_path / "map.png")
    assert found.getpalette()[:9] == [c for color in COLORS for c in color]
    assert (np.asarray(found) == np.asarray(Image.open(expected))).mean() > 0.999
    Image.open(image).resize((83, 20)).save(tmp_path / "wide.png")
    run_example(exported[0], tmp_path / "wide.png", tmp_path / "wide-map.png")
    assert Image.open(tmp_path / "wide-map.png").size == (83, 20)


def test_example_covers_every_pixel() -> None:
    starts = runpy.run_path(str(EXAMPLE))["starts"]
    for length in (32, 33, 58, 59, 100):
        first = starts(length, 32)
        covered = {p for s in first for p in range(s, s + 32)}
        assert covered == set(range(length))


def test_labels_keep_the_first_of_equal_classes() -> None:
    class Flat(torch.nn.Module):
        patch_size = pads_to = 1

        def forward(self, images):
            return images.float() * 0

    labels, confidence = formats.FusedStudents({"a": Flat()}, 4, "labels")(noise(1, 4))
    assert labels.eq(0).all()
    assert confidence.sub(1 / 3).abs().max() < 1e-6
