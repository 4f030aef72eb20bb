"""Readable English out of marked-up documentation: what a person would read aloud, without code, tables and markup."""

from __future__ import annotations

import html
import re
import textwrap

# Directives of reStructuredText whose body is prose; the body of every other one is dropped with it.
_PROSE_DIRECTIVES = frozenset({
    "admonition", "attention", "caution", "class", "container", "danger", "deprecated", "epigraph", "error", "hint",
    "highlights", "important", "note", "pull-quote", "rubric", "seealso", "sidebar", "tip", "topic", "versionadded",
    "versionchanged", "warning", "end_note", "start_note"})
_DIRECTIVE = re.compile(r"^(\s*)\.\.\s+(?:\|[^|]+\|\s+)?([\w:.+-]+?)::(?:\s|$)")
_ADORNMENT = re.compile(r"^\s*([=\-`:'\"~^_*+#<>.])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*(\+[-=+]+\+|=+(\s+=+)+|\|.*\|)\s*$")
_FIELD = re.compile(r"^\s*:[\w -]+:(\s|$)")
_BULLET = re.compile(r"^(\s*)([-*+•]|\(?(?:\d+|[#a-zA-Z])[.)])\s+")
_INLINE = (
    (re.compile(r":[\w:+.-]+:`!?~?([^`<]*?)\s*<[^`>]*>`"), r"\1"),  # :role:`text <target>`
    (re.compile(r":[\w:+.-]+:`!?~?([^`]*)`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"\*\*(\S(?:[^*]*\S)?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\S(?:[^*]*\S)?)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[[#*\w-]*\]_"), ""),  # footnote references
    (re.compile(r"(?<=\w)__?(?=[\s.,;:)]|$)"), ""),
    (re.compile(r"\|([\w .-]+)\|"), r"\1"),
    (re.compile(r"\\(\W)"), r"\1"),
)
# Words of which every English text is full.
_COMMON = frozenset((
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "his", "are", "this", "or", "from", "at", "which", "you", "have", "an", "they", "can", "will", "if", "when", "use",
    "your", "all", "has", "their", "but", "one", "were", "we", "its", "so"))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _block_end(lines: list[str], start: int, indent: int) -> int:
    """The first line from ``start`` on that is neither empty nor indented by more than ``indent``."""
    while start < len(lines) and (not lines[start].strip() or _indent(lines[start]) > indent):
        start += 1
    return start


def _without_blocks(lines: list[str]) -> list[str]:
    """Lines without directives, comments, literal blocks, tables, fields and section adornments."""
    kept: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if found := _DIRECTIVE.match(line):
            indent, name = len(found[1]), found[2].lower()
            end = _block_end(lines, at + 1, indent)
            if name in _PROSE_DIRECTIVES:
                body = lines[at + 1 : end]
                while body and _FIELD.match(body[0]):  # options
                    body = body[1:]
                kept += ["", *_without_blocks(textwrap.dedent("\n".join(body)).split("\n")), ""]
            at = end
        elif re.match(r"^\s*\.\.(\s|$)", line) or re.match(r"^\s*__ ", line):  # comments, targets, footnotes
            at = _block_end(lines, at + 1, _indent(line))
        elif _ADORNMENT.match(line) or _TABLE.match(line) or _FIELD.match(line):
            kept.append("")
            at = _block_end(lines, at + 1, _indent(line)) if _FIELD.match(line) else at + 1
        elif line.lstrip().startswith((">>> ", "$ ", "# ")):
            at += 1
        elif line.rstrip().endswith("::"):
            text = line.rstrip()[:-2].rstrip()
            if text:
                kept.append(text if text.endswith(":") else text + ":")
            at = _block_end(lines, at + 1, _indent(line))
        else:
            kept.append(line)
            at += 1
    return kept


def _paragraphs(lines: list[str]) -> list[str]:
    """Lines joined to paragraphs; each item of a list is one."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if not line.strip() or _BULLET.match(line):
            paragraphs.append([])
        if line.strip():
            paragraphs[-1].append(line.strip())
    return [" ".join(paragraph) for paragraph in paragraphs if paragraph]


def rst_paragraphs(source: str) -> list[str]:
    """The prose of a reStructuredText document, a paragraph an entry."""
    found = []
    for paragraph in _paragraphs(_without_blocks(source.expandtabs(8).splitlines())):
        for pattern, replacement in _INLINE:
            paragraph = pattern.sub(replacement, paragraph)
        found.append(paragraph)
    return found


def plain_paragraphs(source: str) -> list[str]:
    """The paragraphs of plain text that are divided by empty lines; tags and entities of HTML are taken out."""
    source = html.unescape(re.sub(r"<[^<>]{1,200}>", " ", source))
    if "\n\n" in source:
        return _paragraphs(source.splitlines())
    return [line for line in source.splitlines() if line.strip()]


def clean(paragraph: str) -> str:
    """``paragraph`` with one space between words and without control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\xa0\u200b-\u200f\u2028-\u202f\ufeff\ufffd]", " ", paragraph).split())


def is_prose(text: str) -> bool:
    """Whether ``text`` reads like English: nine in ten characters are letters, a quarter of the words the commonest."""
    words = re.findall(r"[a-z']+", text.lower())
    letters = len(re.findall(r"[A-Za-z ,.'\u2019]", text))
    return len(words) >= 5 and letters >= 0.9 * len(text) and sum(w in _COMMON for w in words) >= 0.25 * len(words)
