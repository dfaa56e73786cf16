"""The DALI input pipeline: the batches of `plan`, decoded and augmented by one DALI graph.

Every choice is drawn on the host and travels into the graph as data: DALI keeps no reader and no
random state. So an epoch's end, resuming and sharding are the plan's, as in the torch pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from co2s_fast.data.batch import Batch
from co2s_fast.data.dali.graph import (
    QUEUE,
    build_pipeline,
    can_decode,
    graph_inputs,
    graph_outputs,
)
from co2s_fast.data.dali.source import Arrays, step_arrays
from co2s_fast.data.damage import Reading, read_place
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.plan import Plan
from co2s_fast.errors import DataError


class DaliLoader:
    """Iterates over the batches of some steps.

    Args:
        plan: what is in them.
        steps: which, one after the other.
        threads: threads of DALI, and as many that read files and labels; 0 counts as 1.
        gpu: number of the GPU that decodes and augments; None: all on the CPU.
    """

    def __init__(self, plan: Plan, steps: range, threads: int, gpu: int | None) -> None:
        self.plan, self.steps, self.threads, self.gpu = plan, steps, max(threads, 1), gpu

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """One batch after the other.

        A file that fails inside DALI takes the graph with it. The graph is then built again, and
        the file is left to Pillow, which reads it or says that it is damaged: what happens to such
        a file, and which batches come, does not depend on the pipeline.
        """
        left_to_pillow: set[Path] = set()
        taken = 0
        with ThreadPoolExecutor(self.threads, "co2s-read") as pool:
            while taken < len(self.steps):
                feed = _Feed(self.plan, self.steps[taken:], pool, frozenset(left_to_pillow))
                try:
                    for batch in self._batches(feed):
                        yield batch
                        taken += 1
                except RuntimeError:
                    refused = {path for path in feed.images_in_dali() if not can_decode(path)}
                    if refused <= left_to_pillow:
                        raise
                    left_to_pillow |= refused
                finally:
                    feed.cancel()

    def _batches(self, feed: _Feed) -> Iterator[Batch]:
        pipeline = build_pipeline(self.plan, feed, threads=self.threads, gpu=self.gpu)
        pipeline.build()
        names = graph_outputs(self.plan)
        while True:
            try:
                tensors = self._run(pipeline)
            except StopIteration:
                break
            yield Batch(**dict(zip(names, tensors, strict=True)), **feed.about_the_oldest())
        if feed.failure is not None:
            raise feed.failure

    def _run(self, pipeline: Pipeline) -> list[Tensor]:
        stream = None if self.gpu is None else torch.cuda.current_stream(self.gpu)
        pipeline.schedule_run()
        outputs = pipeline.outputs(cuda_stream=stream)
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]


class _Feed:
    """What DALI calls for the arrays of the next step; threads of `pool` are some steps ahead.

    Steps are kept until their batch is taken: DALI reads the arrays in place, and the files' names
    are wanted then.
    """

    AHEAD = QUEUE + 1

    def __init__(self, plan: Plan, steps: range, pool: ThreadPoolExecutor,
                 left_to_pillow: frozenset[Path]) -> None:
        self.plan, self.pool, self.left_to_pillow = plan, pool, left_to_pillow
        self.names = graph_inputs(plan)
        self.failure: DataError | None = None
        self._left = iter(steps)
        self._reading: deque[list[Future[Reading[Arrays]]]] = deque()
        self._in_dali: deque[list[Reading[Arrays]]] = deque()
        for _ in range(self.AHEAD):
            self._begin()

    def _begin(self) -> None:
        """Have the pool read one more step, if one is left."""
        step = next(self._left, None)
        if step is None:
            return
        places = [*((LABELED, position) for position, _ in self.plan.labeled(step)),
                  *((UNLABELED, position) for position, _ in self.plan.unlabeled(step))]
        self._reading.append([self.pool.submit(self._read, stream, step, position)
                              for stream, position in places])

    def _read(self, stream: int, step: int, position: int) -> Reading[Arrays]:
        read = partial(step_arrays, self.plan, stream, step, position, self.left_to_pillow)
        return read_place(self.plan, stream, step, position, read)

    def __call__(self) -> tuple[list, ...]:
        if not self._reading:
            raise StopIteration
        futures = self._reading.popleft()
        try:
            readings = [future.result() for future in futures]
        except DataError as error:  # told when the batches before it have been taken
            self.failure = error
            self.cancel()
            raise StopIteration from None
        self._begin()
        self._in_dali.append(readings)
        samples = [reading.content for reading in readings]
        return tuple([sample[name] for sample in samples if name in sample] for name in self.names)

    def about_the_oldest(self) -> dict[str, list[Any]]:
        """Names and damage of the oldest step in DALI, which is done: fields of `Batch`."""
        readings = self._in_dali.popleft()
        labeled = len(self.plan.positions)
        return {"labeled_files": [reading.item.name for reading in readings[:labeled]],
                "unlabeled_files": [reading.item.name for reading in readings[labeled:]],
                "damaged": [damaged for reading in readings for damaged in reading.damaged]}

    def images_in_dali(self) -> set[Path]:
        """Image files of the steps that DALI has not finished."""
        return {reading.item.image for readings in self._in_dali for reading in readings}

    def cancel(self) -> None:
        """Read nothing more."""
        self._left = iter(())
        for futures in self._reading:
            for future in futures:
                future.cancel()
        self._reading.clear()
