"""What a step takes of a GPU, found without one, and what is changed until it fits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from co2s_fast.data import Batch
from co2s_fast.engine import memory
from co2s_fast.engine.config import RunConfig, read_run_config
from co2s_fast.engine.footprint import GIB, RESERVE, footprint, parse_gib, step_peak
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.engine.trainer import Trainer, train
from co2s_fast.errors import UsageError
from co2s_fast.methods import METHODS, get_method
from co2s_fast.models import build_student

CROP = 96  # large enough for activations to take more than weights
CLASSES = [SimpleNamespace(name=f"class {i}", concepts=[f"class {i}"]) for i in range(3)]


def config_of(content: dict, **train_options) -> RunConfig:
    content["train"] |= train_options
    return RunConfig.model_validate(content)


def method_of(config: RunConfig):
    students = {name: build_student(student, CLASSES, seed=i)
                for i, (name, student) in enumerate(config.students.items())}  # fmt: skip
    return get_method(config.method.name)(students, config.method, seed=0)


def of(content: dict, world: int = 1, **train_options):
    config = config_of(content, **train_options)
    return footprint(method_of(config), config, 64, world)


def recomputing(students: dict) -> dict:
    return {name: {**student, "gradient_checkpointing": True,
                   "decoder": {"gradient_checkpointing": True}}
            for name, student in students.items()}  # fmt: skip


def real_batch(images: int, crop: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator).byte()

    boxes = torch.tensor([[4, 4, 20, 30]] * images, dtype=torch.int32)
    labels = torch.randint(3, (images, crop, crop), generator=generator).byte()
    views = {view: pixels(images, 3, crop, crop) for view in ("x", "w", "s1", "s2")}
    return Batch(**views, y=labels, ignore=torch.zeros_like(labels), truth=labels.clone(),
                 boxes1=boxes, boxes2=boxes.clone())  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_a_step_without_content_takes_what_a_real_one_takes(run_content, half) -> None:
    """The same count over a step that is really made, kernels of the losses included."""
    method = method_of(config_of(run_content())).train()
    counter = memory_counter()
    with counter:
        batch = Batch(**{name: value.clone() for name, value in vars(real_batch(4, 64)).items()
                         if isinstance(value, torch.Tensor)})  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses = method(batch, 1, 2)
        losses.pop("loss").backward()
    estimate = step_peak(method, 4, 64, half=half)
    assert estimate == pytest.approx(counter.peak, rel=0.05)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def memory_counter():
    from co2s_fast.engine.footprint import _StorageCounter

    return _StorageCounter()


def test_the_method_is_left_as_it_is(run_content) -> None:
    config = config_of(run_content())
    method = method_of(config)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    footprint(method, config_of(run_content(), accumulate=2), 64)
    assert method.parts == 1 and not method.averages
    assert all(p.grad is None for p in method.parameters())
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) and type(value) is torch.Tensor


def test_weights_and_moments_are_counted_to_the_byte(run_content) -> None:
    content = run_content()
    method = method_of(config_of(content))
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in method.parameters()]
    sizes += [(b.numel() * b.element_size(), False) for b in method.buffers()]
    blocks = [(-(-size // 512) * 512, trained) for size, trained in sizes]
    found = of(content)
    assert found.weights == sum(size for size, _ in blocks)
    assert found.optimizer == 2 * sum(size for size, trained in blocks if trained)
    content["method"]["teacher"] = "average"
    assert of(content, ema=0.9).weights == 2 * found.weights
    assert found.total == found.weights + found.optimizer + found.step


def test_what_takes_less_is_seen_to_take_less(run_content) -> None:
    content = run_content()
    whole = of(content)
    assert of(content, precision="float32").step > 1.3 * whole.step
    assert of(content, accumulate=2, precision="auto").step < 0.7 * whole.step
    assert of(content, world=2, accumulate=1).step < 0.7 * whole.step
    content["students"] = recomputing(content["students"])
    assert of(content).step < 0.9 * whole.step


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("more", [{}, {"cutmix_partner": "same-image"},
                                  {"distribution_alignment": 1.0, "class_thresholds": 1.0}])
def test_every_method_can_be_estimated(run_content, name, more) -> None:
    if more.keys() - get_method(name).Config.model_fields.keys():
        pytest.skip(f"{name} has no such option")
    content = run_content()
    content["method"] = {"name": name, **more}
    assert of(content).step > 2**20


@pytest.mark.parametrize("trainable", ["attention", "full", "frozen", "lora"])
def test_every_way_to_train_can_be_estimated(run_content, trainable) -> None:
    content = run_content()
    content["students"] = {name: {**student, "trainable": trainable}
                           for name, student in content["students"].items()}  # fmt: skip
    assert of(content).optimizer < of(run_content()).optimizer or trainable == "full"


def test_sizes_are_read_as_people_write_them(run_content) -> None:
    for text in ("24G", "24", "24 GiB", "24gb", "24.0", "24576M", "24576 MiB"):
        assert config_of(run_content(gpu_memory=text)).train.gpu_memory == 24.0
    assert config_of(run_content(gpu_memory="auto")).train.gpu_memory == "auto"
    for text in ("lots", "0", "-3G", "24T", "", "nan"):
        with pytest.raises(ValueError, match=r"gpu_memory.*\n.*expected a size like 24G"):
            config_of(run_content(gpu_memory=text))
    assert parse_gib("512M") == 0.5


def test_a_run_is_made_to_fit_and_keeps_its_settings_when_it_goes_on(
    run_content, stop_after, tmp_path, capsys
) -> None:
    least = run_content(accumulate=2)
    least["students"] = recomputing(least["students"])
    gib = 1.001 * of_run(least)
    content = run_content(gpu_memory=f"{gib:.5f}", accumulate=1)
    content["data"]["crop"] = CROP
    train(config_of(content), progress=False)
    told = capsys.readouterr().err
    assert "memory of a GPU: about" in told and "to fit: " in told
    folder = tmp_path / "run"
    chosen = read_run_config(folder)
    assert chosen.students["clip"].gradient_checkpointing and chosen.train.accumulate == 2
    start = read_metrics(folder / "metrics.jsonl")[0]["memory"]
    assert 0 < start["estimate_gib"] < gib and start["changes"]

    # Less would have been asked for now, but a run that has begun keeps how it was begun.
    cut = content | {"out": str(tmp_path / "cut")}
    stop_after(2, config_of(cut))
    train(config_of(cut | {"train": cut["train"] | {"gpu_memory": 1000.0}}), resume=True,
          progress=False)  # fmt: skip
    files = [sorted(checkpoint_folder(tmp_path / n, "last").glob("*.safetensors"))
             for n in ("run", "cut")]  # fmt: skip
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def of_run(content: dict) -> float:
    """GiB that a run should have, as it is configured."""
    config = config_of(content)
    return footprint(method_of(config), config, CROP).needs / GIB


def test_what_fits_is_left_alone(run_content, tmp_path) -> None:
    train(config_of(run_content(gpu_memory="24G")), dry_run=True, progress=False)
    trainer = Trainer(config_of(run_content(gpu_memory="24G")), progress=False)
    trainer.set_up(resume=False, dry_run=True)
    before = config_of(run_content())
    assert trainer.config.students == before.students or not trainer.memory.changes
    assert trainer.config.train.accumulate == 1 and trainer.memory.changes == []


def test_what_cannot_fit_is_told_before_training(run_content, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"train\.gpu_memory: a step takes about .* at the least"):
        train(config_of(run_content(gpu_memory="1M")), progress=False)
    assert not (tmp_path / "run").exists()


def test_auto_needs_a_gpu(run_content) -> None:
    with pytest.raises(UsageError, match="torch sees none here; give a size"):
        train(config_of(run_content(gpu_memory="auto")), progress=False)


def test_a_full_gpu_is_warned_of(run_content, monkeypatch) -> None:
    config = config_of(run_content())
    method, device = method_of(config), torch.device("cuda", 0)
    needs = footprint(method, config, 64).needs
    for free, count in ((needs - 2**20, 1), (needs + 2**20, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), 80 * GIB))
        changed, plan = memory.plan(method, config, 64, device, 1, may_change=True, look=False)
        assert changed == config and len(plan.warnings) == count
    assert needs * (1 - RESERVE) == pytest.approx(plan.footprint.total)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(0.7 * needs), 80 * GIB))
    auto = config_of(run_content(gpu_memory="auto"))
    changed, plan = memory.plan(method, auto, 64, device, 1, may_change=True, look=False)
    assert plan.changes and plan.footprint.needs <= 0.7 * needs
    assert changed.train.gpu_memory == pytest.approx(0.7 * needs / GIB, abs=0.01)
    # A run that goes on is estimated and told of, and nothing else.
    changed, plan = memory.plan(method, auto, 64, device, 1, may_change=False, look=False)
    assert changed == auto and len(plan.warnings) == 1


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_no_estimate_is_no_reason_not_to_train(run_content, monkeypatch, kind) -> None:
    def fails(*args):
        raise kind("no stand-in for this operator")

    monkeypatch.setattr(memory, "footprint", fails)
    config = config_of(run_content())
    _, plan = memory.plan(None, config, 64, torch.device("cpu"), 1, may_change=True, look=True)
    assert plan.footprint is None and "no stand-in" in plan.warnings[0]
    assert json.dumps(plan.record()) == '{"estimate_gib": null, "changes": []}'
