from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from co2s_fast.engine import panels
from co2s_fast.engine.evaluation import (
    EvalConfig,
    evaluate,
    pseudo_label_quality,
    write_evaluation,
)
from co2s_fast.engine.inference import image_logits
from co2s_fast.engine.metrics import Metrics
from co2s_fast.errors import DataError, UsageError

SPEC = SimpleNamespace(
    name="toy",
    num_classes=3,
    class_names=["water", "road", "roof"],
    palette=[(0, 0, 255), (128, 128, 128), (255, 0, 0)],
    crop=32,
)
CPU = torch.device("cpu")


class Channels(nn.Module):
    """Class scores are the image's channels times a weight, on a quarter of the grid."""

    patch_size = 4

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights).view(1, -1, 1, 1))
        self.batches: list[int] = []

    def forward(self, images):
        assert not self.training
        self.batches.append(len(images))
        height, width = images.shape[-2:]
        images = F.pad(images.float() / 255, (0, -width % 4, 0, -height % 4))
        return F.avg_pool2d(images, 4) * self.weight


def blocks(count, height=24, width=24, classes=3, seed=0):
    """Images whose brightest channel is the label's class, constant on blocks of 8 pixels."""
    generator = np.random.default_rng(seed)
    items = []
    for index in range(count):
        rows, columns = -(-height // 8), -(-width // 8)
        label = generator.integers(0, classes, (rows, columns)).repeat(8, 0).repeat(8, 1)
        label = label[:height, :width].astype(np.uint8)
        image = np.zeros((3, height, width), np.uint8)
        for c in range(3):
            image[c][label == c] = 200
        items.append((torch.from_numpy(image), torch.from_numpy(label), f"tile {index}"))
    return items


def run(students, items, spec=SPEC, **options):
    extra = {k: options.pop(k) for k in ("panels", "rank", "world") if k in options}
    return evaluate(students, items, spec, EvalConfig(**options), CPU, progress=False, **extra)


def by_hand(probabilities, items):
    matrix = np.zeros((3, 3), np.int64)
    for image, label, _ in items:
        predicted = probabilities(image[None])[0].argmax(0)
        valid = label != 255
        np.add.at(matrix, (label[valid].long().numpy(), predicted[valid].numpy()), 1)
    return matrix


def test_every_student_and_the_mean_of_probabilities():
    # Interpolation weights are multiples of 1/8: whole scores would tie, and rounding decide.
    students = {"clip": Channels(9.13, 1.07, 4.19), "ssm": Channels(1.01, 6.83, 5.27)}
    items = blocks(5)
    items[0][1][:5] = 255
    results = run(students, items, batch_windows=2)
    assert list(results) == ["clip", "ssm", "both"]

    def full(student, image):
        with torch.no_grad():
            coarse = student.eval()(image)
        return F.interpolate(coarse, image.shape[-2:], mode="bilinear").softmax(1)

    a, b = students.values()
    expected = {
        "clip": by_hand(lambda x: full(a, x), items),
        "ssm": by_hand(lambda x: full(b, x), items),
        "both": by_hand(lambda x: (full(a, x) + full(b, x)) / 2, items),
    }
    for name, matrix in expected.items():
        np.testing.assert_array_equal(results[name].confusion, matrix)
    assert results["clip"].pixels == sum(int((label != 255).sum()) for _, label, _ in items)
    assert not np.array_equal(expected["both"], expected["clip"])


def test_equal_images_go_through_together_and_modes_come_back():
    student = Channels(1.0, 1.0, 1.0).train()
    run({"clip": student}, [*blocks(5), *blocks(2, 16, 40)], batch_windows=4, crop=64)
    assert student.batches == [4, 1, 2]
    assert student.training


def test_absent_class_is_none_in_the_result():
    results = run({"clip": Channels(1.0, 1.0, 1.0)}, blocks(3, classes=2))
    assert results["clip"].iou[2] is None
    assert results["clip"].miou == pytest.approx(sum(results["clip"].iou[:2]) / 2)
    zero = run({"clip": Channels(1.0, 1.0, 1.0)}, blocks(3, classes=2), absent="zero")
    assert zero["clip"].iou[2] == 0


@pytest.mark.parametrize("height,width", [(1, 1), (3, 50), (7, 5), (33, 32)])
@pytest.mark.parametrize("mode", ["auto", "whole", "sliding"])
def test_any_size(height, width, mode):
    results = run({"clip": Channels(1.0, 1.0, 1.0)}, blocks(2, height, width), mode=mode)
    assert results["clip"].pixels == 2 * height * width


def test_labels_of_several_sizes_beside_equal_images():
    (image, label, _), other = blocks(1, 8, 8)[0], blocks(1, 4, 4)[0][1]
    items = [(image, label, "one"), (image, other, "other")]
    assert run({"clip": Channels(1.0, 1.0, 1.0)}, items)["clip"].pixels == 64 + 16


def test_labels_of_another_size_meet_resized_logits():
    items = [(image, label[::2, ::2], name) for image, label, name in blocks(2, 32, 32)]
    student = Channels(1.0, 1.0, 1.0)
    result = run({"clip": student}, items)["clip"]

    def expected(image):
        with torch.no_grad():
            logits = F.interpolate(student.eval()(image), (32, 32), mode="bilinear")
        return F.interpolate(logits, (16, 16), mode="bilinear", align_corners=True)

    np.testing.assert_array_equal(result.confusion, by_hand(expected, items))


def test_only_the_asked_student_is_run_and_scored():
    students = {"clip": Channels(1.0, 1.0, 1.0), "ssm": Channels(1.0, 1.0, 1.0)}
    assert list(run(students, blocks(2), student="ssm")) == ["ssm"]
    assert students["clip"].batches == []
    assert list(run(students, blocks(2), student="both")) == ["both"]
    assert list(run({"clip": students["clip"]}, blocks(2))) == ["clip"]


def test_wrong_input_is_said_in_one_line():
    student = {"clip": Channels(1.0, 1.0, 1.0)}
    with pytest.raises(UsageError, match="students are clip"):
        run(student, blocks(1), student="ssm")
    with pytest.raises(DataError, match="found no such pixel"):
        run(student, [])
    image, label, _ = blocks(1)[0]
    with pytest.raises(DataError, match="image tile: expected a label"):
        run(student, [(image, None, "tile")])
    with pytest.raises(DataError, match=r"label of tile: expected classes 0..2 or 255, found 7"):
        run(student, [(image, label.clone().fill_(7), "tile")])
    everywhere_ignored = [(image, label.clone().fill_(255), "tile")]
    with pytest.raises(DataError, match="found no such pixel"):
        run(student, everywhere_ignored)
    with pytest.raises(UsageError, match=r"eval\.crop"):
        run(student, blocks(1), SimpleNamespace(**{**vars(SPEC), "crop": None}), mode="sliding")


def test_released_stride():
    assert EvalConfig().stride_px(256) == 213
    assert EvalConfig().stride_px(512) == 426
    assert EvalConfig().stride_px(6) == 5
    with pytest.raises(ValueError, match="overlap"):
        EvalConfig(overlap=0.5)


def test_windows_cover_a_large_image():
    (image, _, _), student = blocks(1, 70, 50)[0], Channels(1.0, 1.0, 1.0).eval()
    logits = image_logits(student, image[None], EvalConfig(), crop=32)
    assert logits.at(70, 50).shape == (1, 3, 70, 50)
    assert sum(student.batches) == 3 * 2


def test_official_evaluation(golden):
    """The released evaluate(): windows of 32 at stride 26, mean over all classes."""
    data = golden("sliding_window.npz")

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1)
            names = [key for key in data.files if key.startswith("model/")]
            self.load_state_dict({n[6:]: torch.from_numpy(data[n]) for n in names})

        def forward(self, images):
            hidden = self.c1(images)
            return self.c2(torch.tanh(hidden) + hidden.mean((2, 3), keepdim=True))

    spec = SimpleNamespace(num_classes=5, class_names=list("abcde"), palette=[(0, 0, 0)] * 5)
    items = [
        (
            torch.from_numpy(data[f"evaluate/img{i}"][0]),
            torch.from_numpy(data[f"evaluate/mask{i}"][0]),
            str(i),
        )
        for i in range(3)
    ]
    result = run({"clip": Toy()}, items, spec, crop=32, stride=26.5 / 32, absent="zero")["clip"]
    np.testing.assert_allclose(np.array(result.iou) * 100, data["evaluate/iou_class"], rtol=1e-9)
    assert result.miou * 100 == pytest.approx(float(data["evaluate/miou"]), rel=1e-9)


