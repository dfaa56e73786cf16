"""DWL: ranks of confidences within their class, two heads on one trunk, and their coupling."""

from __future__ import annotations

import math
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from co2s_fast.methods.class_ranks import BINS, STEPS, ClassRanks, bins_of
from co2s_fast.methods.dwl import DWLConfig, rank_weight
from co2s_fast.models import build_student
from co2s_fast.models.config import DecoderConfig

CLASSES = [SimpleNamespace(name=name, concepts=[name]) for name in ("field", "road", "water")]


def rounded(probability: Tensor) -> Tensor:
    """Probabilities whose distances from 1 are cut to their 8 leading bits, in float64."""
    mantissa, exponent = torch.frexp(1 - probability.float().double())
    return 1 - torch.ldexp((mantissa * 256).floor() / 256, exponent)


class PlainRanks:
    """The same with lists of values: 50 batches a class, sorted whenever they are asked."""

    def __init__(self, classes: int) -> None:
        self.kept = [deque([torch.ones(1, dtype=torch.float64)], 50) for _ in range(classes)]

    def take(self, confidence: Tensor, label: Tensor, real: Tensor) -> None:
        for k, kept in enumerate(self.kept):
            kept.append(confidence[(label == k) & real].double())

    def rank(self, confidence: Tensor, label: Tensor) -> Tensor:
        ranks = torch.zeros_like(confidence, dtype=torch.float64)
        for k, kept in enumerate(self.kept):
            values = torch.cat(list(kept)).sort().values
            if len(values):
                places = [math.ceil(b * len(values) / 20) - 1 for b in range(1, 21)]
                above = confidence.double()[..., None] > values[places]
                ranks = torch.where(label == k, above.sum(-1) / 20, ranks)
        return ranks


def drawn(seed: int, sharp: float, size: tuple[int, int] = (9, 7), classes: int = 4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, *size, generator=generator) * sharp
    logits[:, 0] += sharp  # a frequent class
    confidence, label = logits.softmax(1).max(1)
    ignore = (torch.rand(3, *size, generator=generator) < 0.2) * 255
    return confidence, label, ignore.to(torch.uint8)


@pytest.mark.parametrize("sharp", [0.5, 3.0, 20.0])
def test_ranks_are_those_of_all_values_kept(sharp) -> None:
    """At 20, most confidences are within 1e-3 of 1, and many are 1."""
    ranks, plain, plainer = ClassRanks(4), PlainRanks(4), PlainRanks(4)
    for step in range(STEPS + 12):
        confidence, label, ignore = drawn(step, sharp)
        label[label == 3] = 3 if step == 2 else 1  # a class that is soon forgotten
        found = ranks(confidence, label, ignore, step)
        assert found.dtype == torch.float32 and found.shape == label.shape
        plain.take(rounded(confidence), label, ignore != 255)
        plainer.take(confidence, label, ignore != 255)
        expected = plain.rank(rounded(confidence), label)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-7)
        exact = plainer.rank(confidence, label)
        if step > 10:  # a value is a small share of the pool
            assert (found - exact).abs().max() < 0.0501
            assert (found - exact).abs().mean() < 0.01
            assert 0.3 < found.mean() < 0.6 or sharp == 20  # most are 1
    assert ranks.counts[:, 3].sum() == 0 and len(torch.cat(list(plain.kept[3]))) == 0
    assert (ranks.table()[3] == 0).all()


def test_bins_ascend_and_tell_what_float32_tells_from_one() -> None:
    one = torch.ones(())
    last = [1 - 2.0**-22, 1 - 2.0**-23, 1 - 2.0**-24, 1.0]
    places = bins_of(torch.tensor(last)).tolist()
    assert places[-1] == BINS - 1 and len(set(places)) == 4 and places == sorted(places)
    ascending = bins_of(torch.linspace(0, 1, 10_001))
    assert (ascending.diff() >= 0).all() and ascending[0] == 0
    # 128 bins from 0.5 to 0.75, as many from 0.75 to 0.875
    assert bins_of(0.75 * one) - bins_of(0.5 * one) == 128
    assert bins_of(0.875 * one) - bins_of(0.75 * one) == 128
    for dtype in (torch.float64, torch.bfloat16):
        assert bins_of(torch.tensor([0.5, 0.75], dtype=dtype)).equal(
            bins_of(torch.tensor([0.5, 0.75]))
        )
    odd = bins_of(torch.tensor([float("nan"), -float("nan"), 1.5, -3.0, float("inf")]))
    assert ((odd >= 0) & (odd < BINS)).all()


