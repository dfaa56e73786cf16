"""U2PL against loops in plain PyTorch: dropped pixels, banks of negatives, InfoNCE, teachers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.errors import UsageError
from co2s_fast.methods.base import step_generator
from co2s_fast.methods.boxes import box_masks, half_area_boxes
from co2s_fast.methods.contrast import ContrastConfig, PixelContrast, RowBank, spread
from co2s_fast.methods.u2pl import BOXES, DRAWS, RepresentationHead, U2PLConfig

SMALL = {"embedding": 16, "bank_rows": 400, "bank_rows_per_step": 64, "anchors": 20,
         "negatives": 7, "head_dropout": 0.0}  # fmt: skip


def taught(make_method, students, **options):
    """A method in float64 whose teachers, students' and heads', are others than its students."""
    method = make_method("u2pl", **SMALL | options).double()
    teachers = {name: s.double().eval().requires_grad_(False) for name, s in students(11).items()}
    method.take_averages(teachers)
    generator = torch.Generator().manual_seed(5)
    for p in method.teacher_heads.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return method


def run(method, batch, step: int = 3):
    out = method(batch, step, 10)
    method.zero_grad()
    out["loss"].backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    return {key: value.detach() for key, value in out.items()}, gradients


def plain_views(method, batch, step: int):
    """What the student sees, with labels, entropies and padding, mixed pixel by pixel."""
    size, partner = batch.w.shape[-2:], torch.arange(len(batch.w)).roll(-1)
    boxes = half_area_boxes(len(batch.w), size, step_generator(method.seed, step, BOXES))
    inside = box_masks(boxes, size) & (method.config.cutmix_rate == 1)
    mixed = torch.where(inside[:, None], batch.w[partner], batch.w)
    ignore = batch.ignore
    if ignore is None:
        ignore = torch.zeros_like(batch.y)
    valid = torch.where(inside, ignore[partner], ignore) != 255
    found = {}
    for name, teacher in method.averages.items():
        def wide(images, teacher=teacher):
            return F.interpolate(teacher(images), size, mode="bilinear").softmax(1)

        label = wide(batch.w).argmax(1)
        probabilities = wide(mixed)
        found[name] = (torch.where(inside, label[partner], label),
                       -(probabilities * probabilities.log()).sum(1))  # fmt: skip
    return mixed, valid, found


def plain_u(student, images, label, unsure, valid, share: float):
    """Mean over what is kept, over the share of the valid pixels that is kept."""
    kept = valid & (unsure < torch.quantile(unsure[valid], share))
    logits = F.interpolate(student(images), label.shape[1:], mode="bilinear")
    losses = F.cross_entropy(logits, label, reduction="none")[kept]
    return valid.sum() / kept.sum() * losses.mean(), kept


def plain_contrast(config, draws, student, teacher, logits, label, reliable, unreliable, labeled,
                   low, high, banks):  # fmt: skip
    """L_c with lists and loops; `banks` are lists of rows, oldest first, and get the step's."""
    classes, n, m = logits.shape[1], config.anchors, config.negatives
    offset, first, second = draws.split([classes, classes * n, classes * n * m])
    first, second = first.view(classes, n), second.view(classes, n, m)
    pixels, features = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (student, teacher))
    chances = logits.permute(0, 2, 3, 1).flatten(0, 2).softmax(1)
    of_labeled = (torch.arange(len(label)) < labeled)[:, None, None].expand(label.shape).flatten()
    label, reliable, unreliable = label.flatten(), reliable.flatten(), unreliable.flatten()
    for c in range(classes):
        new = []
        for p in range(len(label)):
            rank = int((chances[p] > chances[p, c]).sum())
            fits = rank < low and label[p] != c if of_labeled[p] else low <= rank < high
            if fits and bool(unreliable[p]):
                new.append(p)
        most = config.bank_rows_per_step
        if len(new) > most:
            step = len(new) / most
            new = [new[int((i + float(offset[c])) * step)] for i in range(most)]
        rows = [F.normalize(features[p].float(), dim=0).half() for p in new]
        banks[c] = (banks[c] + rows)[-config.bank_rows :]
    losses = []
    for c in range(classes):
        members = (reliable & (label == c)).nonzero().flatten()
        if not len(members):
            continue
        anchors = members[chances[members, c] > config.anchor_confidence]
        loss = torch.zeros((), dtype=torch.float64)
        if len(anchors) and banks[c]:
            centre = features[members].mean(0)
            for i in range(n):
                a = pixels[anchors[int(first[c, i] * len(anchors))]]
                rows = [banks[c][int(second[c, i, j] * len(banks[c]))] for j in range(m)]
                others = torch.stack([centre, *(row.double() for row in rows)])
                scores = F.cosine_similarity(a[None], others, dim=1) / config.temperature
                loss = loss + F.cross_entropy(scores[None], torch.tensor([0])) / n
        losses.append(loss)
    return sum(losses) / len(losses) if len(losses) > 1 else torch.zeros((), dtype=torch.float64)


