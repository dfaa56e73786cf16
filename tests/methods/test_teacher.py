"""`method.teacher`: whose predictions of the weak views are the pseudo-labels."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.losses import softmax_confidence

METHODS = ["fixmatch", "unimatch", "co2s"]


def outputs(method, batch):
    found = method(batch, 5, 10)
    found["loss"].backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in found.items()}, gradients


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("partner", ["batch", "same-image"])
def test_an_average_equal_to_its_student_teaches_the_same(
    make_method, make_batch, name, partner
) -> None:
    def batch():
        one = make_batch(8)
        if partner == "same-image":
            one.x, one.y = one.x[:4], one.y[:4]
        return one

    options = {"cutmix_partner": partner}
    expected, gradients = outputs(make_method(name, **options).double(), batch())
    method = make_method(name, teacher="average", **options).double()
    method.take_averages(method.students)
    found, own = outputs(method, batch())
    assert found.keys() == expected.keys() and own.keys() == gradients.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)
    for key, value in gradients.items():
        torch.testing.assert_close(own[key], value, rtol=1e-7, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_pseudo_labels_are_the_averages(make_method, make_batch, students, name) -> None:
    teachers = students(seed=11)
    for teacher in teachers.values():
        teacher.eval().requires_grad_(False)
    method = make_method(name, teacher="average")
    method.take_averages(teachers)
    found, _ = outputs(method, batch := make_batch())
    for student, teacher in teachers.items():
        confidence, label = softmax_confidence(teacher(batch.w), size=batch.w.shape[-2:])
        confident = (confidence >= method.config.threshold) & (batch.ignore != 255)
        assert found[f"{student}/pseudo_confident"] == confident.sum() > 0
        correct = confident & (batch.truth != 255) & (label == batch.truth)
        assert found[f"{student}/pseudo_correct"] == correct.sum()
        assert all(p.grad is None for p in teacher.parameters())
    own, _ = outputs(make_method(name), make_batch())
    assert own["clip/x"] == found["clip/x"]
    assert own["clip/s1"] != found["clip/s1"]
    if name == "co2s":  # students still learn from each other as they are
        assert own["clip/stability"] == found["clip/stability"] > 0
    assert not any(key.startswith("averages") for key in method.state_dict())