@pytest.mark.parametrize("size", [(100, 70), (128, 64), (40, 200), (16, 16)])
def test_of_a_map_64_nearest_rows_and_columns_are_kept(size) -> None:
    confidence, label, ignore = drawn(1, 2.0, size)
    ranks = ClassRanks(4)
    ranks(confidence, label, ignore, 0)
    small = (min(size[0], 64), min(size[1], 64))
    confidence, label, ignore = (
        F.interpolate(each[:, None].float(), small, mode="nearest")[:, 0]
        for each in (confidence, label, ignore)
    )
    for k in range(4):
        values = bins_of(confidence[(label == k) & (ignore != 255)])
        assert ranks.counts[0, k].equal(values.bincount(minlength=BINS).int())


def test_a_step_in_parts_is_one_entry_and_made_twice_is_made_once() -> None:
    confidence, label, ignore = drawn(1, 2.0)
    whole, parted, again = ClassRanks(4), ClassRanks(4), ClassRanks(4)
    expected = whole(confidence, label, ignore, 7)
    for part in range(3):
        cut = slice(part, part + 1)
        parted(confidence[cut], label[cut], ignore[cut], 7, part)
    again(*drawn(2, 2.0), 7)
    assert again(confidence, label.byte(), ignore, 7).equal(expected)
    assert parted.counts.equal(whole.counts) and again.counts.equal(whole.counts)
    assert not whole(confidence, label, None, 7).equal(expected)


def test_a_rank_weighs_more_or_less_as_the_run_goes_on() -> None:
    ranks = torch.arange(21, dtype=torch.float64) / 20
    for progress in (0.0, 0.3, 1.0):
        kappa = 2 + 20 * progress
        expected = 2 / (1 + (-kappa * ranks).exp()) - 1
        torch.testing.assert_close(rank_weight(ranks, progress), expected)


def plain_terms(method, ranks, batch, step: int, total: int):
    """L_sup, L_u, weights and labels of each student, which is called with either head."""
    found = {}
    real = batch.ignore != 255
    for name, student in method.students.items():
        blocks = method.pseudo_head[name]
        places = ["decoder.head"]
        if len(blocks) > 1:
            places.insert(0, f"decoder.ups.{len(student.decoder.ups) - 1}")
        pseudo = {f"{place}.{key}": value for place, block in zip(places, blocks, strict=True)
                  for key, value in block.named_parameters()}  # fmt: skip

        def full(logits: Tensor) -> Tensor:
            return F.interpolate(logits, batch.y.shape[1:], mode="bilinear")

        confidence, label = full(student(batch.w)).detach().softmax(1).max(1)
        ranks[name].take(rounded(confidence), label, real)
        rank = ranks[name].rank(rounded(confidence), label)
        weight = 2 / (1 + (-(2 + 20 * step / total) * rank).exp()) - 1
        supervised = F.cross_entropy(full(student(batch.x)), batch.y.long(), ignore_index=255)
        strong = full(torch.func.functional_call(student, pseudo, batch.s1))
        losses = F.cross_entropy(strong, label, reduction="none") * weight * real
        found[name] = supervised, losses.sum() / real.sum(), weight, label
    return found


def part_heads(method) -> None:
    """Let the heads differ, as they do after some steps."""
    generator = torch.Generator().manual_seed(0)
    for parameter in method.pseudo_head.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.05 * noise


def gradients(method, loss: Tensor) -> dict[str, Tensor]:
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", ["skips", "no skips", "recomputed"])
def test_a_step_is_the_plain_one(make_method, make_batch, case) -> None:
    method = make_method("dwl", warmup_steps=2, s1_weight=0.7)
    if case == "no skips":
        config = method.students["ssm"].config
        bare = DecoderConfig(skip_channels=(), up_channels=())
        config = config.model_copy(update={"decoder": bare})
        one = {"bare": build_student(config, CLASSES, seed=4)}
        method = type(method)(one, method.config).train()
    part_heads(method.double())
    ranks = {name: PlainRanks(3) for name in method.students}
    for step in range(3):  # two steps that only fill the memory
        before, batch = make_batch(seed=step), make_batch(seed=step)
        for student in method.students.values():
            student.checkpoint_gradients(False, case == "recomputed")
            assert len(student.decoder.ups) == (0 if case == "no skips" else 2)
        out = method(batch, step, 8)
        for student in method.students.values():
            student.checkpoint_gradients(False, False)  # `functional_call` knows no recomputing
        expected = plain_terms(method, ranks, before, step, 8)
        assert torch.equal(batch.x, before.x) and torch.equal(batch.w, before.w)
    loss = 0
    for name, (supervised, strong, weight, label) in expected.items():
        torch.testing.assert_close(out[f"{name}/x"], supervised.detach())
        torch.testing.assert_close(out[f"{name}/s1"], strong.detach())
        total = supervised + 0.7 * strong
        torch.testing.assert_close(out[f"{name}/total"], total.detach())
        assert 0.02 < strong < 3
        chosen = (weight > 0) & (before.ignore != 255)
        assert out[f"{name}/pseudo_confident"] == chosen.sum()
        assert 0.5 < chosen.sum() / out[f"{name}/pseudo_valid"] < 1
        correct = chosen & (before.truth != 255) & (label == before.truth)
        assert out[f"{name}/pseudo_correct"] == correct.sum()
        loss = loss + total
    torch.testing.assert_close(out["loss"], loss)
    wanted, found = gradients(method, loss), gradients(method, out["loss"])
    for key, gradient in wanted.items():
        assert gradient.abs().max() > 0 or "decoder" not in key, key
        # weights are float32
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-8, msg=key)


