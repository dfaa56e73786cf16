"""The ops inside PyTorch: opcheck, gradcheck, compile, autocast, DDP, checkpointing, repeats."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from op_cases import BY_NAME, draw
from torch import nn
from torch.utils.checkpoint import checkpoint

from co2s_fast.losses import (
    CutMix,
    confusion_matrix,
    masked_cross_entropy,
    softmax_confidence,
    stability_loss,
)
from co2s_fast.ops import load_native

ops = torch.ops.co2s
BOXES = torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]], dtype=torch.int32)
PARTNER = torch.tensor([1, 0])


def logits(target, dtype=torch.float32, grad=True, seed=0, grid=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 3, *grid, generator=generator, dtype=torch.float64) * 2
    return z.to(target.device, dtype).requires_grad_(grad)


def label_size(target):
    """Upsampled, but not in the interpreter: there on equal grids, at a tenth of the time."""
    return (4, 5) if target.interpreted else (8, 10)


def maps(target, size=None):
    size = size or label_size(target)
    generator = torch.Generator().manual_seed(7)
    label = torch.randint(0, 3, (2, *size), generator=generator)
    label[0, 0, 0] = 255
    confidence = 0.9 + 0.1 * torch.rand(2, *size, generator=generator)
    ignore = torch.zeros(2, *size, dtype=torch.uint8)
    ignore[1, -1, -1] = 255
    return [x.to(target.device) for x in (label, confidence, ignore)]


def op_arguments(target, dtype):
    """A call of every catalogue entry, with and without gradients and optional tensors."""
    label, confidence, ignore = maps(target)
    boxes, partner = BOXES.to(target.device), PARTNER.to(target.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.tensor([0.5, 1, 2], dtype=wide, device=target.device)
    empty = torch.empty(0, dtype=wide, device=target.device)
    one = torch.tensor(1.5, dtype=wide, device=target.device)
    z, y = logits(target, dtype), logits(target, dtype, seed=1)
    frozen = logits(target, dtype, grad=False)
    full = (label, confidence, 0.95, ignore, 255, weight, boxes, partner)
    bare = (label, None, 0.95, None, 255, None, None, None)
    size = label_size(target)
    pair = (0.5, *size, ignore, 255, False)
    return [
        (ops.softmax_confidence, (frozen, *size, False)),
        (ops.masked_cross_entropy, (z, *full, False, False, True, 1)),
        (ops.masked_cross_entropy, (z, *full, False, False, False, 0)),
        (ops.masked_cross_entropy, (z, *full, True, True, True, -1)),
        (ops.masked_cross_entropy, (frozen, *bare, False, False, False, 1)),
        (ops.masked_cross_entropy_backward, (one, frozen, *full, False, False, empty)),
        (ops.masked_cross_entropy_backward,
         (confidence.to(wide), frozen, *bare, True, False, empty)),
        (ops.stability_loss, (z, y, *pair, True, True, True)),
        (ops.stability_loss, (z, frozen, *pair, True, False, False)),
        (ops.stability_loss_backward,
         (one.expand(2).clone(), frozen, y.detach(), *pair, True, False, empty, empty)),
        (ops.confusion_matrix,
         (frozen, label, 255, False, torch.zeros(3, 3, dtype=torch.int64, device=target.device))),
        (ops.cutmix_, (torch.rand(2, 3, *size, device=target.device), boxes, partner)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(12))
def test_opcheck(index, target):
    op, arguments = op_arguments(target, torch.float32)[index]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("size", [(2, 3), (4, 6), (5, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck(size, align_corners, cpu_target):
    label, confidence, ignore = maps(cpu_target, size)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    z, y = (logits(cpu_target, torch.float64, seed=seed, grid=(2, 3)) for seed in (0, 1))
    for reduction in ("valid", "confident", "sum", "none"):

        def cross_entropy(z, reduction=reduction):
            return masked_cross_entropy(
                z, label, confidence, ignore_mask=ignore, class_weight=weight,
                cutmix=CutMix(BOXES, PARTNER), reduction=reduction, align_corners=align_corners,
            )  # fmt: skip

        assert torch.autograd.gradcheck(cross_entropy, (z,))

    def stability(z, y):
        # The teacher is a constant to the op but not to finite differences: one side at a time.
        return stability_loss(z, y.detach(), threshold=0.5, size=size, align_corners=align_corners)[
            0
        ]

    assert torch.autograd.gradcheck(stability, (z, y.detach()))
    assert torch.autograd.gradcheck(
        lambda y: stability_loss(
            z.detach(), y, threshold=0.5, size=size, align_corners=align_corners
        )[1],
        (y,),
    )


def step(z, y, label, confidence, ignore, boxes, partner, images, matrix):
    """Every public function once, as a training step uses them."""
    cutmix = CutMix(boxes, partner)
    cutmix.mix_(images)
    weak, pseudo = softmax_confidence(z, tuple(label.shape[1:]))
    loss = masked_cross_entropy(z, label, confidence, ignore_mask=ignore, cutmix=cutmix)
    loss = loss + masked_cross_entropy(y, pseudo, weak, threshold=0.5, reduction="confident")
    loss = loss + masked_cross_entropy(z, cutmix.mix_maps(label), reduction="none").mean()
    loss = loss + sum(stability_loss(z, y, threshold=0.5, size=tuple(label.shape[1:])))
    confusion_matrix(z, label, out=matrix)
    return loss


@pytest.mark.parametrize("dynamic", [False, None])
def test_compile_has_no_graph_break(dynamic, target):
    label, confidence, ignore = maps(target)

    def run(function):
        z, y = (logits(target, seed=seed) for seed in (0, 1))
        images = torch.rand(2, 3, *label.shape[1:], generator=torch.Generator().manual_seed(3)).to(
            target.device
        )
        matrix = torch.zeros(3, 3, dtype=torch.int64, device=target.device)
        loss = function(
            z, y, label, confidence, ignore, BOXES.to(target.device), PARTNER.to(target.device),
            images, matrix,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), z.grad, y.grad, images, matrix

    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does, without its C++ compilation.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ours, eager in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.slow
def test_compile_down_to_machine_code(cpp_target):
    """Through inductor, which has the C++ around our ops compiled."""
    label, confidence, ignore = maps(cpp_target)

    def losses(z, y):
        loss = masked_cross_entropy(z * 2, label, confidence, ignore_mask=ignore)
        return loss + sum(stability_loss(z, y.exp(), threshold=0.5, size=(8, 10)))

    gradients = []
    torch._dynamo.reset()
    for function in (losses, torch.compile(losses, fullgraph=True)):
        inputs = [logits(cpp_target, seed=seed) for seed in (0, 1)]
        function(*inputs).backward()
        gradients.append([z.grad for z in inputs])
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager)


def test_export_keeps_the_op(target):

    size = label_size(target)

    class Head(nn.Module):
        def forward(self, z):
            return softmax_confidence(z, size)

    program = torch.export.export(Head(), (logits(target, grad=False),))
    assert "co2s.softmax_confidence" in program.graph_module.code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_inside_the_ops(dtype, target):
    label, confidence, _ = maps(target)
    results = []
    for enabled in (True, False):
        z, y = (logits(target, dtype, seed=seed) for seed in (0, 1))
        with torch.autocast(target.device, dtype=dtype, enabled=enabled):
            loss = masked_cross_entropy(z, label, confidence)
            loss = loss + sum(stability_loss(z, y, threshold=0.5, size=label_size(target)))
            weak, _ = softmax_confidence(z)
        loss.backward()
        assert loss.dtype == weak.dtype == torch.float32 and z.grad.dtype == dtype
        results.append((loss.detach(), weak, z.grad, y.grad))
    for inside, outside in zip(*results, strict=True):
        assert torch.equal(inside, outside)


def test_autocast_convolution_in_front(target):
    label, _, _ = maps(target)
    head = nn.Conv2d(4, 3, 1).to(target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        z = head(torch.randn(2, 4, 4, 5, device=target.device))
        assert z.dtype == torch.bfloat16
        loss = masked_cross_entropy(z, label)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, target):
    label, confidence, _ = maps(target)

    def loss(z, y):
        ce = masked_cross_entropy(z * 2, label, confidence)
        return ce + sum(stability_loss(z, y * 2, threshold=0.5, size=label_size(target)))

    plain = [logits(target, seed=seed) for seed in (0, 1)]
    loss(*plain).backward()
    again = [logits(target, seed=seed) for seed in (0, 1)]
    checkpoint(loss, *again, use_reentrant=reentrant).backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_distributed_data_parallel(target, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        label, confidence, _ = maps(target)
        torch.manual_seed(0)
        head = nn.Conv2d(4, 3, 1).to(target.device)
        x = torch.randn(2, 4, 4, 5, device=target.device)
        masked_cross_entropy(head(x), label, confidence).backward()
        expected = head.weight.grad.clone()
        head.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(head)
        masked_cross_entropy(parallel(x), label, confidence).backward()
        assert torch.equal(head.weight.grad, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_two_losses_on_the_same_logits(target):
    label, confidence, _ = maps(target)
    separate = []
    for scale, reduction in ((2.0, "valid"), (-0.5, "sum")):
        z = logits(target)
        (scale * masked_cross_entropy(z, label, confidence, reduction=reduction)).backward()
        separate.append(z.grad)
    z = logits(target)
    loss = 2.0 * masked_cross_entropy(z, label, confidence)
    loss = loss - 0.5 * masked_cross_entropy(z, label, confidence, reduction="sum")
    loss.backward(retain_graph=True)
    torch.testing.assert_close(z.grad, sum(separate))
    loss.backward()  # what was saved is still there and unchanged
    torch.testing.assert_close(z.grad, 2 * sum(separate))


def test_no_graph_where_none_is_wanted(target):
    label, confidence, _ = maps(target)
    z = logits(target)
    with torch.no_grad():
        assert not masked_cross_entropy(z, label, confidence).requires_grad
    with torch.inference_mode():
        masked_cross_entropy(z, label, confidence)
        softmax_confidence(z)
    assert not any(x.requires_grad for x in softmax_confidence(z))
    assert not masked_cross_entropy(z.detach(), label).requires_grad


def test_no_second_derivative(target):
    label, _, _ = maps(target)
    z = logits(target)
    (gradient,) = torch.autograd.grad(masked_cross_entropy(z, label), z, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_cross_entropy has no second derivative"):
        gradient.square().sum().backward()
    losses = stability_loss(z, logits(target, seed=1), threshold=0.5, size=label_size(target))
    (gradient,) = torch.autograd.grad(losses[0], z, create_graph=True)
    with pytest.raises(RuntimeError, match="stability_loss has no second derivative"):
        gradient.square().sum().backward()


def all_results(target, names=("up4", "fraction", "down", "equal_wide")):
    """Every output and gradient of every op on a few cases."""
    results = []
    for name in names:
        case = BY_NAME[name]
        x = draw(case, torch.float32).to(target.device)
        a, b = (z.detach().requires_grad_() for z in (x.a, x.b))
        loss = masked_cross_entropy(
            a, x.target, x.confidence, ignore_mask=x.ignore_mask, cutmix=x.cutmix,
            class_weight=x.class_weight, align_corners=case.align_corners,
        )  # fmt: skip
        losses = stability_loss(a, b, threshold=0.5, size=case.size)
        (loss + 0.7 * sum(losses)).backward()
        results += [loss, *losses, a.grad, b.grad]
        results += [*softmax_confidence(a, case.size), confusion_matrix(a, x.target)]
    return [result.detach().cpu() for result in results]


def test_repeats_are_bit_equal(target):
    if target.name == "reference" and target.device == "cuda":
        pytest.skip("PyTorch's own bilinear backward is not deterministic on CUDA")
    names = ("equal",) if target.interpreted else ("up4", "fraction", "down", "equal_wide")
    first = all_results(target, names)
    for _ in range(1 if target.interpreted else 4):
        assert all(map(torch.equal, first, all_results(target, names)))


def test_result_does_not_depend_on_the_number_of_threads(cpp_target):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(all_results(cpp_target))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, cpp_target):
    """The processor's best set serves this process; the others in one of their own."""
    if isa == load_native().build_info()["instruction_set"]:
        pytest.skip("it serves the other tests of this process")
    cases = "cross_entropy or stability or prediction"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"cpp and ({cases}) and not float64",
         "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "CO2S_CPU_ISA": isa}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if f"CO2S_CPU_ISA={isa}: not supported by this CPU" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:]


def test_maps_are_not_kept_for_a_saved_gradient(cpp_target):
    """What the backward does not read is freed as soon as its owner lets go of it."""
    label, confidence, _ = maps(cpp_target)
    kept = [weakref.ref(label), weakref.ref(confidence)]
    z = logits(cpp_target)
    loss = masked_cross_entropy(z, label, confidence)
    del label, confidence
    assert [ref() for ref in kept] == [None, None]
    loss.backward()
    assert z.grad.abs().sum() > 0


def test_a_kept_graph_gives_the_same_gradient_again(cpp_target):
    """The saved gradient is scaled where it lies only when nobody can ask for it again."""
    label, confidence, _ = maps(cpp_target)
    a, b = logits(cpp_target), logits(cpp_target, seed=1)
    loss = 3 * masked_cross_entropy(a, label, confidence)
    loss = loss + 5 * sum(stability_loss(a, b, threshold=0.5, size=tuple(label.shape[1:])))
    first = torch.autograd.grad(loss, (a, b), retain_graph=True)
    again = torch.autograd.grad(loss, (a, b), retain_graph=True)
    last = torch.autograd.grad(loss, (a, b))
    for one, two, three in zip(first, again, last, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert one.data_ptr() != two.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (a, b))
