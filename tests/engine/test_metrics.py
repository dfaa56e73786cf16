from __future__ import annotations

import json

import numpy as np
import pytest

from co2s_fast.engine.metrics import Metrics, format_table, label_areas, official_iou

NAMES = ("water", "road", "roof")


def small() -> Metrics:
    return Metrics(np.array([[50, 10, 0], [5, 30, 0], [0, 0, 0]]), NAMES)


def test_numbers_by_hand():
    metrics = small()
    assert metrics.iou == [50 / 65, 30 / 45, None]
    assert metrics.f1 == [100 / 115, 60 / 75, None]
    assert metrics.precision == [50 / 55, 30 / 40, None]
    assert metrics.recall == [50 / 60, 30 / 35, None]
    assert metrics.miou == pytest.approx((50 / 65 + 30 / 45) / 2)
    assert metrics.mean_f1 == pytest.approx((100 / 115 + 60 / 75) / 2)
    assert metrics.mean_accuracy == pytest.approx((50 / 60 + 30 / 35) / 2)
    assert metrics.overall_accuracy == pytest.approx(80 / 95)
    chance = (60 * 55 + 35 * 40) / 95**2
    assert metrics.kappa == pytest.approx((80 / 95 - chance) / (1 - chance))


def test_absent_class_that_is_predicted_stays_out_of_the_mean():
    matrix = np.array([[8, 0, 2], [0, 10, 0], [0, 0, 0]])
    assert Metrics(matrix, NAMES).iou == [0.8, 1.0, None]
    assert Metrics(matrix, NAMES).miou == pytest.approx(0.9)
    zero = Metrics(matrix, NAMES, absent="zero")
    assert zero.iou[2] == 0.0
    assert zero.miou == pytest.approx(0.6)


def test_present_class_that_is_never_predicted_has_no_precision():
    metrics = Metrics(np.array([[0, 4], [0, 6]]), ("a", "b"))
    assert metrics.precision[0] is None
    assert metrics.recall[0] == 0.0
    assert metrics.iou[0] == 0.0
    assert metrics.miou == pytest.approx(0.3)


def test_nothing_scored_gives_none_not_zero():
    metrics = Metrics(np.zeros((3, 3)), NAMES)
    assert metrics.miou is None
    assert metrics.overall_accuracy is None
    assert metrics.kappa is None


def test_kappa_of_a_single_class_does_not_exist():
    assert Metrics(np.array([[7, 0], [0, 0]]), ("a", "b")).kappa is None


def test_large_counts_do_not_overflow():
    matrix = np.array([[4_000_000_000, 0], [0, 4_000_000_000]])
    assert Metrics(matrix, ("a", "b")).kappa == pytest.approx(1.0)


def test_dictionary_round_trip_through_json():
    metrics = Metrics(small().confusion, NAMES, absent="zero")
    again = Metrics.from_dict(json.loads(json.dumps(metrics.to_dict())))
    assert again.to_dict() == metrics.to_dict()
    assert again.absent == "zero"


def test_table_names_the_rule_and_the_absent_class():
    text = format_table({"clip": small(), "both": small()})
    assert "clip IoU" in text and "both F1" in text
    assert "n/a" in text
    assert f"{small().kappa:.4f}" in text
    assert "not in the ground truth: roof" in text
    assert str(small()).splitlines()[0].startswith("class")


def test_rows_of_the_table():
    """Pixels are those of the ground truth."""
    rows = [line.split() for line in format_table({"": small()}).splitlines()]
    for expected in ("water 60 76.92 86.96", "mean 95 71.79 83.48", "overall accuracy 84.21"):
        assert expected.split() in rows


@pytest.mark.parametrize(
    ("matrix", "names", "said"),
    [
        (np.zeros((2, 3)), ("a", "b"), "square"),
        (np.zeros((2, 2)), ("a",), "2 names"),
        (np.array([[1, -1], [0, 0]]), ("a", "b"), "-1"),
    ],
)
def test_bad_matrices_are_refused(matrix, names, said):
    with pytest.raises(ValueError, match=said):
        Metrics(matrix, names)


@pytest.mark.parametrize(
    "case", ["k6_ignore", "k15_absent", "all_ignore_image", "label_equal_K", "perfect"]
)
def test_official_counts(golden, case):
    data = golden("metrics.npz")
    classes = len(data[f"{case}/iou_class"])
    areas = [
        label_areas(p, t, classes)
        for p, t in zip(data[f"{case}/pred"], data[f"{case}/target"], strict=True)
    ]
    for index, name in enumerate(("inter", "union", "target_area")):
        np.testing.assert_array_equal([a[index] for a in areas], data[f"{case}/{name}"])
    hit, union = sum(a[0] for a in areas), sum(a[1] for a in areas)
    iou = official_iou(hit, union)
    np.testing.assert_allclose(iou * 100, data[f"{case}/iou_class"], rtol=1e-12)
    np.testing.assert_allclose(iou.mean() * 100, data[f"{case}/miou"], rtol=1e-12)


@pytest.mark.parametrize("case", ["k6_ignore", "k15_absent", "all_ignore_image", "perfect"])
def test_zero_rule_is_the_official_mean(golden, case):
    data = golden("metrics.npz")
    classes = len(data[f"{case}/iou_class"])
    truth, predicted = data[f"{case}/target"].ravel(), data[f"{case}/pred"].ravel()
    valid = truth != 255
    matrix = np.bincount(
        truth[valid].astype(int) * classes + predicted[valid], minlength=classes**2
    ).reshape(classes, classes)
    metrics = Metrics(matrix, tuple(map(str, range(classes))), absent="zero")
    assert metrics.miou * 100 == pytest.approx(float(data[f"{case}/miou"]), rel=1e-12)
