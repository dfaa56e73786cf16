"""No training step makes the host wait for the device.

Without a GPU: a tensor on the `meta` device has no values, so that whatever fetches one (`item()`,
`tolist()`, `bool()`, `cpu()`, indexing with a mask) raises. The trainer's own step runs on it, and
the forward once more on tensors that pretend to be on a GPU, which take the branches for GPUs.
With a GPU: CUDA's synchronisation debug mode counts.
"""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from co2s_fast.data import Batch
from co2s_fast.engine.averages import Averages
from co2s_fast.engine.meter import FiniteGuard, Meter
from co2s_fast.engine.trainer import Trainer
from co2s_fast.methods import METHODS, get_method
from co2s_fast.models import build_student, tiny_clip_config, tiny_ssm_config

CLASSES = [SimpleNamespace(name=name, concepts=[name]) for name in ("field", "road", "water")]
SIZE, SIDE = 4, 64


def make_method(name: str, **options) -> nn.Module:
    students = {
        "clip": build_student(tiny_clip_config(), CLASSES, seed=0),
        "ssm": build_student(tiny_ssm_config(), CLASSES, seed=1),
    }
    method_class = get_method(name)
    return method_class(students, method_class.Config(**options)).train()


def make_batch(device: str) -> Batch:
    def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.zeros(SIZE, *shape, dtype=dtype, device=device)

    images = {view: zeros(3, SIDE, SIDE) for view in ("x", "w", "s1", "s2")}
    boxes = {f"boxes{i}": zeros(4, dtype=torch.int32) for i in (1, 2)}
    maps = {name: zeros(SIDE, SIDE) for name in ("y", "ignore", "truth")}
    return Batch(**images, **boxes, **maps)


class TrainerOfOneMethod(Trainer):
    """What `Trainer._make_step` needs, without data, folders and checkpoints."""

    steps_per_epoch = 5

    def __init__(self, method: nn.Module, fused: bool, accumulate: int = 1) -> None:
        self.step, self.total_steps = 5, 10
        train = SimpleNamespace(debug_steps=0, power=0.9, warmup_steps=0, accumulate=accumulate)
        self.config = SimpleNamespace(train=train, seed=0)
        self.ranks = SimpleNamespace(rank=0, world=1)
        self.step_module, self.method = method, getattr(method, "method", method)
        parameters = [p for p in method.parameters() if p.requires_grad]
        groups = [{"params": parameters, "lr": 1e-3, "initial_lr": 1e-3}]
        self.optimizer = torch.optim.AdamW(groups, fused=fused)
        self.guard, self.meter, self.skips = FiniteGuard(eager=False), Meter(), None
        self.autocast = contextlib.nullcontext()
        self.averages = Averages(getattr(method, "students", {}), decay=0.9)
        if self.averages.students:
            method.take_averages(self.averages.students)


CASES = [*((name, {}) for name in METHODS), ("co2s", {"teacher": "average"})]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_whole_step_without_values(name, options, accumulate):
    method = make_method(name, **options).to("meta")
    method.take_parts(accumulate)
    # fused AdamW has no kernel for meta
    trainer = TrainerOfOneMethod(method, fused=False, accumulate=accumulate)
    for _ in range(2):
        trainer._make_step(make_batch("meta"))
    assert trainer.step == 7 and trainer.meter.steps == 2
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_a_released_step_without_values():
    method = make_method("co2s", cutmix_partner="same-image", mean_shards=2,
                         stability_gradient="none").to("meta")  # fmt: skip
    batch = make_batch("meta")
    for name in ("w", "s1", "s2", "ignore", "truth", "boxes1", "boxes2"):
        setattr(batch, name, torch.cat([getattr(batch, name)] * 2))
    TrainerOfOneMethod(method, fused=False)._make_step(batch)


@pytest.mark.parametrize("fetch", ["item", "bool", "cpu", "mask", "nonzero"])
def test_the_inspection_sees_what_waits(fetch):
    """The control: each way of fetching a value fails the test above."""

    class Fetching(nn.Module):
        def __init__(self, method: nn.Module) -> None:
            super().__init__()
            self.method = method

        def forward(self, *args):
            out = self.method(*args)
            loss = out["loss"].detach()
            {
                "item": loss.item, "bool": lambda: bool(loss > 0), "cpu": loss.cpu,
                "mask": lambda: loss[loss > 0], "nonzero": loss.nonzero,
            }[fetch]()  # fmt: skip
            return out

    trainer = TrainerOfOneMethod(Fetching(make_method("onlysup").to("meta")), fused=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer._make_step(make_batch("meta"))


def pretend_cuda(module: nn.Module) -> None:
    """Replace parameters and buffers by tensors without values that say they are on a GPU."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                store[name] = nn.Parameter(new, old.requires_grad) if (
                    isinstance(old, nn.Parameter)) else new  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_forward_on_a_pretended_gpu(name):
    method = make_method(name)
    with FakeTensorMode():
        pretend_cuda(method)
        out = method(make_batch("cuda"), 5, 10)
        assert all(value.device.type == "cuda" for value in out.values())
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            out["loss"].item()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), CASES)
def test_cuda_counts_no_synchronisation(name, options):
    trainer = TrainerOfOneMethod(make_method(name, **options).cuda(), fused=True)
    batches = [make_batch("cuda") for _ in range(3)]
    trainer._make_step(batches[0])  # kernels are loaded and chosen, caches filled
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches[1:]:
                trainer._make_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the notice, once a process, that this mode is a prototype.
    waits = [text for text in (str(each.message) for each in caught)
             if "synchroniz" in text.lower() and "prototype" not in text]  # fmt: skip
    assert len(waits) == 0, waits
