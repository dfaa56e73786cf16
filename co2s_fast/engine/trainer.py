"""The training loop, for any method: set up, then one step after another, then one last look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from co2s_fast import ops
from co2s_fast.data import Batch, open_dataset, open_split, steps_per_epoch
from co2s_fast.data.damage import Damaged
from co2s_fast.data.imbalance import class_weights, labeled_pixels
from co2s_fast.data.loader import build_loader, check_batches, choose_loader
from co2s_fast.data.splits import find_root
from co2s_fast.data.validation import val_dataset
from co2s_fast.data.writing import write_text
from co2s_fast.engine import checkpoint, distributed, memory, start
from co2s_fast.engine.averages import Averages
from co2s_fast.engine.bands import fit_students
from co2s_fast.engine.collapse import CollapseWatch
from co2s_fast.engine.config import CONFIG_FILE, RunConfig, dump_config, read_run_config
from co2s_fast.engine.damage import DamageTally
from co2s_fast.engine.evaluation import THRESHOLD, evaluate, pseudo_label_quality
from co2s_fast.engine.folder import check_run_folder, holds_run, locked
from co2s_fast.engine.footprint import set_checkpointing, with_settings_of
from co2s_fast.engine.interrupt import Interrupted, StopSignal, deaf_children
from co2s_fast.engine.log import RunLog, say
from co2s_fast.engine.meter import FiniteGuard, Meter, NonFiniteLossError
from co2s_fast.engine.opening import (
    can_resume,
    check_lists,
    chosen_backend,
    list_digests,
    open_device,
    state_to_resume,
)
from co2s_fast.engine.optimizer import build_optimizer
from co2s_fast.engine.runs import (
    SPEC_FILE,
    all_finite,
    checkpoint_folder,
    dump_spec,
    run_state,
    student_arrays,
)
from co2s_fast.engine.schedule import poly_factor, set_learning_rates
from co2s_fast.engine.skips import Skips
from co2s_fast.engine.window import train_record
from co2s_fast.errors import DataError, UsageError
from co2s_fast.methods import get_method
from co2s_fast.models.compiled import compile_student
from co2s_fast.models.lora import beside_adapters


def train(
    config: RunConfig, *, resume: bool = False, dry_run: bool = False, progress: bool = True
) -> Path:
    """Train a run to its end.

    Args:
        config: the whole configuration.
        resume: continue the run in `config.folder` from its last checkpoint; a folder without one
            is started from the beginning.
        dry_run: check configuration and data, build everything, train nothing; no run folder. A
            split that is not there yet is made, and so is the demo dataset.
        progress: draw progress bars.

    Returns:
        The run folder.

    Raises:
        UsageError, DataError: before any training where that can be known. A GPU that runs out of
            memory is a UsageError, which says what takes less.
        NonFiniteLossError: a loss is NaN or infinite.
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    with ExitStack() as stack:
        stack.callback(distributed.finish)
        trainer = Trainer(config, progress=progress)
        stack.callback(trainer.close)
        trainer.set_up(resume=resume, dry_run=dry_run)
        if not dry_run:
            trainer.stop = stack.enter_context(StopSignal())
            with memory.explained(trainer):
                trainer.run()
    return config.folder