def test_pseudo_labels_equation_12():
    items = blocks(3)
    items.append((items[0][0], None, "no label"))
    items[1][1][:8] = (items[1][1][:8] + 1) % 3  # wrong labels there
    items[2][1][:] = 255
    sure = Channels(50.0, 50.0, 50.0)
    quality = pseudo_label_quality({"clip": sure}, items, SPEC, EvalConfig(), CPU, progress=False)
    coarse = torch.stack([i[0] for i in items[:2]])
    with torch.no_grad():
        full = F.interpolate(sure.eval()(coarse), (24, 24), mode="bilinear")
    confidence, predicted = full.softmax(1).max(1)
    taken = confidence >= 0.95
    labels = torch.stack([i[1] for i in items[:2]])
    expected = ((predicted == labels) & taken).sum() / taken.sum()
    assert quality["clip"]["accuracy"] == pytest.approx(float(expected))
    assert quality["clip"]["coverage"] == pytest.approx(float(taken.float().mean()))
    assert quality["clip"]["pixels"] == 2 * 24 * 24


def test_pseudo_labels_without_confidence_or_labels():
    unsure = {"clip": Channels(0.1, 0.1, 0.1)}
    config = EvalConfig()
    quality = pseudo_label_quality(unsure, blocks(2), SPEC, config, CPU, progress=False)
    assert quality["clip"]["accuracy"] is None
    assert quality["clip"]["coverage"] == 0
    bare = [(image, None, name) for image, _, name in blocks(2)]
    assert pseudo_label_quality(unsure, bare, SPEC, config, CPU, progress=False) == {}
    few = pseudo_label_quality(unsure, blocks(9), SPEC, config, CPU, limit=4, progress=False)
    assert few["clip"]["pixels"] == 4 * 24 * 24


