"""One stream of batches for many SAEs: jobs that take turns in one process, each as if it had the process to itself.

A job runs its ordinary training in a greenlet, until that asks for a batch. The stream stands at the least step that is
asked for; its batch is read once and given to every job that waits for it, one after the other. So jobs that go on from
different checkpoints meet: those behind train first, and the others join at their steps.

Only one job runs at a time, all in one thread: what it computes is what it computes alone. (Nothing in training draws
from torch's own random numbers; a greenlet switches only between two steps, where no library is in the middle of
anything.)
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from typing import Any, TypeVar

from greenlet import greenlet
from torch import Tensor

from sae_zoo.data.activations import Activations
from sae_zoo.data.module import ActivationData
from sae_zoo.data.read_ahead import SizedBatches
from sae_zoo.records import digest
from sae_zoo.running.checkpoints import Interrupts, Stopped
from sae_zoo.running.checks import Config
from sae_zoo.running.sources import Source

T = TypeVar("T")
# Handlers that a training sets and puts back; trainings that take turns do not end in the order in which they began.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stream_key(config: Config) -> str:
    """Equal for the jobs of a ``train.yaml`` that train on the same batches in the same order.

    Raises:
        ValueError: if the config is that of another entry point.
    """
    if "recipe" not in config or "l0_target" not in config:
        raise ValueError("hydra/launcher is one_stream, which trains SAEs; it is for sae_zoo.train alone, leave it out")
    trainer, recipe = config["trainer"], config["recipe"]
    if trainer["devices"] != 1:
        raise ValueError(f"trainer.devices is {trainer['devices']}; hydra/launcher=one_stream trains on one device, "
                         "leave one of them out")
    groups = {name: config[name] for name in ("data", "lm", "corpus", "hook")}
    return digest([groups, str(config["output_dir"]), trainer["accelerator"], recipe["batch_size"], recipe["n_steps"],
                   config["seed"]])


class Alone:
    """The surroundings of a job (source, batches, clock, Ctrl-C) when it is alone in its process.

    Attributes:
        interrupts: its Ctrl-C.
    """

    def __init__(self):
        self.interrupts = Interrupts()

    @property
    def leads(self) -> bool:
        """Whether it is the one to show how far training is."""
        return True

    def clock(self) -> float:
        """Seconds since some moment."""
        return time.time()

    def open(self, make: Callable[[], Source]) -> Source:
        """The source that ``make`` opens."""
        return make()

    def data(self, activations: Activations, **arguments: Any) -> ActivationData:
        """Batches of its own; see :class:`ActivationData`."""
        return ActivationData(activations, **arguments)


class _Shared:
    """The source that the first of several jobs opens, the validation rows that it reads, and their Ctrl-C."""

    def __init__(self):
        self.interrupts, self.source, self.validation_rows = Interrupts(), None, None
        self.members: list[_Member] = []


class _Member(Alone):
    """A job that shares stream, source and Ctrl-C with others.

    Attributes:
        shared: what it has in common with the others.
        wanted: the step whose batch it waits for; None before its first turn.
        reader: makes the batches from ``wanted`` on.
        result: what it returned, when it has ended.
    """

    def __init__(self, shared: _Shared, task: Callable[[], Any]):
        super().__init__()
        self.shared, self.interrupts = shared, shared.interrupts
        self.wanted: int | None = None
        self.reader: Callable[[], SizedBatches] | None = None
        self.result: Any = None
        self._greenlet = greenlet(task)
        self._greenlet.gr_context = copy_context()
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._seconds, self._turn_began = 0.0, 0.0

    @property
    def ended(self) -> bool:
        return self._greenlet.dead

    @property
    def leads(self) -> bool:
        return next(member for member in self.shared.members if not member.ended) is self

    def clock(self) -> float:
        """Seconds of its own turns so far; reading the stream is nobody's."""
        return self._seconds + time.perf_counter() - self._turn_began

    def open(self, make: Callable[[], Source]) -> Source:
        """The source that ``make`` opened for the first job that came here."""
        if self.shared.source is None:
            self.shared.source = make()
        return self.shared.source

    def data(self, activations: Activations, **arguments: Any) -> ActivationData:
        """Batches of the stream."""
        return _SharedData(self, activations, **arguments)

    def wait(self, step: int) -> Tensor:
        """The batch of ``step``, when every job that is behind has come so far."""
        self.wanted = step
        given = self._greenlet.parent.switch()
        if isinstance(given, BaseException):
            raise given
        return given

    def take_turn(self, *given: Tensor | BaseException) -> None:
        """Go on with what was waited for, or with an error in its place, until the next batch is waited for or the end.

        Raises:
            BaseException: what the job ends with.
        """
        global _running
        outside = {number: signal.signal(number, handler) for number, handler in self._handlers.items()}
        _running, self._turn_began = self, time.perf_counter()
        try:
            self.result = self._greenlet.switch(*given)
        finally:
            self._seconds, _running = self.clock(), None
            self._handlers = {number: signal.signal(number, handler) for number, handler in outside.items()}


