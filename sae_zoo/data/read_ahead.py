"""Batches that a thread reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

_END = object()


class SizedBatches(Protocol):
    """Batches that know how many they are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class ReadAhead:
    """Batches that a thread reads while the step before is running.

    Args:
        batches: that are read.
        pin: put them into page-locked memory, from which a CUDA device fetches them by itself.
        depth: batches that wait at most.
    """

    def __init__(self, batches: SizedBatches, *, pin: bool, depth: int = 2):
        self.batches, self._pin, self._depth = batches, pin, depth

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        waiting: queue.Queue = queue.Queue(self._depth)
        stopped = threading.Event()

        def put(item: object) -> None:
            while not stopped.is_set():
                try:
                    return waiting.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for batch in self.batches:
                    put(batch.pin_memory() if self._pin else batch)
                    if stopped.is_set():
                        return
                put(_END)
            except BaseException as error:  # it belongs to whoever asks for the next batch
                put(error)

        threading.Thread(target=read, name="read ahead", daemon=True).start()
        try:
            while (item := waiting.get()) is not _END:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
