"""The co2s step: equal to its plain form, and to the paper where the release differs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from co2s_fast.data import Batch
from co2s_fast.errors import UsageError
from co2s_fast.methods.co2s import Co2S, Co2SConfig
from co2s_fast.methods.plain import plain_co2s_losses


def gradients(method: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"stability_padding": "include", "cutmix_shards": 2, "fp_weight": 0.4}]
)
def test_equals_the_plain_step(make_method, make_batch, options) -> None:
    method = make_method(stability_ramp=0.0, **options).double()
    if options:
        method.weigh_classes([0.25, 1.5, 4.0])
    plain = plain_co2s_losses(method, make_batch(), 7, 20)
    expected = gradients(method, plain["loss"])
    fused = method(make_batch(), 7, 20)
    found = gradients(method, fused["loss"])
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-10, msg=name)
    for student in ("clip", "ssm"):
        for term in ("x", "fp", "s1", "s2"):
            assert fused[f"{student}/{term}"] > 0, "a case without this term tests nothing"
    assert fused["clip/stability"] + fused["ssm/stability"] > 0


class Stub(nn.Module):
    """A student whose logits for x, w, s1, s2, fp are its only parameter."""

    class config:
        feature_dropout = 0.5

    def __init__(self, weak: torch.Tensor) -> None:
        super().__init__()
        self.num_classes = weak.shape[1]
        self.logits = nn.Parameter(torch.cat([torch.zeros_like(weak), weak,
                                              *[torch.zeros_like(weak)] * 3]))  # fmt: skip

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images.float(),)

    def perturb(self, features, generator=None, keep=None):
        return features

    def decode(self, features) -> torch.Tensor:
        return self.logits

    def weak_gradient(self) -> torch.Tensor:
        size = len(self.logits) // 5
        return self.logits.grad[size : 2 * size]


def stub_step(**options) -> dict[str, torch.Tensor]:
    """Gradients of the weak logits: clip is sure in the left half, ssm in the right one."""
    weak_clip, weak_ssm = torch.zeros(2, 2, 3, 8, 8).unbind()
    weak_clip[:, 0, :, :4] = 9.0
    weak_ssm[:, 1, :, 4:] = 9.0
    students = {"clip": Stub(weak_clip), "ssm": Stub(weak_ssm)}
    method = Co2S(students, Co2SConfig(stability_ramp=0.0, **options))
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    ignore = torch.zeros(2, 8, 8, dtype=torch.uint8)
    ignore[:, 6:] = 255
    batch = Batch(x=images, y=ignore, w=images, s1=images, s2=images, ignore=ignore)
    method(batch, 0, 10)["loss"].backward()
    return {name: student.weak_gradient() for name, student in students.items()}


def test_stability_gradient_reaches_the_learner_and_only_it() -> None:
    gradient = stub_step()
    learner, teacher = gradient["ssm"][..., :6, :4], gradient["clip"][..., :6, :4]
    assert (learner.abs().amax(1) > 0).all()
    assert (teacher == 0).all()
    assert (gradient["clip"][..., :6, 4:].abs().amax(1) > 0).all()
    assert (gradient["ssm"][..., :6, 4:] == 0).all()
    # towards the teacher's class: the loss falls when its logit rises
    assert (learner[:, 0] < 0).all()


def test_the_released_form_trains_nothing_with_it() -> None:
    assert all((g == 0).all() for g in stub_step(stability_gradient="none").values())


def test_padding_is_left_out_of_the_stability_term_unless_asked_for() -> None:
    assert (stub_step()["ssm"][..., 6:, :] == 0).all()
    included = stub_step(stability_padding="include")["ssm"]
    assert (included[..., 6:, :4].abs().amax(1) > 0).all()


def test_weight_of_the_stability_term_follows_the_ramp(make_method, make_batch) -> None:
    method = make_method(stability_weight=0.5, stability_ramp=0.5)

    for step, weight in ((0, 0.0), (15, 0.5)):
        out = {k: float(v.detach()) for k, v in method(make_batch(), step, 20).items()}
        rest = 0.5 * out["clip/x"] + 0.25 * out["clip/fp"]
        rest += 0.125 * (out["clip/s1"] + out["clip/s2"])
        rounding = 1e-6 * out["clip/total"]  # of the float32 sum, a difference of near equals
        assert out["clip/stability"] > 100 * rounding
        expected = weight * out["clip/stability"]
        assert out["clip/total"] - rest == pytest.approx(expected, abs=rounding)


def test_nothing_to_learn_from_is_zero_not_nan(make_method, make_batch) -> None:
    method = make_method()
    batch = make_batch()
    batch.y.fill_(255)
    batch.ignore.fill_(255)
    out = method(batch, 5, 10)
    assert out["loss"] == 0
    for name, gradient in gradients(method, out["loss"]).items():
        assert (gradient == 0).all(), name


def test_needs_two_students(students) -> None:
    with pytest.raises(UsageError, match="co2s needs two, found clip"):
        Co2S({"clip": students()["clip"]}, Co2SConfig())


def test_students_whose_decoders_have_other_grids(make_method, make_batch) -> None:
    """As the released pair: the stability term is that of the logits at full size."""
    method = make_method(stability_ramp=0.0).double()
    method.students["ssm"].decoder.config = method.students["ssm"].decoder.config.model_copy(
        update={"resize_to": (24, 24)}
    )
    plain = plain_co2s_losses(method, make_batch(), 7, 20)
    fused = method(make_batch(), 7, 20)
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert fused["clip/stability"] + fused["ssm/stability"] > 0
