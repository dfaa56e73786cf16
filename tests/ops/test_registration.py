"""The operators as eager code calls them, against `torch.ops.co2s` itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from co2s_fast import ops
from co2s_fast.losses import CutMix, confusion_matrix, masked_cross_entropy, stability_loss
from co2s_fast.ops import catalogue
from co2s_fast.ops.masked_cross_entropy import masked_cross_entropy as cross_entropy_op
from co2s_fast.ops.stability_loss import stability_loss as stability_op


def logits(seed: int) -> torch.Tensor:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 3
    return z.requires_grad_()


def operators():
    target = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(2))
    maps = (target, None, 0.95, None, 255, None, None, None, False, False)
    pair = (0.4, 8, 10, None, 255, False)
    return {
        "cross_entropy":
            (cross_entropy_op, torch.ops.co2s.masked_cross_entropy, 1, (*maps, True, 0)),
        "stability": (stability_op, torch.ops.co2s.stability_loss, 2, (*pair, True, True, True)),
    }  # fmt: skip


@pytest.mark.parametrize("stem", sorted({catalogue.stem(name) for name in catalogue.SCHEMAS}))
def test_an_operator_has_its_files_and_its_lines(stem):
    """The places that CONTRIBUTING lists under "Adding an op"."""
    repository = Path(__file__).parents[2]
    tree = ast.parse((repository / "co2s_fast/ops/__init__.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                and node.module == "co2s_fast.ops" for alias in node.names}  # fmt: skip
    assert stem in imported
    files = [f"co2s_fast/ops/{stem}.py", f"kernels/{stem}.py", f"csrc/ops/{stem}.cpp",
             f"csrc/ops/cuda/{stem}_kernel.cu", f"tests/ops/test_{stem}.py",
             f"benchmarks/bench_{stem}.py"]  # fmt: skip
    assert [file for file in files if not (repository / file).is_file()] == []
    listed = (repository / "csrc/CMakeLists.txt").read_text().replace(")", " ").split()
    native = [f"ops/{stem}.cpp", f"ops/cpu/{stem}_kernel.cpp"]
    assert [file for file in native
            if (repository / "csrc" / file).is_file() and file not in listed] == []  # fmt: skip


@pytest.mark.parametrize("name", operators())
def test_eager_code_gets_the_operator_and_its_derivative(name):
    eager, operator, students, options = operators()[name]
    results = []
    for call in (eager, operator):
        z = [logits(seed) for seed in range(students)]
        loss, counts, *_ = call(*z, *options)
        assert not counts.requires_grad and counts.min() > 0
        gradients = torch.autograd.grad(loss.sum(), z)
        assert all(gradient.count_nonzero() > 0 for gradient in gradients)
        results.append([loss.detach(), counts, *gradients])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", operators())
def test_a_backward_of_the_operator_itself_leaves_its_results_alone(name):
    _, operator, students, options = operators()[name]
    z = [logits(seed) for seed in range(students)]
    results = operator(*z, *options)
    before = [result.detach().clone() for result in results]
    torch.autograd.grad(results[0].sum() * 3, z)
    assert all(torch.equal(result, kept) for result, kept in zip(results, before, strict=True))


def test_compiled_and_transformed_code_gets_the_operator():
    z, target = logits(0), torch.zeros(2, 8, 10, dtype=torch.int64)
    loss = masked_cross_entropy(z, target)
    graphs = []

    def backend(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend=backend)
    assert torch.equal(compiled(z, target), loss)
    assert "co2s.masked_cross_entropy.default" in graphs[0]
    each = torch.func.vmap(lambda z: masked_cross_entropy(z, target))(torch.stack([z, 2 * z]))
    assert torch.equal(each[0], loss) and each[1] != each[0]


def test_only_the_loss_that_is_used_sends_a_gradient():
    a, b = logits(0), logits(1)
    loss_a, _ = stability_loss(a, b, threshold=0.4, size=(8, 10))
    alone = torch.autograd.grad(loss_a, (a, b), allow_unused=True)
    assert alone[0].count_nonzero() > 0 and alone[1] is None


def losses_of_one():
    target = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(2))
    other = logits(1).detach()
    return {
        "cross_entropy": lambda z: masked_cross_entropy(z, target),
        "per pixel": lambda z: masked_cross_entropy(z, target, reduction="none").sum(),
        "stability": lambda z: stability_loss(z, other, threshold=0.4, size=(8, 10))[0],
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", losses_of_one())
def test_transforms_of_torch_func(name):
    """Reverse mode and vmap are right, and forward mode, which the kernels lack, raises."""
    loss, z = losses_of_one()[name], logits(0).detach()
    expected = [torch.autograd.grad(loss(x), x)[0]
                for x in (z.clone().requires_grad_(), (2 * z).requires_grad_())]
    assert expected[0].count_nonzero() > 0
    torch.testing.assert_close(torch.func.grad(loss)(z), expected[0])
    torch.testing.assert_close(torch.func.jacrev(loss)(z), expected[0])
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack([z, 2 * z]))
    torch.testing.assert_close(both, torch.stack(expected))
    for forward_mode in (torch.func.jacfwd(loss), torch.func.hessian(loss)):
        with pytest.raises(NotImplementedError, match="jvp"):
            forward_mode(z)


@pytest.mark.parametrize("name", losses_of_one())
def test_a_batch_of_upstream_gradients(name):
    loss, z = losses_of_one()[name], logits(0)
    value = loss(z)
    (expected,) = torch.autograd.grad(value, z, retain_graph=True)
    (found,) = torch.autograd.grad(value, z, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack([expected, -2 * expected]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autograd_sees_what_is_written_in_place(backend, layout):
    if not ops.backend_status()[backend].live:
        pytest.skip(ops.backend_status()[backend].why)
    cutmix = CutMix(torch.tensor([[0, 0, 4, 4], [1, 1, 3, 3]]), torch.tensor([1, 0]))
    convolution = torch.nn.Conv2d(3, 2, 3)
    with ops.use_backend(backend):
        images = torch.randn(2, 3, 8, 8).to(memory_format=layout)
        loss = convolution(images).square().sum()
        cutmix.mix_(images)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        counts = torch.zeros(3, 3, dtype=torch.int64)
        before = counts._version
        confusion_matrix(logits(0).detach(), torch.zeros(2, 8, 10, dtype=torch.int64), out=counts)
        assert counts._version > before
        with torch.inference_mode():
            cutmix.mix_(torch.randn(2, 3, 8, 8))
