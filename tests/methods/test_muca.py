"""MUCA: turns, noise, boxes, attention of channels, and every term in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.errors import UsageError
from co2s_fast.methods.base import channel_keep_masks, own_rows, step_generator
from co2s_fast.methods.cross_attention import CrossAttention
from co2s_fast.methods.muca import DROPOUT, PASSES, cells, padded, rise, standard
from co2s_fast.methods.muca_views import TURNS, noise, strong_boxes, turn

LEVELS = ["level1", "level2", "level3"]
TERMS = ["x", "out", *LEVELS, "attention"]


def turned(image: torch.Tensor, t: int) -> torch.Tensor:
    image = image.rot90(t % 4, (-2, -1))
    return image.flip(-1) if t >= 4 else image


def unturned(image: torch.Tensor, t: int) -> torch.Tensor:
    return (image.flip(-1) if t >= 4 else image).rot90(-(t % 4), (-2, -1))


def test_turns_are_torchs_and_are_undone() -> None:
    maps = torch.randint(256, (TURNS, 3, 6, 6), dtype=torch.uint8)
    turns = torch.randperm(TURNS, generator=torch.Generator().manual_seed(1))
    found = turn(maps, turns)
    for one, image, t in zip(found, maps, turns.tolist(), strict=True):
        assert torch.equal(one, turned(image, t))
    assert len({turn(maps[:1], torch.tensor([t])).numpy().tobytes() for t in range(TURNS)}) == TURNS
    assert torch.equal(turn(found, turns, back=True), maps)


def test_only_squares_are_turned(make_method, make_batch) -> None:
    with pytest.raises(UsageError, match=r"square ones, found 6 x 8"):
        turn(torch.zeros(1, 1, 6, 8), torch.zeros(1, dtype=torch.int64))
    batch = make_batch()
    for name in ("x", "w"):
        setattr(batch, name, getattr(batch, name)[..., :48, :])
    for name in ("y", "ignore", "truth"):
        setattr(batch, name, getattr(batch, name)[..., :48, :])
    with pytest.raises(UsageError, match=r"found 48 x 64"):
        make_method("muca")(batch, 0, 10)


def test_noise_is_normal_and_each_images_own() -> None:
    keys = torch.tensor([0, 1, 2**32 - 1, 12345])
    found = noise(keys, torch.Size([3, 128, 128])).double()
    assert found.shape == (4, 3, 128, 128)
    # Not the same numbers in another order, either.
    assert not torch.equal(found[0].flatten().sort()[0], found[1].flatten().sort()[0])
    assert torch.equal(found[1:2].float(), noise(keys[1:2], torch.Size([3, 128, 128])))
    flat = found.flatten(1)
    assert flat.mean(1).abs().max() < 0.02 and (flat.std(1) - 1).abs().max() < 0.02
    assert abs((flat.abs() > 2).double().mean().item() - 0.0455) < 0.004
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.02
    for beside in (found[..., 1:] * found[..., :-1], found[:, :, 1:] * found[:, :, :-1]):
        assert abs(beside.mean()) < 0.01


def test_boxes_are_one_of_cutmix_or_a_square_each() -> None:
    generator = torch.Generator().manual_seed(0)
    side, pasted, areas = 100, 0, []
    for _ in range(400):
        common = torch.rand(4, generator=generator, dtype=torch.float64)
        own = torch.rand(3, 3, generator=generator, dtype=torch.float64)
        boxes, pastes = strong_boxes(side, common, own)
        assert boxes.dtype == torch.int32
        assert bool(pastes) == bool(common[0] < 0.5)
        wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        assert 0 <= boxes.min() and boxes.max() <= side
        if pastes:
            pasted += 1
            assert torch.equal(boxes[0], boxes[1]) and torch.equal(boxes[0], boxes[2])
            lam, x, y = common[1:].tolist()
            half = math.floor(math.sqrt(1 - lam) * side / 2)
            x, y = math.floor(x * side), math.floor(y * side)
            sides = (max(x - half, 0), max(y - half, 0), min(x + half, side), min(y + half, side))
            assert boxes[0].tolist() == list(sides)
        else:
            assert torch.equal(wide, high)
            areas += (wide * high / side**2).tolist()
            assert not torch.equal(boxes[0], boxes[1])
    assert 160 < pasted < 240
    assert 0.0099 < min(areas) < 0.013 and 0.045 < max(areas) < 0.0512


def plain_attention(module: CrossAttention, student, teacher, value_scale, result_scale):
    """CTSA as it is written down: one einsum over all score matrices, an instance norm of torch."""
    channels = student.shape[1]

    def tokens(features):
        return F.layer_norm(F.gelu(module.enter(features)).flatten(2).transpose(1, 2), (channels,),
                            module.norm.weight, module.norm.bias)  # fmt: skip

    own, other = tokens(student), tokens(teacher)
    query = own @ module.query.weight.T
    key = torch.cat(list(other @ module.key.weight.T), 1)
    value = torch.cat(list((other @ module.value.weight.T) * value_scale[:, None]), 1)
    scores = torch.einsum("bnq,nm->bqm", query, key)
    weights = F.instance_norm(scores[:, None])[:, 0].softmax(2)
    found = module.merge(torch.einsum("bqm,nm->bnq", weights, value)) * result_scale[:, None]
    found = F.layer_norm(own + found, (channels,), module.norm_out.weight, module.norm_out.bias)
    return F.gelu(module.leave(found.transpose(1, 2).reshape(student.shape)))


def test_attention_is_that_of_channels() -> None:
    torch.manual_seed(0)
    module = CrossAttention(6).double()
    student, teacher = torch.randn(2, 3, 6, 4, 4, dtype=torch.float64).unbind()
    student.requires_grad_()
    scales = (torch.rand(3, 18) > 0.3).double() / 0.7, (torch.rand(3, 6) > 0.3).double() / 0.7
    pull = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    learns = [student, *module.parameters()]
    found = module(student, teacher, *scales)
    expected = plain_attention(module, student, teacher, *scales)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    mine = torch.autograd.grad((found * pull).sum(), learns)
    theirs = torch.autograd.grad((expected * pull).sum(), learns)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
        assert other.abs().max() > 1e-6
    with torch.no_grad():
        torch.testing.assert_close(module(student, teacher, *scales), expected.detach())


def test_attention_keeps_no_score_matrix() -> None:
    """What waits for the backward pass is of the size of tokens and weights."""
    module = CrossAttention(32)
    features = torch.randn(2, 4, 32, 2, 2).unbind()
    scores, sizes = 96 * 4 * 96, []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*features, torch.ones(4, 96), torch.ones(4, 32))
        assert sizes and max(sizes) < scores
        found = plain_attention(module, *features, torch.ones(4, 96), torch.ones(4, 32))
        assert max(sizes) == 4 * scores  # the control
    assert found.shape == (4, 32, 2, 2)


def plain(method, batch, step: int, total: int) -> dict[str, torch.Tensor]:
    """Every term and the loss, image by image, level by level, at full size where pixels count."""
    config, result, size = method.config, {}, batch.w.shape[-2:]
    strong, hidden, turns, keys = method.draw(batch, step)
    counted, double = hidden != 255, torch.float64
    progress = step / total * 300
    omega = config.consistency_weight * math.exp(-5 * (1 - min(progress // 2, 150) / 150) ** 2)
    bound = config.entropy_threshold
    bound += (1 - bound) * math.exp(-5 * (1 - min(progress, 100) / 100) ** 2)
    images = batch.w.to(double) / 255

    def noisy(pictures, key):
        draws = config.noise * noise(key, pictures.shape[1:])
        return pictures + draws.clamp(-2 * config.noise, 2 * config.noise)

    def norm(f):
        f = f - f.mean(1, keepdim=True)
        return f / (f.square().mean(1, keepdim=True) + 1e-5).sqrt()

    def whole_cells(side):
        shape = (side, size[0] // side, side, size[1] // side)
        return torch.stack([each.view(shape).all(3).all(1) for each in counted])

    loss = 0
    for index, (name, student) in enumerate(method.students.items()):
        teacher = method.averages[name]
        with torch.no_grad():
            moved = torch.stack([turned(i, t) for i, t in zip(images, turns.tolist(), strict=True)])
            levels = teacher.features(noisy(moved, keys[0]))

            def restore(maps):
                return torch.stack([unturned(m, t)
                                    for m, t in zip(maps, turns.tolist(), strict=True)])

            taught = [restore(norm(level)) for level in levels]
            taught_logits = restore(teacher.decode(levels))
            generator, means = step_generator(method.seed, step, index, PASSES), [0, 0, 0]
            for key in keys[1:]:
                levels = teacher.features(noisy(images, key))
                keep = channel_keep_masks(levels, config.mc_dropout, generator)
                for i in range(3):
                    dropped = norm(levels[i]) * keep[i][..., None, None] / (1 - config.mc_dropout)
                    means[i] = means[i] + dropped.softmax(1) / config.mc_passes
            entropies = [-(m * m.log()).sum(1) / math.log(m.shape[1]) for m in means]
            label = F.interpolate(student(batch.w), size, mode="bilinear").argmax(1)
        own = student.features(strong)
        deep, channels = own[-1], own[-1].shape[1]
        rows = own_rows(len(deep), 4 * channels, step_generator(method.seed, step, index, DROPOUT))
        rate = config.attention_dropout
        scale = (rows >= rate).to(double) / (1 - rate)
        attended = plain_attention(method.attention[name], norm(deep), taught[-1],
                                   *scale.split([3 * channels, channels], 1))  # fmt: skip

        def mean_of(values, chosen):
            return (values * chosen).sum() / chosen.sum().clamp(min=1)

        labeled = F.interpolate(student(batch.x), size, mode="bilinear")
        target = batch.y.long()
        known = target != 255
        result[f"{name}/x"] = mean_of(
            F.cross_entropy(labeled, target.clamp(max=2), reduction="none"), known
        )
        logits = student.decode(own)
        real = whole_cells(logits.shape[-1])
        distance = F.huber_loss(logits, taught_logits, reduction="none").mean(1)
        result[f"{name}/out"] = mean_of(distance, real)
        for i in range(3):
            real = whole_cells(own[i].shape[-1]) & (entropies[i] < bound)
            distance = F.huber_loss(norm(own[i]), taught[i], reduction="none").mean(1)
            result[f"{name}/level{i + 1}"] = mean_of(distance, real)
        attentive = F.interpolate(student.decode((*own[:-1], attended)), size, mode="bilinear")
        result[f"{name}/attention"] = mean_of(
            F.cross_entropy(attentive, label, reduction="none"), counted
        )
        weights = (config.supervised_weight, omega, *[omega * config.feature_weight] * 3,
                   config.attention_weight)
        loss = loss + sum(
            w * result[f"{name}/{t}"] for w, t in zip(weights, TERMS, strict=True)
        )
    return {**{k: v.detach() for k, v in result.items()}, "loss": loss}


def taught(make_method, students, **options):
    """A method in double precision whose teachers are other students."""
    method = make_method("muca", **options).double()
    teachers = {n: s.double().eval().requires_grad_(False) for n, s in students(11).items()}
    method.take_averages(teachers)
    return method


def gradients(method, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("step", "options"), [
    (1, {"entropy_threshold": 0.7}),
    (3, {}),
    (9, {"mc_passes": 2, "noise": 0.3, "mc_dropout": 0.2}),
    (4, {"attention_dropout": 0.0, "supervised_weight": 0.7, "consistency_weight": 1.0,
         "feature_weight": 2.0, "attention_weight": 1.0}),
])  # fmt: skip
def test_terms_are_the_plain_ones(make_method, students, make_batch, step, options) -> None:
    method = taught(make_method, students, **options)
    batch, untouched = make_batch(), make_batch()
    found = method(batch, step, 10)
    expected = plain(method, make_batch(), step, 10)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, msg=key)
    mine, theirs = gradients(method, found["loss"]), gradients(method, expected["loss"])
    assert mine.keys() == theirs.keys()
    assert mine.keys() == {n for n, p in method.named_parameters() if p.requires_grad}
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-8, msg=key)
    for view in ("x", "w", "y", "ignore"):
        assert torch.equal(getattr(batch, view), getattr(untouched, view))
    assert all(p.grad is None for each in method.averages.values() for p in each.parameters())


def test_the_plain_terms_see_both_kinds_of_boxes_and_of_masks(
    make_method, students, make_batch
) -> None:
    """What the cases above are said to be."""
    method, batch = taught(make_method, students), make_batch()
    kinds = {}
    for step in (1, 3, 4, 9):
        strong = method.draw(batch, step)[0]
        changed = (strong != batch.w).any(1)
        from_labeled = ((strong == batch.x).all(1) & changed).sum() / changed.sum()
        kinds[step] = "paste" if from_labeled > 0.99 else "erase"
    assert set(kinds.values()) == {"paste", "erase"}
    first, last = method(make_batch(), 0, 10), method(make_batch(), 9, 10)
    # No position of the deepest map is certain enough at the start of a run.
    assert first["ssm/level3"] == 0 and first["ssm/level1"] > 0 and last["ssm/level3"] > 0


def test_pasted_and_erased_pixels(make_method, make_batch) -> None:
    method, seen = make_method("muca"), set()
    for step in range(12):
        batch = make_batch()
        strong, hidden, turns, keys = method.draw(batch, step)
        assert strong.dtype == torch.uint8 and hidden.dtype == torch.uint8
        padding = batch.ignore == 255
        box = (hidden == 255) & ~padding
        assert torch.equal(hidden == 255, box | padding)
        kept = hidden == 0
        assert torch.equal(strong.movedim(1, -1)[kept], batch.w.movedim(1, -1)[kept])
        pasted = strong.movedim(1, -1)[box]
        if len(pasted) and (pasted == 127).all():
            seen.add("erased")
            assert 0.009 < box[1].float().mean() < 0.055
        elif len(pasted):
            seen.add("pasted")
            assert torch.equal(pasted, batch.x.movedim(1, -1)[box])
            assert torch.equal(box[1], box[2])  # the one box of the batch
        assert keys.shape == (5, 4) and len(set(keys.flatten().tolist())) == 20
        assert 0 <= turns.min() and turns.max() < TURNS
    assert seen == {"erased", "pasted"}


def test_draws_are_of_the_whole_batch(make_method, make_batch) -> None:
    method, parted = make_method("muca"), make_method("muca")
    parted.take_parts(2)
    for step in range(4):
        whole = method.draw(make_batch(), step)
        halves = [parted.draw(part, step) for part in make_batch().parts(2)]
        for index, one in enumerate(whole):
            both = torch.cat([half[index] for half in halves], dim=1 if index == 3 else 0)
            assert torch.equal(one, both)


def test_the_schedule() -> None:
    assert rise(0, 150) == pytest.approx(math.exp(-5))
    assert rise(75, 150) == pytest.approx(math.exp(-1.25))
    assert rise(150, 150) == rise(400, 150) == 1.0


def test_weights_rise_over_the_run_whatever_its_length(make_method, make_batch) -> None:
    for step, total in ((0, 10), (5, 10), (50, 100), (99, 100)):
        method = make_method("muca", feature_weight=0.0, attention_weight=0.0)
        out = {k: float(v.detach()) for k, v in method(make_batch(), step, total).items()}
        omega = 3 * rise(math.floor(150 * step / total), 150)
        assert out["ssm/total"] == pytest.approx(out["ssm/x"] + omega * out["ssm/out"], rel=1e-5)


def test_features_are_compared_at_one_scale() -> None:
    features = torch.randn(2, 32, 3, 3)
    found = standard(features)
    assert found.mean(1).abs().max() < 1e-6 and (found.var(1, correction=0) - 1).abs().max() < 1e-4
    torch.testing.assert_close(standard(1000 * features + 3), found, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        F.layer_norm(features[1, :, 2, 0], (32,)), found[1, :, 2, 0], rtol=1e-5, atol=1e-5
    )


class Pools(torch.nn.Module):
    """A student whose maps are means of its cells, so that a turn of one turns the other."""

    def __init__(self, pads_to: int) -> None:
        super().__init__()
        self.pads_to, self.mean = pads_to, torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)

    def features(self, images):
        bottom, right = (-side % self.pads_to for side in images.shape[-2:])
        images = F.pad(images - self.mean, (0, right, 0, bottom))
        return (F.avg_pool2d(images, 4), F.avg_pool2d(images, 16))

    def decode(self, features):
        return features[0]


@pytest.mark.parametrize("side", [64, 40])
def test_a_teachers_outputs_are_turned_back(make_method, side) -> None:
    """Also where images are padded to whole patches: padding stays at the right and bottom."""
    method, student = make_method("muca", noise=0.0), Pools(16)
    raw = torch.randint(256, (TURNS, 3, side, side), dtype=torch.uint8)
    images = padded(raw, student)
    assert images.shape[-1] == -(-side // 16) * 16
    keys = torch.zeros(TURNS, dtype=torch.int64)
    features, logits = method.teach(student, images, torch.arange(TURNS), keys)
    expected = student.features(raw / 255)
    torch.testing.assert_close(logits, expected[0])
    for found, level in zip(features, expected, strict=True):
        torch.testing.assert_close(found, standard(level), rtol=1e-4, atol=1e-4)


def test_cells_count_where_all_of_their_pixels_do() -> None:
    counted = torch.ones(1, 40, 40, dtype=torch.bool)
    counted[0, 3, 20] = False
    found = cells(counted, (3, 3), Pools(16))[0]
    assert found.tolist() == [[True, False, False], [True, True, False], [False] * 3]
    found = cells(counted, (12, 12), Pools(16))[0]
    assert found.sum() == 99 and not found[0, 5] and not found[10:].any()
    assert cells(counted[:, :32, :32], (2, 2), Pools(1))[0].tolist() == [[True, False], [True] * 2]


@pytest.mark.parametrize(("option", "value", "terms"), [
    ("noise", 0.0, {"out", *LEVELS, "attention"}),
    ("mc_dropout", 0.0, {*LEVELS}),
    ("mc_passes", 1, {"out", *LEVELS, "attention"}),  # fewer keys are drawn: other noise
    ("entropy_threshold", 0.8, {*LEVELS}),
    ("attention_dropout", 0.5, {"attention"}),
])  # fmt: skip
def test_options_are_felt_where_they_belong(
    make_method, students, make_batch, option, value, terms
) -> None:
    base, step = {"entropy_threshold": 0.75}, 1
    plain_out = taught(make_method, students, **base)(make_batch(), step, 100)
    out = taught(make_method, students, **base | {option: value})(make_batch(), step, 100)
    changed = {t for t in TERMS for n in ("clip", "ssm")
               if not torch.equal(plain_out[f"{n}/{t}"], out[f"{n}/{t}"])}  # fmt: skip
    assert changed == terms


def test_nothing_that_counts_gives_no_loss(make_method, make_batch) -> None:
    method, batch = make_method("muca"), make_batch()
    batch.ignore.fill_(255)
    batch.y.fill_(255)
    out = method(batch, 9, 10)
    assert all(out[f"{n}/{t}"] == 0 for n in ("clip", "ssm") for t in [*TERMS, "total"])
    assert out["clip/pseudo_confident"] == out["clip/pseudo_valid"] == 0
    found = gradients(method, out["loss"])
    assert found.keys() == {n for n, p in method.named_parameters() if p.requires_grad}
    assert all((g == 0).all() for g in found.values())


def test_constant_images_give_finite_gradients(make_method, make_batch) -> None:
    method, batch = make_method("muca", noise=0.0), make_batch()
    batch.x.fill_(0)
    batch.w.fill_(0)
    batch.ignore = batch.truth = None
    out = method(batch, 9, 10)
    assert torch.isfinite(out["loss"])
    assert all(torch.isfinite(g).all() for g in gradients(method, out["loss"]).values())


def test_half_precision_reaches_every_weight(make_method, students, make_batch) -> None:
    """Also where teacher and student are one, whose weights are cast without gradient first."""
    method = make_method("muca")
    exact = method(make_batch(), 9, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(make_batch(), 9, 10)
    found = gradients(method, out["loss"])
    assert found.keys() == {n for n, p in method.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() for g in found.values())
    for term in TERMS:
        torch.testing.assert_close(out[f"ssm/{term}"].float(), exact[f"ssm/{term}"], rtol=0.1,
                                   atol=0.01)  # fmt: skip


def test_it_runs_as_shards_and_counts_what_is_learnt(make_method, make_batch) -> None:
    whole, shards = make_method("muca"), make_method("muca", mean_shards=2)
    one, two = whole(make_batch(), 9, 10), shards(make_batch(), 9, 10)
    assert not torch.isclose(one["clip/out"], two["clip/out"], rtol=1e-6)
    for name, student in whole.students.items():
        batch = make_batch()
        chosen = whole.draw(batch, 9)[1] == 0
        label = F.interpolate(student(batch.w), (64, 64), mode="bilinear").argmax(1)
        assert one[f"{name}/pseudo_confident"] == two[f"{name}/pseudo_confident"] == chosen.sum()
        right = (chosen & (label == batch.truth)).sum()
        assert abs(int(one[f"{name}/pseudo_correct"]) - int(right)) <= 2


def test_attention_is_part_of_the_method(make_method, students) -> None:
    method = make_method("muca")
    assert set(method.own_parameters()) == {"clip/attention", "ssm/attention"}
    assert all(key.startswith("attention.") for key in method.own_state())
    again, other = make_method("muca"), make_method("muca", seed=4)
    for key, value in method.own_state().items():
        assert torch.equal(value, again.own_state()[key])
    key = "attention.clip.query.weight"
    assert not torch.equal(method.own_state()[key], other.own_state()[key])
    assert method.teacher_decay == 0.99 and method.views == {"x", "w"}


def test_a_step_draws_from_nothing_but_seed_and_step(make_method, make_batch) -> None:
    first, again = make_method("muca"), make_method("muca")
    torch.manual_seed(99)
    expected = first(make_batch(), 4, 10)
    torch.manual_seed(7)
    assert again(make_batch(), 4, 10)["loss"] == expected["loss"]
    assert again(make_batch(), 5, 10)["clip/out"] != expected["clip/out"]


def test_it_learns(make_method, make_batch) -> None:
    method, batch = make_method("muca"), make_batch()
    own = [p for group in method.own_parameters().values() for p in group]
    parameters = [p for p in method.students.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*parameters, *own], lr=1e-3)
    history = []
    for _ in range(12):
        out = method(batch, 300, 600)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        history.append([float(out[f"clip/{t}"]) for t in TERMS])
    first, last = history[0], history[-1]
    # Supervised, the deepest features and attention; the logits of labels go apart meanwhile.
    assert all(last[i] < first[i] for i in (0, 4, 5))
