"""The thread that takes batches in advance: order, errors, and that it always ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from co2s_fast.data.ahead import DEPTH, Ahead
from co2s_fast.data.batch import Batch
from co2s_fast.errors import DataError

CPU = torch.device("cpu")


class Source:
    """Numbered batches; remembers how many were made and whether it was closed."""

    def __init__(self, count, fail_at=None):
        self.count, self.fail_at, self.made, self.closed = count, fail_at, 0, False

    def __len__(self):
        return self.count

    def __iter__(self):
        try:
            for number in range(self.count):
                if number == self.fail_at:
                    raise DataError("file 3 is damaged")
                self.made += 1
                yield Batch(x=torch.tensor(number), y=torch.tensor(number))
        finally:
            self.closed = True


def threads():
    return [t for t in threading.enumerate() if t.name == "co2s-ahead"]


def test_all_batches_in_order_and_again():
    loader = Ahead(Source(20), CPU)
    assert len(loader) == 20
    for _ in range(2):
        assert [int(batch.x) for batch in loader] == list(range(20))
    assert not threads()


def test_no_more_than_its_depth_is_made_in_advance():
    source = Source(20)
    batches = iter(Ahead(source, CPU))
    next(batches)
    time.sleep(0.3)
    assert source.made == 1 + DEPTH  # one taken, the others ready
    batches.close()
    assert source.closed and not threads()


def test_the_next_is_begun_once_a_batch_is_on_the_device(monkeypatch):
    source, made = Source(20), []
    batches = iter(Ahead(source, torch.device("meta")))
    next(batches)
    time.sleep(0.3)
    to = Batch.to

    def slow(self, device, non_blocking=False):
        time.sleep(0.3)
        made.append(source.made)
        return to(self, device, non_blocking)

    monkeypatch.setattr(Batch, "to", slow)
    assert next(batches).x.device.type == "meta"
    assert made == [1 + DEPTH]
    batches.close()


def test_a_batch_that_was_taken_is_not_kept():
    source = Source(20)
    batches = iter(Ahead(source, CPU))
    taken = next(batches)
    kept = weakref.ref(taken)
    deadline = time.monotonic() + 30
    while source.made < 1 + DEPTH:  # until then the thread may still hold it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    del taken
    assert kept() is None
    batches.close()


def test_an_error_comes_after_the_batches_before_it():
    taken = []
    with pytest.raises(DataError, match="file 3"):
        for batch in Ahead(Source(10, fail_at=3), CPU):
            taken.append(int(batch.x))
    assert taken == [0, 1, 2] and not threads()


def test_a_program_may_end_in_the_middle():
    """An iterator that is never closed keeps no program from ending, and silently."""
    code = (
        "import sys; sys.path.insert(0, 'tests/data')\n"
        "from test_ahead import CPU, Ahead, Source\n"
        "kept = iter(Ahead(Source(1000), CPU))\n"
        "print(int(next(kept).x))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
