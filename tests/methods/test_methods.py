"""What all methods share: terms, pseudo-label counts, CutMix partners, determinism."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.errors import UsageError
from co2s_fast.methods import METHODS, get_method
from co2s_fast.methods.base import Method, MethodConfig
from co2s_fast.methods.ramp import cosine_ramp


def test_every_listed_method_can_be_had_and_knows_its_name() -> None:
    for name in METHODS:
        method = get_method(name)
        assert method.name == name
        assert method.Config().name == name
    with pytest.raises(UsageError, match="unknown name 'cosine'; expected one of co2s, onlysup"):
        get_method("cosine")


class OwnConfig(MethodConfig):
    name: Literal["own"] = "own"


class Own(Method):
    """As CONTRIBUTING says how one is written: both students learn the labels and the argmax."""

    name: ClassVar[str] = "own"
    Config: ClassVar[type[MethodConfig]] = OwnConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w"})

    def forward(self, batch, step, total_steps):
        terms = self.loss_terms()
        for name, student in self.students.items():
            self.add_supervised(terms, name, student(batch.x), batch.y)
            weak = student(batch.w)
            terms.add(f"{name}/w", 0.1, *self.cross_entropy(weak, weak.argmax(1)))
        return terms.finish()


def test_a_method_is_a_config_a_class_and_a_line(students, make_batch, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "own", f"{__name__}:Own")
    method_class = get_method("own")
    method = method_class(students(), method_class.Config()).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    out = method(make_batch(), 0, 10)
    out["loss"].backward()
    optimizer.step()
    terms = {f"{student}/{term}" for student in ("clip", "ssm") for term in ("x", "w", "total")}
    assert out.keys() == terms | {"loss"}
    for student in ("clip", "ssm"):
        expected = 0.5 * out[f"{student}/x"] + 0.1 * out[f"{student}/w"]
        torch.testing.assert_close(out[f"{student}/total"], expected)
        changed = [name for name, tensor in method.state_dict().items()
                   if name.startswith(f"students.{student}.") and not before[name].equal(tensor)]
        assert changed


@pytest.mark.parametrize("total", [1, 5, 10, 37, 1000, 42560])
def test_ramp_matches_the_release(golden, total) -> None:
    file = golden("losses.npz")
    steps = file[f"sched/dynamic_weight/T{total}/steps"]
    expected = file[f"sched/dynamic_weight/T{total}/cosine"]
    assert [cosine_ramp(int(step), total) for step in steps] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_ramp_of_other_lengths_matches_the_release(golden, share) -> None:
    expected = golden("losses.npz")[f"sched/dynamic_weight/all1000/up{share}"]
    found = [cosine_ramp(step, 1000, ramp=share) for step in range(1000)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "co2s"])
def test_consistency_terms_follow_their_ramp(make_method, make_batch, name) -> None:
    """No part in the loss at the first step, all of it after the ramp, half of it in between."""
    method = make_method(name, consistency_ramp=0.55, threshold=0.0)
    for step, share in ((0, 0.0), (5, 0.5), (15, 1.0)):
        out = {k: float(v.detach()) for k, v in method(make_batch(), step, 20).items()}
        for student in method.students:
            expected = 0.5 * out[f"{student}/x"]
            for view in method.strong:
                weight = getattr(method.config, f"{view}_weight")
                assert out[f"{student}/{view}"] > 0.1
                expected += share * weight * out[f"{student}/{view}"]
            if name == "co2s":
                ramp = cosine_ramp(step, 20, 0.5, method.config.stability_ramp)
                expected += ramp * out[f"{student}/stability"]
            assert out[f"{student}/total"] == pytest.approx(expected, rel=1e-5)


def test_onlysup_is_cross_entropy_over_valid_pixels(make_method, make_batch) -> None:
    method, batch = make_method("onlysup"), make_batch()
    out = method(batch, 0, 10)
    expected = 0.0
    for name, student in method.students.items():
        logits = F.interpolate(student(batch.x), batch.y.shape[1:], mode="bilinear")
        term = F.cross_entropy(logits, batch.y.long(), ignore_index=255)
        torch.testing.assert_close(out[f"{name}/x"], term.detach(), rtol=2e-5, atol=0)
        expected = expected + term
    torch.testing.assert_close(out["loss"], expected, rtol=2e-5, atol=0)
    assert method.views == {"x"}


@pytest.mark.parametrize("name", METHODS)
def test_class_weights_are_felt_by_labelled_pixels_alone(make_method, make_batch, name) -> None:
    """Weighted cross entropy over the count of valid pixels; every other term as without."""
    weights = [0.25, 1.5, 4.0]
    plain, weighted = make_method(name), make_method(name)
    weighted.weigh_classes(weights)
    before, after = plain(make_batch(), 3, 10), weighted(make_batch(), 3, 10)
    batch = make_batch()
    target = batch.y.long()
    for student, network in weighted.students.items():
        logits = F.interpolate(network(batch.x), target.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, target, torch.tensor(weights), ignore_index=255,
                               reduction="none")  # fmt: skip
        expected = loss.sum() / (target != 255).sum()
        torch.testing.assert_close(after[f"{student}/x"], expected.detach(), rtol=2e-5, atol=0)
        assert not torch.isclose(after[f"{student}/x"], before[f"{student}/x"], rtol=1e-3)
    for key in before.keys() - {"loss"}:
        if not key.endswith(("/x", "/total")):
            assert torch.equal(before[key], after[key]), key
    assert "class_weight" not in weighted.state_dict()
    again = make_method(name)  # what a method keeps from step to step has moved in the others
    again.weigh_classes(weights)
    again.weigh_classes(None)
    assert again(make_batch(), 3, 10)["loss"] == before["loss"]


@pytest.mark.parametrize("name", METHODS)
def test_floating_images_are_learnt_as_bytes_are(make_method, make_batch, name) -> None:
    """Of rasters, whose values lie in [0, 1]."""
    batch = make_batch()
    for view in ("x", "w", "s1", "s2"):
        setattr(batch, view, getattr(batch, view) / 255)
    floats, bytes_ = make_method(name)(batch, 3, 10), make_method(name)(make_batch(), 3, 10)
    assert floats.keys() == bytes_.keys()
    for key in (key for key in floats if floats[key].is_floating_point()):
        torch.testing.assert_close(floats[key], bytes_[key], rtol=5e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_is_not_finite_leaves_nothing_behind(make_method, make_batch, name) -> None:
    """What a method keeps from step to step is then as fit as before."""
    options = {"distribution_alignment": 1.0, "class_thresholds": 1.0}
    options = {k: v for k, v in options.items() if k in get_method(name).Config.model_fields}
    method = make_method(name, **options)
    method(make_batch(), 0, 10)
    with torch.no_grad():
        weights = {n: p.clone() for n, p in method.named_parameters()}
        for student in method.students.values():
            student.decoder.head.bias.fill_(float("nan"))
            next(student.backbone.parameters()).fill_(float("nan"))
    before = {key: value.clone() for key, value in method.own_state().items()}
    assert not torch.isfinite(method(make_batch(), 1, 10)["loss"])
    for key, value in method.own_state().items():
        assert torch.isfinite(value).all(), key
        if key.endswith((".counts", ".rows", ".seen")):  # taken in pixel by pixel: none of these
            assert torch.equal(value, before[key]), key
    with torch.no_grad():
        for n, p in method.named_parameters():
            p.copy_(weights[n])
    assert torch.isfinite(method(make_batch(), 2, 10)["loss"])


def test_unimatch_is_co2s_without_the_stability_term(make_method, make_batch) -> None:
    co2s, unimatch = make_method("co2s", stability_weight=0.0), make_method("unimatch")
    first, second = co2s(make_batch(), 3, 10), unimatch(make_batch(), 3, 10)
    assert first["loss"] == second["loss"]
    assert "clip/stability" not in second


def test_fixmatch_learns_from_one_strong_view(make_method, make_batch) -> None:
    out = make_method("fixmatch")(make_batch(), 0, 10)
    total = 0.5 * (out["clip/x"] + out["clip/s1"])
    torch.testing.assert_close(out["clip/total"], total)
    assert "clip/s2" not in out and "clip/fp" not in out


def test_pseudo_label_counts(make_method, make_batch) -> None:
    method, batch = make_method("unimatch"), make_batch()
    out = method(make_batch(), 0, 10)
    for name, student in method.students.items():
        logits = F.interpolate(student(batch.w), batch.y.shape[1:], mode="bilinear")
        confidence, label = logits.softmax(1).max(1)
        valid = batch.ignore != 255
        sure = valid & (confidence >= 0.35)
        known = sure & (batch.truth != 255)
        right = known & (label == batch.truth)
        assert 0 < int(right.sum()) < int(known.sum()) < int(sure.sum())
        for key, expected in (("valid", valid), ("confident", sure), ("known", known),
                              ("correct", right)):  # fmt: skip
            # a pixel right at the threshold may fall on either side of it
            assert abs(int(out[f"{name}/pseudo_{key}"]) - int(expected.sum())) <= 2
        by_class = [int(out[key]) for key in method.class_counts()[name]]
        assert sum(by_class) == int(out[f"{name}/pseudo_confident"])
        for k, count in enumerate(by_class):
            assert abs(count - int((sure & (label == k)).sum())) <= 2


@pytest.mark.parametrize("padded", [True, False])
def test_confidence_by_class_and_agreement(make_method, make_batch, padded) -> None:
    method, batches = make_method("co2s"), [make_batch(), make_batch()]
    for batch in batches:
        batch.ignore = batch.ignore if padded else None
    out, batch = method(batches[0], 0, 10), batches[1]
    real = torch.ones(4, 64, 64, dtype=torch.bool) if not padded else batch.ignore != 255
    labels = []
    for name, student in method.students.items():
        logits = F.interpolate(student(batch.w), batch.y.shape[1:], mode="bilinear")
        confidence, label = logits.softmax(1).max(1)
        for k, (total, count) in enumerate(method.class_means()[name]):
            of_class = (real & (label == k))[:, ::4, ::4]
            assert abs(int(out[count]) - int(of_class.sum())) <= 2
            mean = float(confidence[:, ::4, ::4][of_class].detach().mean())
            assert float(out[total]) / int(out[count]) == pytest.approx(mean, rel=1e-3)
        labels.append(label)
    same = real & (labels[0] == labels[1])
    assert 0 < int(same.sum()) < int(real.sum())
    assert abs(int(out["pseudo_agree"]) - int(same.sum())) <= 4
    assert method.ratios()["agreement"] == ("pseudo_agree", "clip/pseudo_valid")


def test_one_student_agrees_with_nobody(students, make_batch) -> None:
    method_class = get_method("fixmatch")
    method = method_class({"ssm": students()["ssm"]}, method_class.Config())
    assert "agreement" not in method.ratios()
    assert "pseudo_agree" not in method(make_batch(), 0, 10)


def test_counts_of_correct_labels_need_labels(make_method, make_batch) -> None:
    batch = make_batch()
    batch.truth = None
    assert "clip/pseudo_correct" not in make_method("unimatch")(batch, 0, 10)


@pytest.mark.parametrize("option", ["distribution_alignment", "class_thresholds"])
def test_partners_of_the_same_image_go_with_plain_pseudo_labels(option) -> None:
    config = get_method("fixmatch").Config
    with pytest.raises(ValueError, match=f"{option} needs cutmix_partner 'batch'"):
        config(cutmix_partner="same-image", **{option: 1.0})


def test_partners_stay_in_their_shard(make_method) -> None:
    cpu = torch.device("cpu")
    assert make_method(cutmix_shards=1).partners(4, cpu).tolist() == [1, 2, 3, 0]
    assert make_method(cutmix_shards=2).partners(4, cpu).tolist() == [1, 0, 3, 2]


def test_batches_that_shards_cannot_share(make_method) -> None:
    with pytest.raises(UsageError, match="6 images cannot be divided into 4 shards"):
        make_method(cutmix_shards=4).check_batch(6, 1)
    with pytest.raises(UsageError, match="3 shards cannot be divided among 2 processes"):
        make_method(cutmix_shards=3).check_batch(6, 2)
    assert "has no partner" in make_method().check_batch(4, 4)[0]
    assert make_method().check_batch(8, 4) == []


def test_a_step_is_a_function_of_seed_and_step(make_method, make_batch) -> None:
    first, again = make_method(), make_method()
    torch.manual_seed(99)
    expected = first(make_batch(), 4, 10)
    torch.manual_seed(7)
    assert again(make_batch(), 4, 10)["loss"] == expected["loss"]
    assert again(make_batch(), 5, 10)["clip/fp"] != expected["clip/fp"]


def test_strong_views_are_mixed_in_place(make_method, make_batch) -> None:
    before, batch = make_batch(), make_batch()
    make_method()(batch, 0, 10)
    assert torch.equal(batch.s1[0, :, 10:60, 5:40], before.s1[1, :, 10:60, 5:40])
    assert torch.equal(batch.s1[2:], before.s1[2:])
    assert torch.equal(batch.w, before.w)