def test_pseudo_labels_of_another_threshold():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[0] = 255  # confidence e^2 / (e^2 + 2) = 0.787
    items, student = [(image, image[1], "a")], {"clip": Channels(2.0, 2.0, 2.0)}
    for threshold, coverage in ((0.78, 1), (0.8, 0)):
        quality = pseudo_label_quality(student, items, SPEC, EvalConfig(), CPU,
                                       threshold=threshold, progress=False)  # fmt: skip
        assert quality["clip"]["coverage"] == coverage


def test_a_limited_number_is_spread_over_all_images():
    class Watched(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen, student = [], {"clip": Channels(1.0, 1.0, 1.0)}
    pseudo_label_quality(student, Watched(blocks(9)), SPEC, EvalConfig(), CPU, limit=3,
                         progress=False)  # fmt: skip
    assert seen == [0, 4, 8]


def test_file_holds_everything(tmp_path):
    results = run({"clip": Channels(1.0, 1.0, 1.0)}, blocks(2))
    record = write_evaluation(tmp_path / "eval.json", results, SPEC, EvalConfig(), step=70)
    assert json.loads((tmp_path / "eval.json").read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
    assert record["step"] == 70
    assert record["classes"][1] == {"name": "road", "color": [128, 128, 128]}
    again = Metrics.from_dict(record["students"]["clip"])
    np.testing.assert_array_equal(again.confusion, results["clip"].confusion)


def test_panels_are_drawn_for_a_fixed_choice(tmp_path):
    students = {"clip": Channels(9.0, 1.0, 4.0), "ssm": Channels(1.0, 7.0, 5.0)}
    evaluate(students, blocks(9), SPEC, EvalConfig(panels=3), CPU, progress=False, panels=tmp_path)
    found = panels.read(tmp_path)
    assert [p.number for p in found] == [0, 1, 2]
    assert set(found[0].parts) == {"image", "truth", "clip", "ssm", "both", "disagreement"}
    names = [p.name for p in found]
    evaluate(students, blocks(9), SPEC, EvalConfig(panels=2), CPU, progress=False, panels=tmp_path)
    assert len(panels.read(tmp_path)) == 2
    evaluate(students, blocks(9), SPEC, EvalConfig(panels=3), CPU, progress=False, panels=tmp_path)
    assert [p.name for p in panels.read(tmp_path)] == names


def test_choice_prefers_images_that_show_more_classes():
    plain = torch.zeros(8, 8, dtype=torch.uint8)
    rare = plain.clone()
    rare[:4] = 2
    items = [(None, plain, "a"), (None, plain, "b"), (None, rare, "c"), (None, plain, "d")]
    assert 2 in panels.choose(items, 1, 3)
    assert panels.choose(items, 9, 3) == [0, 1, 2, 3]


def test_disagreement_codes():
    truth = np.array([[0, 0, 0, 0, 0, 255]], np.uint8)
    first = np.array([[0, 1, 0, 1, 1, 0]], np.uint8)
    second = np.array([[0, 1, 1, 0, 2, 1]], np.uint8)
    assert panels.disagreement(truth, first, second).tolist() == [[0, 1, 2, 3, 4, 5]]


def _worker(rank, world, folder, expected):
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    students = {"clip": Channels(9.0, 1.0, 4.0), "ssm": Channels(1.0, 7.0, 5.0)}
    result = evaluate(
        students,
        blocks(5),
        SPEC,
        EvalConfig(panels=4),
        CPU,
        progress=False,
        panels=folder / "panels",
        rank=rank,
        world=world,
    )
    for name, metrics in result.items():
        np.testing.assert_array_equal(metrics.confusion, expected[name])
    dist.destroy_process_group()


def test_two_processes_count_each_image_once(tmp_path):
    students = {"clip": Channels(9.0, 1.0, 4.0), "ssm": Channels(1.0, 7.0, 5.0)}
    expected = {n: m.confusion for n, m in run(students, blocks(5)).items()}
    torch.multiprocessing.spawn(_worker, (2, tmp_path, expected), nprocs=2)
    assert len(panels.read(tmp_path / "panels")) == 4