def test_each_head_learns_its_own_images_alone(make_method, make_batch) -> None:
    """Padding everywhere leaves no pseudo-label, labels that are all ignored no label."""
    for gone in ("y", "ignore"):
        method, batch = make_method("dwl", warmup_steps=0), make_batch()
        part_heads(method)
        getattr(batch, gone).fill_(255)
        out = method(batch, 3, 8)
        found = gradients(method, out["loss"])
        assert all(g is not None and g.isfinite().all() for g in found.values())
        for name, student in method.students.items():
            assert (out[f"{name}/x"] == 0) == (gone == "y")
            assert (out[f"{name}/s1"] == 0) == (gone == "ignore")
            assert out[f"{name}/total"] > 0
            heads = (
                [p.grad for block in student.decoder.last_block() for p in block.parameters()],
                [p.grad for p in method.pseudo_head[name].parameters()],
            )
            idle, busy = heads if gone == "y" else heads[::-1]
            assert all((g == 0).all() for g in idle) and all((g != 0).any() for g in busy)
            trunk = student.decoder.aspp.project.weight.grad
            assert (trunk != 0).any()
            kept = method.ranks[name].counts[3]
            assert (kept.sum() == 0) == (gone == "ignore")


def test_no_pixel_is_learnt_where_its_class_never_was(make_method, make_batch) -> None:
    """The least confident of a class has rank 0: with one value in all, nothing is learnt."""
    method, batch = make_method("dwl", warmup_steps=0), make_batch()
    for student in method.students.values():
        student.decoder.head.weight.data.zero_()  # every class as likely at every pixel
    out = method(batch, 60, 100)
    for name in method.students:
        assert out[f"{name}/s1"] == 0 == out[f"{name}/pseudo_confident"]
        assert method.ranks[name].counts[10].sum() > 0
    assert all(g.isfinite().all() for g in gradients(method, out["loss"]).values())


def test_batches_without_padding_or_labels_to_compare_with(make_method, make_batch) -> None:
    none, zeros = make_batch(), make_batch()
    none.ignore = none.truth = None
    zeros.ignore.zero_()
    found, expected = make_method("dwl")(none, 0, 8), make_method("dwl")(zeros, 0, 8)
    assert found["loss"] == expected["loss"] and "clip/pseudo_correct" not in found
    assert found["ssm/pseudo_valid"] == none.w[:, 0].numel()