class Trainer:
    """State of one run. `set_up` calls the `_setup_*` methods in the order they depend on."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        self.config = config
        self.folder = config.folder
        self.step = 0  # updates made so far
        self.best: dict[str, Any] = {"score": None, "step": None}
        self.meter = Meter()
        self.damage = DamageTally(config.data.max_damaged)
        self.stop = StopSignal()
        self.log: RunLog | None = None
        self.locks_folder = False
        self.resources = ExitStack()
        self.progress = progress

    def set_up(self, *, resume: bool, dry_run: bool = False) -> None:
        """Build everything; errors in configuration and data surface here."""
        check_run_folder(self.folder)
        self._setup_device()
        if not dry_run and self.folder.is_dir():
            self._lock_folder()
        self._setup_data(resume)
        if self.config.train.gpu_memory is not None and resume and can_resume(self.folder):
            self.config = with_settings_of(read_run_config(self.folder), self.config)
        state = state_to_resume(self.config, self.spec, resume=resume, dry_run=dry_run)
        self._setup_students(begins=state is None or state["step"] == 0, look=dry_run)
        self._setup_optimizer()
        if state is not None:
            with checkpoint.unpacking(checkpoint_folder(self.folder, "last")):
                self._restore(state)
        if not dry_run:
            self._setup_folder()
        self.method.weigh_classes(self.class_weight)
        if self.ranks.is_main:
            record = self._announce()
            if dry_run:
                say("dry run: configuration and data are in order; nothing was trained")
            else:
                self._setup_log(record, state)

    def _setup_device(self) -> None:
        self.ranks, self.device, self.autocast = open_device(self.config.train)
        self.resources.enter_context(chosen_backend(self.config.train.backend, self.device))
        skips = self.config.train.nonfinite == "skip"
        alone = self.device.type == "cpu" and self.ranks.world == 1
        self.guard = FiniteGuard(eager=alone and not skips)
        self.skips = Skips(self.guard) if skips else None
        torch.manual_seed(self.config.seed)

    def _setup_data(self, resume: bool) -> None:
        data = self.config.data
        use = "resume" if resume and can_resume(self.folder) else "train"
        self.spec = open_dataset(data, self.folder / SPEC_FILE if resume else None)
        self.loader = choose_loader(data, self.device, self.spec)
        self.config = fit_students(self.config, self.spec)
        if self.ranks.is_main:  # the first process may generate data or write a split
            self.split = open_split(data, self.spec, use)
        distributed.wait_for_all()
        if not self.ranks.is_main:
            self.split = open_split(data, self.spec, use)
        train = self.config.train
        self.steps_per_epoch = steps_per_epoch(data, self.split)
        self.total_steps = train.steps or max(round(train.epochs * self.steps_per_epoch), 1)
        self.eval_every = train.eval_every or self.steps_per_epoch
        self.lists = list_digests(self.split, find_root(data, self.spec))
        self.val = val_dataset(self.split.val, self.spec, data)
        known = [item for item in self.split.unlabeled if item.label is not None]
        self.probe_damage: list[Damaged] = []
        self.probe = (val_dataset(known, self.spec, data, self.probe_damage)
                      if train.probe_images else [])
        self._count_classes()

    def _count_classes(self) -> None:
        """What follows from the labelled pixels of each class."""
        train, names = self.config.train, self.spec.class_names
        pixels = labeled_pixels(self.split, self.spec)
        self.class_weight = class_weights(train.class_weight, pixels, names,
                                          train.class_weight_beta)
        self.collapse = CollapseWatch(names, pixels.sum(0).tolist())

    def _setup_students(self, *, begins: bool, look: bool) -> None:
        config = self.config
        method_class = get_method(config.method.name)
        students, self.random_backbones = start.build_students(
            config.students, self.spec.classes, config.seed
        )
        self.method = method_class(students, config.method, seed=config.seed)
        self.students = dict(self.method.students.items())
        self.config, self.memory = memory.plan(
            self.method, config, config.data.crop or self.spec.crop, self.device,
            self.ranks.world, may_change=begins, look=look,
        )  # fmt: skip
        config, train = self.config, self.config.train
        set_checkpointing(self.students, config)
        self.method.to(self.device)
        self.method.take_parts(train.accumulate)
        self.warnings = self.method.check_batch(config.data.batch_size, self.ranks.world)
        check_batches(config.data, self.split, self.method.views, self.ranks.world, self.loader)
        if train.channels_last:
            self.method.to(memory_format=torch.channels_last)
        self.averages = Averages(self.students, train.ema) if train.ema else None
        self.evaluated = self.averages.students if self.averages else self.students
        self.method.take_averages(self.evaluated)
        if train.compile:
            for student in {*self.students.values(), *self.evaluated.values()}:
                compile_student(student)
        self.step_module = self.method
        if self.ranks.world > 1:
            self.step_module = DistributedDataParallel(
                self.method,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def _setup_optimizer(self) -> None:
        self.optimizer = build_optimizer(self.students, self.config.train,
                                         self.method.own_parameters())

    def _lock_folder(self) -> None:
        if self.ranks.is_main:
            self.resources.enter_context(locked(self.folder))
            self.locks_folder = True

    def _setup_folder(self) -> None:
        distributed.wait_for_all()  # every rank has looked for a former run by now
        if not self.ranks.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.locks_folder:
                self._lock_folder()
                if holds_run(self.folder):  # begun since this process looked for one
                    raise UsageError(f"another process has begun a run in {self.folder}")
            write_text(self.folder / CONFIG_FILE, dump_config(self.config))
            write_text(self.folder / SPEC_FILE, dump_spec(self.spec))
        except OSError as error:
            raise UsageError(f"run folder {self.folder}: {error.strerror or error}") from None

    def _announce(self) -> dict[str, Any]:
        """Tell what will be trained on what; the record of it."""
        record = start.describe(self)
        for warning in record["warnings"]:
            say(f"warning: {warning}")
        say(start.headline(self, record))
        return record

    def _setup_log(self, record: dict[str, Any], state: dict[str, Any] | None) -> None:
        resumed = None if state is None else self.step
        self.log = RunLog(self.folder, resumed, tensorboard=self.config.train.tensorboard)
        if state is None:
            self.log.write({"kind": "start", **record})
        else:
            self.log.write({"kind": "resume", "step": self.step, "device": record["device"]})

    def _restore(self, state: dict[str, Any]) -> None:
        folder = checkpoint_folder(self.folder, "last")
        for name, student in self.students.items():
            weights = checkpoint.read_arrays(folder, state, name)
            if state["step"] == 0:  # imported, maybe to learn by adapters from here on
                weights = beside_adapters(weights, student.state_dict())
            checkpoint.load_weights(student, weights, f"checkpoint {folder}")
            student.provenance = state["provenance"][name]
        if self.averages is not None:
            self.averages.restore(folder, state)
        if state["step"] == 0:  # imported: everything else starts here, by this configuration
            self.random_backbones = []
            return
        check_lists(state, self.lists, self.split.folder, folder)
        if state["step"] > self.total_steps:
            raise DataError(f"checkpoint {folder} is damaged: step {state['step']:,} of a run of "
                            f"{self.total_steps:,}")
        if own := self.method.own_state():
            saved = checkpoint.read_arrays(folder, state, "method")
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        tensors = checkpoint.read_arrays(folder, state, "optimizer")
        checkpoint.unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        checkpoint.unpack_rng(checkpoint.read_arrays(folder, state, "rng"), state["rng"])
        self.step = state["step"]
        self.best = self._best_of(state["best"])
        self.damage.restore(state.get("damaged", {}))
        if self.skips is not None:
            self.skips.restore(state.get("skips", {}))
        # As counted when the run began: a label that has broken since must change nothing.
        self.split.pixels = checkpoint.read_arrays(folder, state, "split")["pixels"].numpy()
        self._count_classes()
        self.collapse.restore(state["collapse"])
        # The saved sums are over all ranks: one of them takes them up again.
        sums = state["window"]["sums"] if self.ranks.is_main else {}
        self.meter.restore(state["window"]["steps"], sums)

    def _best_of(self, best: dict[str, Any]) -> dict[str, Any]:
        """Score and step of the best checkpoint, as `last` knows them; none where it is lost."""
        none = {"score": None, "step": None}
        if best["score"] is None:
            return none
        folder = checkpoint_folder(self.folder, "best")
        # Rank 0 decides, so that all write or none: whoever writes waits for the others.
        there = distributed.gather_objects((folder / checkpoint.STATE_FILE).is_file())[0]
        if not there and self.ranks.is_main:
            more = ("the next evaluation writes one" if self.step < self.total_steps else
                    "give --checkpoint last to eval, predict and export")
            say(f"warning: {folder} has lost the checkpoint of step {best['step']}; {more}")
        return {"score": float(best["score"]), "step": best["step"]} if there else none

    def run(self) -> None:
        """Make every step that is left."""
        self.method.train()
        batches = self._batches()
        bar = tqdm(
            total=self.total_steps, initial=self.step, desc="train", unit="step", smoothing=0.05,
            disable=not (self.progress and self.ranks.is_main), dynamic_ncols=True,
        )  # fmt: skip
        self.window_start, self.waited_s = time.perf_counter(), 0.0
        with bar, ops.debug_checks(self.config.train.debug_steps > 0):
            while self.step < self.total_steps:
                waiting = time.perf_counter()
                batch = next(batches)
                self.waited_s += time.perf_counter() - waiting
                self._make_step(batch)
                self.damage.meet(self.step, batch.damaged)
                del batch  # to free one takes time, and is no waiting for the next
                bar.update()
                self._after_step(bar)
                if distributed.any_rank(self.stop.received is not None):
                    self._save_and_stop()

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches on the device."""
        loader = build_loader(
            self.config.data, self.spec, self.split, views=self.method.views,
            seed=self.config.seed, start_step=self.step, total_steps=self.total_steps,
            rank=self.ranks.rank, world=self.ranks.world, device=self.device,
        )  # fmt: skip
        batches = map(methodcaller("to", self.device, non_blocking=True), loader)
        with deaf_children():  # the workers start with the first batch
            first = [next(batches)]
        yield first.pop()  # nothing here keeps a batch that is being used
        yield from batches

    def _make_step(self, batch: Batch) -> None:
        if self.step == self.config.train.debug_steps:
            ops.debug_checks(False)
        # Whatever still draws from torch's own generator is then a function of the step, too.
        torch.manual_seed(start.step_seed(self.config.seed, self.step, self.ranks.rank))
        set_learning_rates(self.optimizer, self.lr_factor(self.step))
        with torch.no_grad():
            self.method.before_step(self.step, self.steps_per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self._add_gradients(batch)
        reason = self.skips and self.skips.look(self.step, self.method.parameters())
        if reason is None:
            self.meter.add(outputs)
            self.optimizer.step()
        elif self.log is not None:
            self.log.tell({"kind": "warning", "step": self.step + 1, "text": f"skipped: {reason}"},
                          f"warning: step skipped, no weight changed: {reason}")
        self.step += 1
        if self.averages is not None:
            self.averages.update(self.step)

    def _add_gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Backpropagate the batch, part after part; its losses and counts."""
        files = [*batch.labeled_files, *batch.unlabeled_files]
        parts, outputs = batch.parts(self.config.train.accumulate), {}
        for part in parts:
            # Gradients are averaged over the processes once, with the last part.
            waits = self.ranks.world > 1 and part is not parts[-1]
            with self.step_module.no_sync() if waits else nullcontext():
                with self.autocast:
                    share = self.step_module(part, self.step, self.total_steps)
                self.guard.watch(self.step, share, files)
                # It is scaled for the ranks; the students' totals are not.
                share.pop("loss").backward()
            outputs = {k: outputs[k] + v for k, v in share.items()} if outputs else share
        return outputs

    def lr_factor(self, step: int) -> float:
        """Factor on every learning rate at a step."""
        train = self.config.train
        return poly_factor(step, self.total_steps, train.power, train.warmup_steps)

    def _after_step(self, bar: tqdm) -> None:
        """Log, evaluate and save where it is time for them."""
        train, last = self.config.train, self.step == self.total_steps
        logs = self.step % train.log_every == 0 or last
        evaluates = self.step % self.eval_every == 0 or last
        saves = evaluates or (train.save_every is not None and self.step % train.save_every == 0)
        if logs or saves or (self.ranks.world == 1 and self.damage.pending):
            self.damage.settle(self.log)
        if logs:
            self._log_step(bar)
        if evaluates:
            self._evaluate(bar)
        if saves:
            self._save_last()

    def _log_step(self, bar: tqdm) -> None:
        if self.meter.steps == 0:
            return
        self.guard.check()
        record, warnings = train_record(self)
        self.meter.reset()
        if self.log is not None:
            self.log.write(record)
            for text in warnings:
                self.log.tell({"kind": "warning", "step": self.step, "text": text},
                              f"warning: {text}")
        total = sum(v for k, v in record.items() if k.startswith("loss/") and k.endswith("/total"))
        shown = {"loss": f"{total:.3f}", "img_s": f"{record['images_per_s']:.1f}"}
        if "gpu_memory_gib" in record:
            shown["GiB"] = f"{record['gpu_memory_gib']:.1f}"
        self._show(bar, **shown)
        self.window_start, self.waited_s = time.perf_counter(), 0.0

    def _evaluate(self, bar: tqdm) -> None:
        began = time.perf_counter()
        config = self.config.eval.model_copy(update={"student": "all"})
        place = {"rank": self.ranks.rank, "world": self.ranks.world}
        scores = evaluate(
            self.evaluated, self.val, self.spec, config, self.device, progress=False, **place
        )
        pseudo = {}
        if len(self.probe):
            threshold = getattr(self.config.method, "threshold", THRESHOLD)
            pseudo = pseudo_label_quality(
                self.evaluated, self.probe, self.spec, config, self.device, threshold=threshold,
                limit=self.config.train.probe_images, progress=False, **place,
            )  # fmt: skip
            self.damage.meet(self.step, self.probe_damage)
            self.probe_damage.clear()
            self.damage.settle(self.log)
        self.method.train()
        self.window_start += time.perf_counter() - began  # images/s is of training alone
        mious = {name: metrics.miou for name, metrics in scores.items()}
        self._show(bar, mIoU="/".join(f"{100 * (v or 0):.1f}" for v in mious.values()))
        score = sum(value or 0.0 for value in mious.values()) / len(mious)
        if self.log is not None:
            students = {n: m.to_dict(confusion=False) for n, m in scores.items()}
            self.log.write({"kind": "eval", "step": self.step, "epoch": self.epoch,
                            "score": score, "students": students, "pseudo": pseudo,
                            "seconds": time.perf_counter() - began})  # fmt: skip
        if self.best["score"] is None or score > self.best["score"]:
            self.best = {"score": score, "step": self.step}
            state = {"score": score, "students": mious}
            self._write("best", student_arrays(self.evaluated), state)

    def _save_last(self) -> None:
        tensors, structure = checkpoint.pack_optimizer(self.optimizer)
        random_tensors, random_rest = checkpoint.pack_rng()
        arrays = {**student_arrays(self.students), "optimizer": tensors, "rng": random_tensors,
                  "split": {"pixels": torch.from_numpy(self.split.pixels)}}
        if own := self.method.own_state():
            arrays["method"] = own
        if self.averages is not None:
            arrays |= self.averages.arrays()
        window = {"steps": self.meter.steps, "sums": self.meter.fetch()}
        self._write("last", arrays, {"optimizer": structure, "rng": random_rest,
                                     "best": self.best, "window": window,
                                     "damaged": self.damage.known,
                                     "lists": self.lists,
                                     "skips": self.skips.state() if self.skips else {},
                                     "collapse": self.collapse.state()})  # fmt: skip

    def _write(self, which: str, arrays: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
        """Write a checkpoint, once it is known that nothing in it is NaN."""
        self.guard.check()
        if not all_finite(self.method):
            raise NonFiniteLossError(
                f"a weight is not finite after step {self.step}, though every loss was; the run "
                "stopped, its checkpoints are from before"
            )
        problem = None
        if self.ranks.is_main:
            progress = {"step": self.step, "epoch": self.epoch, "total_steps": self.total_steps}
            common = run_state(self.config, self.spec, self.students) | progress
            try:
                folder = checkpoint_folder(self.folder, which)
                checkpoint.save_checkpoint(folder, f"step-{self.step:06d}", arrays, common | state)
            except DataError as error:
                problem = str(error)
        problem = distributed.gather_objects(problem)[0]
        if problem is not None:
            raise DataError(problem)

    def _save_and_stop(self) -> None:
        """Save what there is and leave."""
        self.damage.settle(self.log)
        self._save_last()
        number = self.stop.received or 15  # another rank's signal is the launcher's SIGTERM
        if self.ranks.is_main:
            say(f"stopped by signal {number} after step {self.step}; --resume continues from there")
        raise Interrupted(128 + number)

    @property
    def epoch(self) -> float:
        """Passes over the unlabelled images so far."""
        return self.step / self.steps_per_epoch

    def _show(self, bar: tqdm, **values: str) -> None:
        """Add to what the progress bar shows beside the count."""
        self.shown = {**getattr(self, "shown", {}), **values}
        bar.set_postfix(self.shown, refresh=False)

    def close(self) -> None:
        """Close the log, and let go of the process group and the chosen backend."""
        self.step_module = None
        self.resources.close()
        if self.log is not None:
            self.log.close()
