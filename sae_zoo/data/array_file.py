"""Bring your own activations: a two-dimensional float array in a file, memory-mapped."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_zoo.data.activations import Activations, first_not_finite
from sae_zoo.data.corpus import SPLITS
from sae_zoo.data.norms import Norms
from sae_zoo.data.permutation import Permutation
from sae_zoo.functional.norms import squared_norms
from sae_zoo.records import digest

_KEY_SEPARATOR = "::"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK_BYTES = 1 << 24  # of float32, looked at at a time


class FileActivations(Activations):
    """Activations in a ``.npy``, ``.safetensors`` or ``.pt`` file (weights only), [n_rows, d_in], any float type.

    The rows are taken as they are; where neighbours in the file are alike (one document), so are train and held-out at
    the border, and a second file of other documents is the better choice.

    Args:
        path: the file; ``file.safetensors::name`` picks one of several tensors.
        heldout_path: a second file, its first half for validation and its second for test; ``path`` is then all train.
        heldout_fraction: without a second file, the share of rows at the end that is held out, half for each.

    Raises:
        ValueError: if a file is missing, of another kind, not a 2-D float array, holds NaN or inf (the first such row
            is named), or gives a split no row; or if the two files differ in width.
    """

    def __init__(self, path: str, *, heldout_path: str | None = None, heldout_fraction: float = 0.1):
        array = open_array(path)
        if heldout_path is None:
            if not 0 < heldout_fraction < 1:
                raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be between 0 and 1")
            n_train = len(array) - round(len(array) * heldout_fraction)
            train, held_out = array[:n_train], array[n_train:]
        else:
            train, held_out = array, open_array(heldout_path)
            if held_out.shape[1] != train.shape[1]:
                raise ValueError(f"{heldout_path} has rows of {held_out.shape[1]} numbers, {path} of {train.shape[1]}; "
                                 "they must be equal")
        half = len(held_out) // 2
        self._splits = dict(zip(SPLITS, (train, held_out[:half], held_out[half:]), strict=True))
        for split, rows in self._splits.items():
            if not len(rows):
                raise ValueError(f"{heldout_path or path} has too few rows: {split} gets none; give more"
                                 + (" or change heldout_fraction" if heldout_path is None else ""))
        self.d_in = array.shape[1]
        self.norms = self._checked_norms(train, path, 0)
        self._checked_norms(held_out, heldout_path or path, 0 if heldout_path else len(train))
        sources = [path] if heldout_path is None else [path, heldout_path]
        self.data_id = "file-" + digest({
            "content": [_sha256(_split_key(source)[0]) for source in sources],
            "keys": [_split_key(source)[1] for source in sources],
            "rows": [self.n_rows(split) for split in SPLITS],
        })

    def n_rows(self, split: str) -> int:
        if split not in self._splits:
            raise ValueError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")
        return len(self._splits[split])

    def rows(self, split: str, start: int, stop: int) -> Tensor:
        self._check_range(split, start, stop)
        return self._splits[split][start:stop].float()

    def stream(self, split: str, seed: int) -> PermutedStream:
        return PermutedStream(self._splits[split], seed)

    def _checked_norms(self, rows: Tensor, path: str, first: int) -> Norms:
        """Norms of rows that are finite; ``first`` is the number of ``rows[0]`` in the file, for the error."""
        norms = Norms()
        for i, part in enumerate(parts := rows.split(max(1, _CHUNK_BYTES // (4 * self.d_in)))):
            part = part.float()
            bad = first_not_finite(part)
            if bad is not None:
                row = first + i * len(parts[0]) + bad
                raise ValueError(f"{path} holds NaN or inf (as float32), first in row {row}; remove such rows")
            norms.add(squared_norms(part))
        return norms


class PermutedStream:
    """An endless stream over rows [n_rows, d_in] in memory or mapped: every pass is a new seeded permutation."""

    def __init__(self, rows: Tensor, seed: int):
        self._rows, self._seed = rows, seed

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of the stream, float32 [count, d_in]."""
        n, taken = len(self._rows), []
        while count:
            pass_, start = divmod(first, n)
            size = min(count, n - start)
            taken.append(Permutation(n, self._seed, pass_)(np.arange(start, start + size)))
            first, count = first + size, count - size
        return self._rows.index_select(0, torch.from_numpy(np.concatenate(taken))).float()


def _split_key(path: str) -> tuple[Path, str | None]:
    """The file and the name of the tensor in it, where one is given."""
    file, separator, key = str(path).partition(_KEY_SEPARATOR)
    return Path(file).expanduser(), key if separator else None


def open_array(path: str) -> Tensor:
    """The array of a file, mapped, not read; checked but for its values."""
    file, key = _split_key(path)
    readers: dict[str, Callable[[Path, str | None], Tensor]] = {
        ".npy": _open_npy, ".safetensors": _open_safetensors, ".pt": _open_pt}
    if file.suffix not in readers:
        raise ValueError(f"{file} ends in {file.suffix!r}; activation files end in {', '.join(readers)}")
    if key is not None and file.suffix != ".safetensors":
        raise ValueError(f"{path}: only a .safetensors file has named tensors; leave {_KEY_SEPARATOR}{key} out")
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a file of activations")
    try:
        array = readers[file.suffix](file, key)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError, OSError) as error:
        raise ValueError(f"{file} cannot be read as {file.suffix}: {str(error).splitlines()[0]}") from None
    if not isinstance(array, Tensor):
        raise ValueError(f"{file} holds a {type(array).__name__}; save the tensor alone")
    if array.ndim != 2 or array.dtype not in _FLOATS:
        raise ValueError(f"{file} holds {str(array.dtype).removeprefix('torch.')} of shape {tuple(array.shape)}; "
                         "a two-dimensional float array [n_rows, d_in] is expected")
    if not array.numel():
        raise ValueError(f"{file} holds an array of shape {tuple(array.shape)}; it is empty")
    return array


def _open_npy(file: Path, _: str | None) -> Tensor:
    try:
        # c: copy on write, as torch has no read-only tensors
        return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    except ValueError as error:
        raise TypeError(error) from None  # numpy's name for a broken or pickled file


def _open_safetensors(file: Path, key: str | None) -> Tensor:
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        if key is None and len(names) != 1:
            raise ValueError(f"{file} holds {len(names)} tensors ({', '.join(names)}); choose one by "
                             f"{file}{_KEY_SEPARATOR}name")
        if key is not None and key not in names:
            raise ValueError(f"{file} holds no tensor {key!r}; it has {', '.join(names)}")
        return tensors.get_tensor(names[0] if key is None else key)


def _open_pt(file: Path, _: str | None) -> Tensor:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