def test_the_strong_view_waits_for_its_steps_and_has_its_weight(make_method, make_batch) -> None:
    method = make_method("dwl", warmup_steps=3, s1_weight=2.0, supervised_weight=0.3)
    for step, factor in ((0, 0.0), (2, 0.0), (3, 2.0), (40, 2.0)):
        out = method(make_batch(), step, 60)
        for name in method.students:
            assert out[f"{name}/s1"] > 0
            expected = 0.3 * out[f"{name}/x"] + factor * out[f"{name}/s1"]
            torch.testing.assert_close(out[f"{name}/total"], expected)
        gradients(method, out["loss"])
        heads = [p.grad for p in method.pseudo_head.parameters()]  # there, whatever they are
        assert all((g == 0).all() == (factor == 0) for g in heads)
    config = DWLConfig()
    assert (config.warmup_steps, config.s1_weight, config.supervised_weight) == (51, 1, 1)
    assert config.coupling == 0.5
    for wrong in ({"coupling": 1.5}, {"warmup_steps": -1}, {"s1_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DWLConfig(**wrong)


def weights(modules) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_heads_are_coupled_at_the_end_of_an_epoch(make_method, share) -> None:
    method = make_method("dwl", coupling=share)
    students = method.students.values()

    def mains() -> list[Tensor]:
        return weights(block for s in students for block in s.decoder.last_block())

    others = {n: p.clone() for n, p in method.students.named_parameters()
              if ".head." not in n and ".ups.1." not in n}  # fmt: skip
    start, fresh = mains(), weights([method.pseudo_head])
    assert len(start) == 2 * 10
    assert all(map(torch.equal, start, fresh))
    part_heads(method)
    pseudo = weights([method.pseudo_head])
    for step in (1, 4, 6, 9):  # within an epoch of 5
        method.before_step(step, 5)
        assert all(map(torch.equal, mains(), start))
    method.before_step(10, 5)
    for found, before, taken in zip(mains(), start, pseudo, strict=True):
        torch.testing.assert_close(found, share * taken + (1 - share) * before)
        assert share != 1 or torch.equal(found, taken)
    assert all(map(torch.equal, weights([method.pseudo_head]), pseudo))
    assert all(torch.equal(p, others[n]) for n, p in method.students.named_parameters()
               if n in others)  # fmt: skip


def test_a_run_starts_with_equal_heads_whatever_was_loaded(make_method) -> None:
    method = make_method("dwl")
    for student in method.students.values():
        student.decoder.head.bias.data += 1  # as imported weights replace those of construction
    method.before_step(0, 5)
    for name, student in method.students.items():
        for main, pseudo in zip(student.decoder.last_block(), method.pseudo_head[name],
                                strict=True):  # fmt: skip
            for key, value in main.named_parameters():
                own = pseudo.get_parameter(key)
                assert own is not value and torch.equal(own, value)


def test_shards_have_means_of_their_own_and_one_memory(make_method, make_batch) -> None:
    method, batch = make_method("dwl", warmup_steps=0, mean_shards=2).double(), make_batch()
    out = method(make_batch(), 3, 8)
    ranks = {name: PlainRanks(3) for name in method.students}
    halves = []
    whole = plain_terms(method, ranks, batch, 3, 8)
    for part in batch.parts(2):
        real, sums = part.ignore != 255, {}
        cut = slice(2 * part.part, 2 * part.part + 2)
        for name in method.students:
            strong = method.logits_of_heads(name, part)[1]
            size = part.y.shape[1:]
            strong = F.interpolate(strong, size, mode="bilinear")
            weight, label = (each[cut] for each in whole[name][2:])
            losses = F.cross_entropy(strong, label, reduction="none") * weight * real
            sums[name] = losses.sum() / real.sum()
        halves.append(sums)
    for name in method.students:
        expected = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(out[f"{name}/s1"], expected.detach())
        assert not torch.isclose(out[f"{name}/s1"], whole[name][1].detach(), rtol=1e-4)


def test_parts_of_a_batch_are_remembered_together(make_method, make_batch) -> None:
    whole, parted = make_method("dwl"), make_method("dwl")
    parted.take_parts(2)
    for step in (0, 1):
        whole(make_batch(seed=step), step, 10)
        for part in make_batch(seed=step).parts(2):
            parted(part, step, 10)["loss"].backward()
    for name, ranks in whole.ranks.items():
        assert ranks.counts[:2].sum() > 1000
        assert parted.ranks[name].counts.equal(ranks.counts)


def test_what_a_resumed_run_needs_is_saved(make_method, make_batch) -> None:
    method = make_method("dwl")
    assert method.own_parameters().keys() == {"clip/pseudo_head", "ssm/pseudo_head"}
    method(make_batch(), 0, 10)
    state = {key: value.clone() for key, value in method.own_state().items()}
    assert {key.split(".")[0] for key in state} == {"pseudo_head", "ranks"}
    other = make_method("dwl")
    for key, tensor in other.own_state().items():
        tensor.copy_(state[key])
    assert method(make_batch(seed=1), 1, 10)["loss"] == other(make_batch(seed=1), 1, 10)["loss"]
    fresh = make_method("dwl", warmup_steps=0)(make_batch(seed=1), 1, 10)
    assert fresh["clip/s1"] != other(make_batch(seed=1), 1, 10)["clip/s1"]


def test_it_learns(make_method, make_batch) -> None:
    """Labels and pseudo-labels of one batch, whose classes are its brightest channels."""
    method, batch = make_method("dwl", warmup_steps=4, coupling=0.2), make_batch()
    for images in (batch.x, batch.w):
        images.copy_(images[:, :, ::16, ::16].repeat_interleave(16, 2).repeat_interleave(16, 3))
    batch.y, batch.s1 = batch.x.argmax(1).byte(), batch.w.clone()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(24):
        method.before_step(step, 8)
        out = method(batch, step, 24)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append({k: float(v.detach()) for k, v in out.items()})
    for name in method.students:
        assert losses[-1][f"{name}/x"] < losses[4][f"{name}/x"] - 0.2
        assert losses[-1][f"{name}/s1"] < losses[14][f"{name}/s1"] - 0.1
