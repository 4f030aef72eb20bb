"""Cost of real code, found by running it on tensors that have shapes and no memory.

Modules are on the meta device or made inside, other inputs become fake: every operation is seen, none is carried out.
So the figures are those of the code that will run, whatever the architecture, and need no formula of ours.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Cost of some work.

    Attributes:
        flops: of matrix products, a multiplication and an addition counting as two (torch's FlopCounterMode).
        peak_bytes: of the tensors that it makes, as many as live at once; what was there before is not counted.
    """

    flops: int
    peak_bytes: int


class Meter:
    """A context in which tensors have no memory; :meth:`so_far` may be asked at any moment, from inside a hook too."""

    def __enter__(self) -> Meter:
        self._flops, self._live = FlopCounterMode(display=False), _LiveBytes()
        with ExitStack() as stack:
            for mode in (FakeTensorMode(allow_non_fake_inputs=True), self._flops, self._live):
                stack.enter_context(mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def so_far(self) -> Cost:
        """Cost of the work since the context was entered."""
        return Cost(self._flops.get_total_flops(), self._live.peak)


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make until the last tensor on each is gone."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:  # else a view, or in place
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, n_bytes).atexit = False

    def _drop(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes
