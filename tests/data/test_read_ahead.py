import threading
import time

import pytest
import torch

from sae_zoo.data.read_ahead import ReadAhead


class Source:
    def __init__(self, n, fails_at=None):
        self.n, self.fails_at, self.given = n, fails_at, 0

    def __len__(self):
        return self.n

    def __iter__(self):
        for i in range(self.n):
            if i == self.fails_at:
                raise OSError("the disk is gone")
            self.given += 1
            yield torch.full((2,), i)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def wait_until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_order_and_length():
    ahead = ReadAhead(Source(7), pin=False)
    assert len(ahead) == 7 and [int(batch[0]) for batch in ahead] == list(range(7))
    assert [int(batch[0]) for batch in ahead] == list(range(7))  # and again


def test_reads_ahead_but_not_far():
    source = Source(50)
    batches = iter(ReadAhead(source, pin=False, depth=2))
    next(batches)
    wait_until(lambda: source.given == 4)  # one given, two waiting, one in hand
    time.sleep(0.2)
    assert source.given == 4
    batches.close()
    wait_until(lambda: not readers())


def test_errors_reach_the_reader_after_the_batches_before_them():
    batches = iter(ReadAhead(Source(9, fails_at=3), pin=False))
    assert [int(next(batches)[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
