"""The content and the program that shows it, as one HTML file that needs no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_SCRIPTS = ("state.js", "pictures.js", "views.js", "page.js")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(content: Mapping[str, Any]) -> str:
    """The page of :func:`analysis.dashboard.content.gather`'s values.

    Texts from a corpus are untrusted. They travel compressed, in base64, so that no mark-up in them can end the element
    that holds them; the program puts them on the page as text; and the page's policy lets no script run but its own,
    by its hash, and nothing be loaded from anywhere.
    """
    style = (_HERE / "page.css").read_text()
    script = "\n".join((_HERE / name).read_text() for name in _SCRIPTS)
    data = gzip.compress(json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    parts = {"policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}", "style": style,
             "data": base64.b64encode(data).decode(), "script": script}
    before, *pieces = (_HERE / "page.html").read_text().split("{{")
    page = [before]
    for piece in pieces:
        name, after = piece.split("}}", 1)
        page += [parts[name], after]
    return "".join(page)
