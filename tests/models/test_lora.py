"""What trains: low-rank adapters, and that nothing is computed for what is frozen."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from co2s_fast.errors import UsageError
from co2s_fast.models import StudentConfig, build_student
from co2s_fast.models.lora import (
    LoraAttention,
    LoraConfig,
    LoraLinear,
    LoraQkv,
    LowRank,
    add_adapters,
    beside_adapters,
)

aten = torch.ops.aten
SHAPES = {
    "clip": {"backbone": "clip", "model": "tiny-clip", "levels": (0, 2, 4), "stem": "patch",
             "skips": "levels"},
    "timm": {"backbone": "timm", "model": "vit_tiny_patch16_dinov3_qkvb", "weights": None,
             "overrides": {"embed_dim": 96, "depth": 4, "num_heads": 3, "init_values": 1.0},
             "levels": (0, 2, 3)},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")


@pytest.fixture(params=list(SHAPES))
def make(request, classes, small_decoder):
    """Students of the paper's form, small, of one seed; `trainable` and more as given."""

    def build(**changes):
        config = StudentConfig(**SHAPES[request.param], decoder=small_decoder, **changes)
        return build_student(config, classes, seed=0)

    build.backbone = request.param
    return build


def lora_student(make, **lora):
    return make(trainable="lora", lora={"rank": 3, "alpha": 6.0, **lora})


def stir(student) -> None:
    """Give the adapters something to add."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.named_parameters():
        if name.endswith("lora.up"):
            parameter.data.normal_(std=0.2, generator=generator)


def images(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *(size or (64, 80)), generator=torch.Generator().manual_seed(2))


def test_starts_as_the_base_model(make) -> None:
    base, adapted = make(trainable="attention"), lora_student(make)
    for training in (False, True):
        base.train(training), adapted.train(training)
        expected, found = base(images()), adapted(images())
        if make.backbone == "timm":
            assert torch.equal(found, expected)
        else:  # torch's own attention sums in another order
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert adapted.provenance == base.provenance
    for name, value in base.state_dict().items():
        named = name.replace("attn.q_bias", "attn.qkv.q_bias").replace(
            "attn.v_bias", "attn.qkv.v_bias")  # fmt: skip
        assert torch.equal(adapted.state_dict()[named], value), name


def test_adapters_and_nothing_else_of_the_backbone_learns(make) -> None:
    student = lora_student(make)
    groups = {g["name"]: g for g in student.parameter_groups(1e-4, 0.01, adapter_multiplier=3)}
    queries = ["queries"] if make.backbone == "timm" else []
    assert list(groups) == ["adapters", "decoder", *queries]
    assert groups["adapters"]["lr"] == pytest.approx(3e-4)
    frozen = {n: p.detach().clone() for n, p in student.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(list(groups.values()))
    for _ in range(2):  # in the first, the gradient of `down` is 0
        student(images()).square().mean().backward()
        optimizer.step()
    width = student.backbone.widths[-1] if make.backbone == "timm" else 128
    named = dict(student.backbone.named_parameters())
    learning = {n for n, p in named.items() if p.grad is not None}
    assert learning == {n for n in named if "lora." in n} and len(learning) == 4 * 2 * 2
    assert sum(named[n].numel() for n in learning) == 4 * 3 * (4 + 2) * width
    assert all(named[n].grad.any() for n in learning)
    assert {id(p) for p in optimizer.state} == {
        id(p) for p in student.parameters() if p.requires_grad
    }
    for name, value in frozen.items():
        parameter = student.get_parameter(name)
        assert parameter.grad is None and torch.equal(parameter, value), name


class Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            self.seen.add(tuple(out.shape[-2:]))
        return out


def leaves(loss: torch.Tensor) -> set[int]:
    """Ids of the tensors that a backward pass from here would give a gradient to."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("trainable", ["attention", "full", "frozen", "lora"])
def test_no_gradient_is_computed_for_what_is_frozen(make, trainable) -> None:
    student = make(trainable=trainable)
    loss = student(images()).square().mean()
    # In the graph, gradients end in what trains and nowhere else.
    assert leaves(loss) == {id(p) for p in student.parameters() if p.requires_grad}
    with Products() as products:
        loss.backward()
    weights = {n: tuple(p.shape) for n, p in student.backbone.named_parameters()
               if p.dim() == 2 and ("mlp" in n or "in_proj_weight" in n or "qkv.weight" in n)}
    # And no product of a frozen weight's shape, or the transposed, is formed on the way there.
    formed = {n for n, s in weights.items() if {s, s[::-1]} & products.seen}
    learning = {n for n in weights if student.backbone.get_parameter(n).requires_grad}
    assert weights and formed == learning
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_a_frozen_backbone_keeps_nothing_for_the_backward_pass(make) -> None:
    kept: list[torch.Tensor] = []
    student = make(trainable="frozen")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        maps = student.features(images())
        assert not kept and not any(level.requires_grad for level in maps)
        lora_student(make).features(images())
    assert kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(make, dropout) -> None:
    gradients = []
    for on in (False, True):
        student = lora_student(make, dropout=dropout)
        stir(student)
        student.backbone.gradient_checkpointing = on
        if make.backbone == "timm":
            student.backbone.model.set_grad_checkpointing(on)
        torch.manual_seed(5)
        student.train()(images()).square().sum().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.requires_grad})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def test_dropout_is_for_training_only(make) -> None:
    student = lora_student(make, dropout=0.5)
    stir(student)
    assert torch.equal(student.eval()(images()), student(images()))
    assert not torch.equal(student.train()(images()), student(images()))