def pixels_of(classes: int, labeled: int, images: int, seed: int = 0):
    """Maps of 6 x 5 pixels to contrast; class 1 is nowhere."""
    g = torch.Generator().manual_seed(seed)
    shape = (images, 6, 5)
    student, teacher = torch.randn(2, images, 8, 6, 5, generator=g, dtype=torch.float64)
    logits = 2 * torch.randn(images, classes, 6, 5, generator=g, dtype=torch.float64)
    label = torch.randint(-1, classes, shape, generator=g)
    label[label == 1] = 0
    known = (torch.arange(images) < labeled)[:, None, None]
    reliable, unreliable = ((torch.rand(shape, generator=g) < 0.5) | known for _ in "ab")
    return [student.requires_grad_(), teacher, logits, label, reliable & (label >= 0),
            unreliable & (label >= 0), labeled]  # fmt: skip


@pytest.mark.parametrize(("classes", "low", "high"), [(3, 1, 3), (4, 3, 4), (6, 3, 6), (24, 3, 20)])
def test_contrast_is_the_loop_over_classes(classes, low, high) -> None:
    """Values and gradients, over steps that fill the banks."""
    config = ContrastConfig(name="c", anchors=5, negatives=4, bank_rows=200, bank_rows_per_step=9)
    contrast, banks = PixelContrast(classes, 8, config).double(), [[] for _ in range(classes)]
    assert (contrast.low, contrast.high) == (low, high)
    for step in range(3):
        maps = pixels_of(classes, labeled=2, images=5, seed=step)
        generator = torch.Generator().manual_seed(step)
        draws = torch.rand(classes * (1 + 5 + 5 * 4), generator=generator, dtype=torch.float32)
        expected = plain_contrast(config, draws, *maps, low, high, banks)
        (gradient,) = torch.autograd.grad(expected, maps[0])
        found = contrast(*maps, torch.Generator().manual_seed(step))
        assert found > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # rows are rounded to half
        (own,) = torch.autograd.grad(found, maps[0])
        torch.testing.assert_close(own, gradient, rtol=1e-2, atol=1e-5)
        assert (own != 0).any()
    assert contrast.bank.seen.tolist() == [len(rows) for rows in banks]
    assert contrast.bank.seen[1] == 27 and contrast.bank.seen.max() <= 27


def test_draws_are_uniform_over_anchors_and_the_bank() -> None:
    """With one negative an anchor's expected loss is a mean over all pairs."""
    config = ContrastConfig(name="c", anchors=20_000, negatives=1, bank_rows=50,
                            bank_rows_per_step=50)  # fmt: skip
    contrast, maps = PixelContrast(3, 8, config).double(), pixels_of(3, labeled=2, images=5)
    found = contrast(*maps, torch.Generator().manual_seed(0))
    student, teacher, logits, label, reliable = (
        x.flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x.flatten()
        for x in maps[:5])  # fmt: skip
    expected = []
    for c in (0, 2):  # class 1 is nowhere
        members = reliable & (label == c)
        anchors = F.normalize(student[members & (logits.softmax(1)[:, c] > 0.3)], dim=1)
        positive = anchors @ F.normalize(teacher[members].mean(0), dim=0)
        rows = contrast.bank.rows[c, : int(contrast.bank.seen[c])].double()
        pairs = torch.stack([positive[:, None].expand(-1, len(rows)), anchors @ rows.T]) / 0.5
        assert pairs.shape[1] > 3 and pairs.shape[2] > 20
        expected.append((pairs.logsumexp(0) - pairs[0]).mean())
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=0.01, atol=0)


