"""Runs whose backbones train low-rank adapters only: stop, resume, evaluate, predict, export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import untrained
from click.testing import CliRunner
from PIL import Image
from test_trainer import numbers, start

from co2s_fast.cli import main
from co2s_fast.engine import export_formats as formats
from co2s_fast.engine.checkpoint import read_arrays, read_state
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.export import export_run
from co2s_fast.engine.export_check import reference
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import bare_student, checkpoint_folder, load_run

pytestmark = pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")
LORA = {"trainable": "lora", "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1}}
STUDENTS = {
    "clip": {**untrained.CLIP, **LORA},
    "ssm": {**untrained.DINOV3, **LORA, "gradient_checkpointing": True,
            "overrides": {**untrained.DINOV3["overrides"], "init_values": 1.0}},
}  # fmt: skip


@pytest.fixture
def content(run_content):
    return {**run_content(steps=4, log_every=1, eval_every=2, probe_images=0),
            "students": STUDENTS}  # fmt: skip


def last(folder) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint: weights, adapters and the optimizer's."""
    source = checkpoint_folder(folder, "last")
    state = read_state(source)
    return {f"{stem}.{name}": tensor for stem in ("clip", "ssm", "optimizer")
            for name, tensor in read_arrays(source, state, stem).items()}  # fmt: skip


def test_stop_resume_evaluate_and_predict(content, stripes, tmp_path, stop_after, capsys) -> None:
    whole = start(content)
    printed = capsys.readouterr().err
    record = read_metrics(whole / "metrics.jsonl")
    trained = record[0]["students"]["clip"]["trained_parameters"]
    assert f"{trained / 1e6:.2f} M parameters train" in printed
    warned = [text for text in record[0]["warnings"] if "starts from random weights" in text]
    assert [text.split(":")[0] for text in warned] == ["student clip", "student ssm"]
    assert all(f"warning: {text}\n" in printed for text in warned)
    assert record[1]["lr/clip/adapters"] == pytest.approx(1e-3) and "lr/clip/backbone" not in record
    broken = {**content, "out": str(tmp_path / "broken")}
    stop_after(3, RunConfig.model_validate(broken))
    folder = start(broken, resume=True)
    assert numbers(folder) == numbers(whole)
    first, second = last(whole), last(folder)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    adapters = [name for name in first if name.endswith("lora.up")]
    assert len(adapters) == 2 * 2 * 2 and all(first[name].any() for name in adapters)

    config, spec, students = load_run(whole, "last")
    assert not any("lora" in name for s in students.values() for name in s.state_dict())
    unmerged = bare_student(config.students["ssm"], spec).eval()
    source = checkpoint_folder(whole, "last")
    unmerged.load_state_dict(read_arrays(source, read_state(source), "ssm"))
    images = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(students["ssm"](images), unmerged(images), rtol=1e-4, atol=1e-5)
    for command in (["eval", str(whole)],
                    ["predict", str(whole), str(stripes / "images" / "12.png"), "-o",
                     str(tmp_path / "maps")]):  # fmt: skip
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (result.output, result.exception)
    assert np.asarray(Image.open(tmp_path / "maps" / "12.png")).shape == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_export_holds_merged_weights(content, tmp_path, format) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    run = untrained.untrained_run(content)
    out = tmp_path / f"a.{format}"
    export_run(run, format=format, tile=32, out=out)
    runner = formats.run_onnx(out) if format == "onnx" else formats.run_pt2(out)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    students = load_run(run)[2]
    expected = reference(students, images)
    np.testing.assert_allclose(runner(images.numpy())[0], expected, atol=1e-4)
    without = {n: bare_student(s.config.model_copy(update={"trainable": "frozen"}),
                               load_run(run)[1]).eval() for n, s in students.items()}  # fmt: skip
    source = checkpoint_folder(run, "best")
    for name, student in without.items():
        arrays = read_arrays(source, read_state(source), name)
        own = {k.replace("qkv.q_bias", "q_bias").replace("qkv.v_bias", "v_bias"): v
               for k, v in arrays.items() if "lora." not in k}  # fmt: skip
        student.load_state_dict(own)
    assert np.abs(reference(without, images) - expected).max() > 0.01, "the adapters do nothing"