@pytest.mark.parametrize("size", [(64, 80), (70, 50)])
def test_merged_is_the_same_function_under_the_base_models_names(make, size) -> None:
    base, student = make(trainable="attention"), lora_student(make).eval()
    before = student(images(*size)).detach()
    stir(student)
    expected = student(images(*size))
    assert (expected - before).abs().max() > 1e-2, "the adapters do nothing"
    student.merge_adapters()
    torch.testing.assert_close(student(images(*size)), expected, rtol=1e-4, atol=1e-5)
    kinds = (LoraAttention, LoraLinear, LoraQkv)
    assert not any(isinstance(module, kinds) for module in student.modules())
    base.load_state_dict(student.state_dict())
    torch.testing.assert_close(base.eval()(images(*size)), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_comes_back(make) -> None:
    first, second = lora_student(make).eval(), lora_student(make).eval()
    stir(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))


def test_compiled_without_a_break(make) -> None:
    student = lora_student(make)
    stir(student)
    torch._dynamo.reset()  # sizes that other tests compiled would make this one's dynamic
    compiled = torch.compile(
        copy.deepcopy(student).features, backend="aot_eager", fullgraph=True, dynamic=False
    )
    for found, expected in zip(compiled(images()), student.features(images()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_past_the_deepest_level_have_no_adapters(classes, small_decoder) -> None:
    config = StudentConfig(
        backbone="timm", model="vit_tiny_patch16_224", weights=None, trainable="lora",
        overrides={"embed_dim": 64, "depth": 5, "num_heads": 2}, levels=(0, 1, 2),
        decoder=small_decoder,
    )  # fmt: skip
    student = build_student(config, classes, seed=0)
    student(torch.rand(1, 3, 64, 80)).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not ("lora." in name and ("blocks.3." in name or "blocks.4." in name))


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("vit_base_patch16_224", {"embed_dim": 96, "num_heads": 3}),  # MAE's
        ("beitv2_base_patch16_224", {"embed_dim": 96, "num_heads": 3, "img_size": 64}),
        ("eva02_tiny_patch14_224", {"qkv_fused": False}),
        ("vit_small_patch16_dinov3", {}),  # no biases
    ],
)
def test_every_adapter_of_other_timm_models_is_reached(model, overrides, classes, small_decoder):
    overrides = {"depth": 3, "init_values": 1.0, **overrides}
    build = partial(StudentConfig, backbone="timm", model=model, weights=None, overrides=overrides,
                    levels=(0, 1, 2), decoder=small_decoder)  # fmt: skip
    base = build_student(build(), classes, seed=0).eval()
    student = build_student(build(trainable="lora"), classes, seed=0).eval()
    found = student(images())
    torch.testing.assert_close(found, base(images()), rtol=1e-5, atol=1e-6)
    found.square().mean().backward()
    ups = {n: p.grad for n, p in student.named_parameters() if n.endswith("lora.up")}
    assert len(ups) == 3 * (4 if "eva02" in model else 2)
    assert [name for name, gradient in ups.items() if not gradient.any()] == []
    stir(student)
    with torch.no_grad():
        expected = student(images())
        student.merge_adapters()
        torch.testing.assert_close(student(images()), expected, rtol=1e-4, atol=1e-5)
    base.load_state_dict(student.state_dict())


def test_an_unknown_attention_is_refused(classes, small_decoder) -> None:
    config = StudentConfig(
        backbone="timm", model="vit_tiny_patch16_dinov3_qkvb", weights=None, levels=(0, 1, 2),
        overrides={"embed_dim": 64, "depth": 3, "num_heads": 2}, decoder=small_decoder,
    )  # fmt: skip
    student = build_student(config, classes, seed=0)
    student.backbone.model.blocks[0].attn.proj = torch.nn.Identity()
    with pytest.raises(UsageError, match="RotaryAttention has \\['qkv'\\]"):
        add_adapters(student.backbone, LoraConfig())


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "dropout": 0.1},
                {"batch_first": True, "add_bias_kv": True}])  # fmt: skip
def test_an_attention_that_is_not_plain_is_refused(options) -> None:
    with pytest.raises(UsageError, match="needs the plain attention"):
        LoraAttention(torch.nn.MultiheadAttention(8, 2, **options), LoraConfig())


def test_what_an_adapter_adds_by_hand() -> None:
    adapter = LowRank(torch.zeros(3, 4), LoraConfig(rank=2, alpha=8))
    adapter.up.data.normal_()
    x = torch.rand(5, 4)
    torch.testing.assert_close(adapter(x), 4 * x @ adapter.down.T @ adapter.up.T)


def test_weights_that_no_layer_has_stay_beside_adapters() -> None:
    own = {"a": torch.zeros(1), "b.lora.up": torch.zeros(1)}
    found = beside_adapters({"a": torch.ones(1), "odd": torch.ones(1)}, own)
    assert set(found) == {"a", "odd", "b.lora.up"}