def test_contrast_needs_two_classes_and_negatives() -> None:
    config = ContrastConfig(name="c", anchors=5, negatives=4, bank_rows=20)
    for change in ("one class", "no class", "no anchor", "no negative"):
        maps = pixels_of(4, labeled=2, images=5)
        if change == "one class":
            maps[3][maps[3] > 0] = -1
            maps[4] &= maps[3] >= 0
        if change == "no class":
            maps[4] &= False
        if change == "no anchor":
            maps[2] = torch.zeros_like(maps[2])  # all classes have 1/4
        if change == "no negative":
            maps[5] &= False
        contrast = PixelContrast(4, 8, config).double()
        found = contrast(*maps, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(found, maps[0])
        assert found == 0 and (gradient == 0).all(), change
        assert (contrast.bank.seen > 0).any() == (change != "no negative")


def test_classes_that_cannot_be_contrasted_count_as_zero() -> None:
    """Without anchors a class adds nothing to the sum, and is still counted in the divisor."""
    config = ContrastConfig(name="c", anchors=5, negatives=4, bank_rows=20, anchor_confidence=0.35)
    maps, found = pixels_of(3, labeled=2, images=5), []
    for without in (1, 0, 2):  # class 1 is nowhere
        # All three classes nearly as likely as each other there, ranked as before.
        nearly = torch.where((maps[3] == without)[:, None], 1e-3 * maps[2], maps[2])
        contrast = PixelContrast(3, 8, config).double()
        found.append(contrast(*maps[:2], nearly, *maps[3:], torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found[1] + found[2], found[0])
    assert found[1] > 0.1 and found[2] > 0.1


def test_the_released_banks_take_only_disagreements() -> None:
    config = ContrastConfig(name="c", bank_rows=200, bank_rule="released")
    for agree in (True, False):
        maps = pixels_of(5, labeled=2, images=5)
        if agree:
            maps[3] = torch.where(maps[3] >= 0, maps[2].argmax(1), -1)
        contrast = PixelContrast(5, 8, config).double()
        contrast(*maps, torch.Generator().manual_seed(0))
        rank = maps[2].argsort(1, descending=True).argsort(1)
        expected = [int((maps[5] & (maps[3] == c) & (rank[:, c] >= 3))[2:].sum()) for c in range(5)]
        assert contrast.bank.seen.tolist() == expected
        assert (sum(expected) == 0) == agree


def test_a_bank_keeps_the_last_rows() -> None:
    bank, kept = RowBank(2, 10, 3), [[], []]
    generator = torch.Generator().manual_seed(0)
    for counts in ([3, 0], [4, 4], [1, 0], [4, 4], [2, 3], [4, 4]):
        rows = torch.randn(2, 4, 3, generator=generator)
        bank.push(rows, torch.tensor(counts))
        for c, count in enumerate(counts):
            kept[c] = (kept[c] + [tuple(row.tolist()) for row in rows[c, :count].half()])[-10:]
        for c in range(2):
            found = {tuple(row.tolist()) for row in bank.rows[c, : int(bank.seen[c])]}
            assert found == set(kept[c]) and len(found) == len(kept[c])
    draws = torch.rand(2, 500, 4, generator=generator)
    drawn = {tuple(row.tolist()) for row in bank.draw(draws)[0].flatten(0, 1)}
    assert drawn == set(kept[0]) and bank.seen.tolist() == [18, 15]
    assert (RowBank(2, 10, 3).draw(draws) == 0).all()


def test_a_systematic_sample_is_distinct_and_fair() -> None:
    counts = torch.tensor([0, 3, 7, 8, 1000])
    hits = torch.zeros(8)
    for offset in torch.linspace(0, 0.999, 200):
        found = spread(counts, 7, offset.expand(5))
        assert found[1].tolist()[:3] == [0, 1, 2] and found[2].tolist() == list(range(7))
        assert len(set(found[3].tolist())) == 7 and int(found[3].max()) < 8
        assert len(set(found[4].tolist())) == 7 and int(found[4].max()) < 1000
        hits[found[3]] += 1
    assert hits.min() > 0.8 * 200 * 7 / 8


@pytest.mark.parametrize(("padding", "mixes", "step", "share"), [
    (True, 0, 3, 1 - 0.2 * 0.7), (True, 1, 8, 1 - 0.2 * 0.2), (False, 1, 3, 1 - 0.2 * 0.7),
])  # fmt: skip
def test_pixels_that_are_unsure_are_not_learnt(
    make_method, make_batch, students, padding, mixes, step, share
) -> None:
    """L_sup and L_u with all gradients of the student, and the counts."""
    method = taught(make_method, students, cutmix_rate=mixes, contrast_weight=0.0)
    batch = make_batch()
    if not padding:
        batch.ignore = None
    out, gradients = run(method, batch, step)
    mixed, valid, found = plain_views(method, batch, step)
    for name, student in method.students.items():
        expected, kept = plain_u(student, mixed, *found[name], valid, share)
        torch.testing.assert_close(out[f"{name}/u"], expected.detach(), rtol=1e-9, atol=0)
        assert out[f"{name}/pseudo_confident"] == kept.sum()
        assert out[f"{name}/pseudo_valid"] == valid.sum()
        logits = F.interpolate(student(batch.x), batch.y.shape[1:], mode="bilinear")
        expected = expected + F.cross_entropy(logits, batch.y.long(), ignore_index=255)
        torch.testing.assert_close(out[f"{name}/total"], expected.detach(), rtol=1e-9, atol=0)
        named = {f"students.{name}.{n}": p for n, p in student.named_parameters()
                 if p.requires_grad}  # fmt: skip
        for key, g in zip(named, torch.autograd.grad(expected, named.values()), strict=True):
            torch.testing.assert_close(gradients[key], g, rtol=1e-6, atol=1e-9, msg=key)


def test_a_shard_is_weighed_by_what_it_keeps_itself(make_method, make_batch, students) -> None:
    method = taught(make_method, students, cutmix_rate=1, mean_shards=2)
    out, _ = run(method, batch := make_batch())
    mixed, valid, found = plain_views(method, batch, 3)
    label, unsure = found["ssm"]
    kept = valid & (unsure < torch.quantile(unsure[valid], 1 - 0.2 * 0.7))
    logits = F.interpolate(method.students["ssm"](mixed), label.shape[1:], mode="bilinear")
    losses = F.cross_entropy(logits, label, reduction="none").detach()
    parts = [valid[i].sum() / kept[i].sum() * losses[i][kept[i]].mean()
             for i in (slice(0, 2), slice(2, 4))]  # fmt: skip
    torch.testing.assert_close(out["ssm/u"], sum(parts) / 2, rtol=1e-9, atol=0)
    assert not torch.isclose(parts[0], parts[1], rtol=1e-3)


@pytest.mark.parametrize("mixes", [0, 1])
def test_the_contrast_is_of_the_most_and_the_least_sure(
    make_method, make_batch, students, mixes
) -> None:
    method = taught(make_method, students, cutmix_rate=mixes)
    batch, step, ends = make_batch(2), 4, 0.2 * 0.6
    out, gradients = run(method, batch, step)
    mixed, valid, found = plain_views(method, batch, step)
    images = torch.cat([batch.x, mixed])
    for index, (name, student) in enumerate(method.students.items()):
        label, unsure = found[name]
        low, high = (torch.quantile(unsure[valid], q) for q in (ends, 1 - ends))
        teacher = method.averages[name]
        logits, features = teacher(images), teacher.features(images)
        grid = logits.shape[-2:]
        every = 64 // grid[0]
        known = torch.where(batch.y == 255, -1, batch.y.long())[:, ::every, ::every]
        guess = torch.where(valid, label, -1)[:, ::every, ::every]
        unsure = unsure[:, ::every, ::every]
        classes = torch.cat([known, guess])
        reliable = torch.cat([known >= 0, (guess >= 0) & (unsure <= low)])
        unreliable = torch.cat([known >= 0, (guess >= 0) & (unsure >= high)])
        own = method.heads[name](student.features(images), grid)
        wanted = method.teacher_heads[name](features, grid)
        draws = torch.rand(3 * (1 + 20 + 20 * 7), dtype=torch.float32,
                           generator=step_generator(3, step, DRAWS, index, 0))  # fmt: skip
        expected = plain_contrast(method.config, draws, own, wanted, logits, classes, reliable,
                                  unreliable, 2, 1, 3, [[], [], []])  # fmt: skip
        assert expected > 0.1
        torch.testing.assert_close(out[f"{name}/c"], expected.detach(), rtol=1e-3, atol=0)
        parameter = method.heads[name].project.weight
        (g,) = torch.autograd.grad(0.1 * expected, parameter)
        torch.testing.assert_close(gradients[f"heads.{name}.project.weight"], g,
                                   rtol=1e-2, atol=1e-4 * float(g.abs().max()))  # fmt: skip


def test_weights_and_the_supervised_phase_are_felt(make_method, make_batch) -> None:
    options = {"supervised_weight": 0.7, "unsupervised_weight": 0.6, "contrast_weight": 0.3}
    for share, step, on in ((0.0125, 0, 0), (0.5, 4, 0), (0.5, 5, 1), (0, 0, 1)):
        method = make_method("u2pl", supervised_share=share, **SMALL | options)
        out, _ = run(method, make_batch(2), step)
        for name in method.students:
            x, u, c = (out[f"{name}/{term}"] for term in "xuc")
            assert u > 0.1 and c > 0.1
            torch.testing.assert_close(out[f"{name}/total"], 0.7 * x + on * (0.6 * u + 0.3 * c))


@pytest.mark.parametrize("change", [
    {"dropped_share": 0.5}, {"contrasted_share": 0.4}, {"cutmix_rate": 0.0}, {"temperature": 0.1},
    {"anchors": 3}, {"negatives": 3}, {"bank_rows": 30}, {"bank_rows_per_step": 10},
    {"anchor_confidence": 0.4}, {"head_dropout": 0.5}, {"bank_rule": "released"},
])  # fmt: skip
def test_every_option_is_felt(make_method, make_batch, students, change) -> None:
    start = {"cutmix_rate": 1.0}
    plain = taught(make_method, students, **start)(make_batch(2), 3, 10)
    changed = taught(make_method, students, **start | change)(make_batch(2), 3, 10)
    moved = {key for key in plain if plain[key] != changed[key] and key.startswith("clip/")}
    assert "clip/c" in moved or "dropped_share" in change
    assert ("clip/u" in moved) == bool(change.keys() & {"dropped_share", "cutmix_rate"})
    assert "clip/x" not in moved


def test_half_the_steps_are_mixed_and_the_batch_stays(make_method, make_batch) -> None:
    method, batch, whole = make_method("u2pl", **SMALL), make_batch(), make_batch()
    mixed = 0
    for step in range(40):
        cutmix, view = method.mix_weak_views(batch, step)
        sides = cutmix.boxes.view(-1, 2, 2)
        areas = (sides[:, 1] - sides[:, 0]).prod(1) / 64**2
        assert (areas == 0).all() or (areas - 0.5).abs().max() < 0.01
        mixed += bool(areas.any())
        assert torch.equal(view.w, batch.w) == (not areas.any())
    assert 12 < mixed < 28
    assert torch.equal(batch.w, whole.w) and torch.equal(batch.ignore, whole.ignore)
    run(method, batch)
    assert torch.equal(batch.w, whole.w) and torch.equal(batch.x, whole.x)


@pytest.mark.parametrize("nothing", ["unlabeled", "labels", "either", "unsure"])
def test_nothing_to_learn_from_is_zero(make_method, make_batch, nothing) -> None:
    method, batch = make_method("u2pl", **SMALL), make_batch()
    if nothing in ("unlabeled", "either"):
        batch.ignore.fill_(255)
    if nothing in ("labels", "either"):
        batch.y.fill_(255)
    if nothing == "unsure":  # all pixels alike: none is below the quantile
        for p in method.students.parameters():
            p.data.zero_()
    out, _ = run(method, batch)
    for name in method.students:
        assert (out[f"{name}/u"] == 0) == (nothing != "labels")
        assert (out[f"{name}/x"] == 0) == (nothing in ("labels", "either"))
        assert nothing != "either" or out[f"{name}/c"] == 0
        assert nothing != "either" or method.contrasts[name].bank.seen.sum() == 0
        if nothing != "labels":
            assert out[f"{name}/pseudo_confident"] == 0


def test_teachers_heads_are_averages_and_the_state_is_all_there_is(
    make_method, make_batch
) -> None:
    method = make_method("u2pl", **SMALL)
    head, kept = method.heads["clip"].project.weight, method.teacher_heads["clip"].project.weight
    assert torch.equal(head, kept)
    values = []
    for step in range(4):
        with torch.no_grad():
            head.fill_(step**2)
            values.append(step**2)
            method.before_step(step, 5)
        torch.testing.assert_close(kept, torch.full_like(kept, sum(values) / len(values)))
    with torch.no_grad():
        head.fill_(100)
        before = kept.clone()
        method.before_step(400, 5)
    torch.testing.assert_close(kept, 0.99 * before + 1)
    assert set(method.own_parameters()) == {"clip/heads", "ssm/heads"}
    state = method.own_state()
    assert {key.split(".")[0] for key in state} == {"heads", "teacher_heads", "contrasts"}
    run(method, make_batch())
    assert state["contrasts.ssm.bank.seen"].sum() > 0
    again = make_method("u2pl", **SMALL)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    first, second = run(method, make_batch(), 4)[0], run(again, make_batch(), 4)[0]
    assert all(torch.equal(first[key], second[key]) for key in first)
    fresh = run(make_method("u2pl", **SMALL), make_batch(), 4)[0]
    assert fresh["clip/c"] != first["clip/c"]


def test_a_head_takes_the_middle_and_the_last_map() -> None:
    for widths, levels in (((8, 16, 24), [1, 2]), ((8, 16), [0, 1]), ((8,), [0]),
                           ((8, 16, 24, 32), [1, 3])):  # fmt: skip
        head = RepresentationHead(widths, 16).double()
        assert head.levels == levels
        maps = [torch.randn(2, width, 2 + i, 3, dtype=torch.float64, requires_grad=True)
                for i, width in enumerate(widths)]  # fmt: skip
        found = head(maps, (8, 12))
        assert found.shape == (2, 16, 8, 12)
        found.sum().backward()
        assert [i for i, each in enumerate(maps) if each.grad is not None] == levels
        keep = torch.ones(2, 16, dtype=torch.bool)
        torch.testing.assert_close(head(maps, (8, 12), [keep, keep]), found)
        keep[0] = False
        alone = head(maps, (8, 12), [keep, keep], 0.5)
        torch.testing.assert_close(alone[0], head.project.bias[:, None, None].expand(16, 8, 12))


def test_parts_drop_the_channels_that_the_batch_drops(make_method, make_batch) -> None:
    method, batch = make_method("u2pl", **SMALL | {"head_dropout": 0.4}).double(), make_batch()
    features = method.students["ssm"].features(torch.cat([batch.x, batch.w]))
    whole = method.represent(1, "ssm", features, (16, 16), batch, 3)
    method.take_parts(2)
    for part in batch.parts(2):
        features = method.students["ssm"].features(torch.cat([part.x, part.w]))
        found = method.represent(1, "ssm", features, (16, 16), part, 3)
        places = [2 * part.part, 2 * part.part + 1]
        expected = whole[places + [4 + place for place in places]]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_parts_share_what_may_enter_a_bank(make_method, make_batch) -> None:
    for parts, seen in ((1, 64), (2, 64), (4, 64)):
        method = make_method("u2pl", **SMALL)
        method.take_parts(parts)
        with torch.no_grad():
            for part in make_batch().parts(parts):
                method(part, 3, 10)
        assert method.contrasts["clip"].bank.seen.max() == seen


def test_it_learns(make_method, make_batch) -> None:
    """Stripes of three brightnesses, by a teacher that stays as it is."""
    method, batch = make_method("u2pl", **SMALL), make_batch(2)
    batch.y = (torch.arange(64) // 22).to(torch.uint8).expand(2, 64, 64)
    batch.x = batch.w = (100 * batch.y)[:, None].expand(2, 3, 64, 64).contiguous()
    method.take_averages(copy.deepcopy(method.students).eval().requires_grad_(False))
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    found = []
    for _ in range(12):
        found.append(run(method, batch, 5)[0])
        optimizer.step()
    for name in method.students:
        for term in ("x", "u", "c"):
            first, last = (float(out[f"{name}/{term}"]) for out in (found[0], found[-1]))
            assert last < 0.98 * first, (name, term, first, last)


def test_what_cannot_be(make_method) -> None:
    with pytest.raises(ValueError, match=r"low_rank must be less than high_rank \(3\), found 3"):
        U2PLConfig(high_rank=3)
    with pytest.raises(ValueError, match="multiple of 8"):
        U2PLConfig(embedding=20)
    method = make_method("u2pl", embedding=8, bank_rows=3)
    assert method.check_batch(6, 3) == []
    with pytest.raises(UsageError, match=r"method.bank_rows: 3 rows, 1024 a step .* 4 processes"):
        method.check_batch(8, 4)
    (warning,) = make_method("u2pl", **SMALL).check_batch(4, 4)
    assert "CutMix does nothing" in warning