_running: _Member | None = None


def current() -> Alone:
    """The surroundings of the running job."""
    return Alone() if _running is None else _running


class _SharedData(ActivationData):
    """Lightning's view of the stream: the loader gives a batch when its job's turn has come."""

    def __init__(self, member: _Member, activations: Activations, **arguments: Any):
        super().__init__(activations, **arguments)
        self._member = member

    def train_dataloader(self) -> _Turns:
        assert self.trainer is not None  # it is who asks
        self._member.reader = super().train_dataloader
        return _Turns(self._member, self.trainer.global_step, self.n_steps)

    def validation_rows(self, rank: int = 0, world_size: int = 1) -> Tensor:
        shared = self._member.shared
        if shared.validation_rows is None:
            shared.validation_rows = super().validation_rows(rank, world_size)
        return shared.validation_rows


class _Turns:
    def __init__(self, member: _Member, start: int, n_steps: int):
        self._member, self._start, self._n_steps = member, start, n_steps

    def __len__(self) -> int:
        return self._n_steps

    def __iter__(self) -> Iterator[Tensor]:
        yield from map(self._member.wait, range(self._start, self._n_steps))


def train_together(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run ``tasks``, whose trainings (:func:`sae_zoo.running.fitting.fit`) take turns on one stream.

    They are begun one after the other, each when the one before waits for its first batch. A task is to see to its own
    errors; Ctrl-C in one, and whatever else leaves it, asks the others to stop after the step.

    Returns:
        What each returned.

    Raises:
        BaseException: the first that left a task, when all have stopped.
    """
    shared = _Shared()
    shared.members = [_Member(shared, task) for task in tasks]
    left: list[BaseException] = []

    def turn(member: _Member, *given: Tensor | BaseException) -> None:
        try:
            member.take_turn(*given)
        except BaseException as error:
            left.append(error)
            shared.interrupts.count = max(1, shared.interrupts.count)
        if shared.interrupts.count > 1:
            raise Stopped

    def waiting() -> list[_Member]:
        return [member for member in shared.members if member.wanted is not None and not member.ended]

    with shared.interrupts.handled():
        try:
            for member in shared.members:
                if not shared.interrupts.count:
                    turn(member)
            batches: Iterator[Tensor] = iter(())
            position: int | None = None  # of the batch that ``batches`` give next
            given: Tensor | BaseException
            while members := waiting():
                step = min(member.wanted for member in members if member.wanted is not None)
                due = [member for member in members if member.wanted == step]
                try:
                    if step != position:
                        reader = due[0].reader
                        assert reader is not None  # of who waits for a batch
                        batches = iter(reader())
                    given, position = next(batches), step + 1
                except Exception as error:  # it belongs to those who asked for the batch
                    given, position = error, None
                for member in due:
                    turn(member, given)
        except Stopped:
            for member in waiting():
                try:
                    member.take_turn(Stopped())
                except BaseException as error:
                    left.append(error)
    if left:
        raise left[0]
    return [member.result for member in shared.members]
