"""The DALI input pipeline: the batches of `plan`, decoded and augmented by one DALI graph.

Every choice is drawn on the host and travels into the graph as data: DALI keeps no reader and no
random state. So an epoch's end, resuming and sharding are the plan's, as in the torch pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.files import Item
from co2s_fast.data.plan import Plan
from co2s_fast.errors import DataError


class DaliLoader:
    """Iterates over the batches of some steps.

    Args:
        plan: what is in them.
        steps: which.
        threads: threads of DALI, and as many that read files and labels; 0 counts as 1.
        gpu: number of the GPU that decodes and augments; None: all on the CPU.
    """

    def __init__(self, plan: Plan, steps: range, threads: int, gpu: int | None) -> None:
        self.plan, self.steps, self.threads, self.gpu = plan, steps, max(threads, 1), gpu

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        names = graph_outputs(self.plan)
        with ThreadPoolExecutor(self.threads, "co2s-read") as pool:
            feed = _Feed(self.plan, self.steps, pool)
            pipeline = build_pipeline(self.plan, feed, threads=self.threads, gpu=self.gpu)
            try:
                pipeline.build()
                for _ in self.steps:
                    try:
                        tensors = self._run(pipeline)
                    except StopIteration:
                        break
                    except RuntimeError as error:
                        raise feed.blame(error) from error
                    files = feed.taken()
                    yield Batch(**dict(zip(names, tensors, strict=True)), **files)
                if feed.failure is not None:
                    raise feed.failure
            finally:
                feed.cancel()

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

    def __init__(self, plan: Plan, steps: range, pool: ThreadPoolExecutor) -> None:
        self.plan, self.pool = plan, pool
        self.names = graph_inputs(plan)
        self.failure: DataError | None = None
        self._left = iter(steps)
        self._reading: deque[tuple[_Items, list[Future[Arrays]]]] = deque()
        self._in_dali: deque[tuple[_Items, dict[str, list]]] = deque()
        for _ in range(self.AHEAD):
            self._begin()

    def _begin(self) -> None:
        """Have the pool read one more step, if one is left."""
        step = next(self._left, None)
        if step is None:
            return
        items = _Items(self.plan, step)
        futures = [self.pool.submit(step_arrays, self.plan, stream, step, position, item)
                   for stream, position, item in items.places]
        self._reading.append((items, futures))

    def __call__(self) -> tuple[list, ...]:
        if not self._reading:
            raise StopIteration
        items, futures = self._reading.popleft()
        try:
            samples = [future.result() for future in futures]
        except DataError as error:  # told when the batches before it have been taken
            self.failure = error
            self.cancel()
            raise StopIteration from None
        self._begin()
        arrays = {name: [sample[name] for sample in samples if name in sample]
                  for name in self.names}
        self._in_dali.append((items, arrays))
        return tuple(arrays[name] for name in self.names)

    def taken(self) -> dict[str, list[str]]:
        """The names of the files of the oldest step in DALI, which is done."""
        return self._in_dali.popleft()[0].names()

    def blame(self, error: RuntimeError) -> Exception:
        """What to raise for an error of DALI: the file that it refuses, if one is to blame."""
        for items, _ in self._in_dali:
            for _, _, item in items.places:
                if not can_decode(item.image):
                    return DataError(f"{item.image}: damaged, or not an image that DALI decodes "
                                     "(then --loader torch may)")
        return error

    def cancel(self) -> None:
        """Read nothing more."""
        self._left = iter(())
        for _, futures in self._reading:
            for future in futures:
                future.cancel()
        self._reading.clear()


class _Items:
    """The images of a step, labelled ones first, as (stream, position, item)."""

    def __init__(self, plan: Plan, step: int) -> None:
        self.places = [
            *((LABELED, *place) for place in plan.labeled(step)),
            *((UNLABELED, *place) for place in plan.unlabeled(step)),
        ]

    def names(self) -> dict[str, list[str]]:
        by_stream: dict[int, list[Item]] = {LABELED: [], UNLABELED: []}
        for stream, _, item in self.places:
            by_stream[stream].append(item)
        return {"labeled_files": [item.name for item in by_stream[LABELED]],
                "unlabeled_files": [item.name for item in by_stream[UNLABELED]]}
