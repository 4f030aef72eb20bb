"""Draws docs/rooms.svg from the imports of sae_zoo; mkdocs calls it before it builds."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sae_zoo"


def rooms() -> dict[str, set[str]]:
    """Folder of sae_zoo, or ``entry points`` for the modules that stand directly in it -> the folders that it imports.
    """
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found: dict[str, set[str]] = {name: set() for name in (*sorted(folders), "entry points")}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        room = room if room in folders else "entry points"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_zoo."):
                found[room] |= {node.module.split(".")[1]} & folders - {room}
    return found


def levels(imports: dict[str, set[str]]) -> dict[str, int]:
    """Room -> how many rooms stand below it on its longest way down."""
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            found[room] = 1 + max(map(level, imports[room]), default=-1)
        return found[room]

    for room in imports:
        level(room)
    return found


def draw(path: Path) -> None:
    """Every room a box, rooms that import nothing at the bottom, an arrow for each import that no longer way implies.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    imports = rooms()
    height = levels(imports)
    above: dict[int, list[str]] = {}
    for room in sorted(imports):
        above.setdefault(height[room], []).append(room)
    n = max(map(len, above.values()))
    place = {room: ((i + 0.5) * n / len(row), y) for y, row in above.items() for i, room in enumerate(row)}

    def reaches(room: str, other: str) -> bool:
        return other in imports[room] or any(reaches(below, other) for below in imports[room])

    figure = Figure(figsize=(2.2 * n, 1.05 * len(above)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, n), ylim=(-0.5, len(above) - 0.5))
    axes.axis("off")
    for room, others in imports.items():
        for other in others:
            if not any(reaches(between, other) for between in others - {other}):
                axes.annotate("", place[other], place[room], arrowprops={
                    "arrowstyle": "->", "color": "#888888", "shrinkA": 14, "shrinkB": 14,
                    "connectionstyle": "arc3,rad=0.06"})
    for room, (x, y) in place.items():
        axes.add_patch(FancyBboxPatch((x - 0.36, y - 0.17), 0.72, 0.34, boxstyle="round,pad=0.02", facecolor="white",
                                      edgecolor="#333333", linewidth=1, mutation_aspect=2))
        axes.text(x, y, room, ha="center", va="center", fontsize=11, color="#333333")
    with matplotlib.rc_context({"svg.hashsalt": "sae_zoo"}):
        figure.savefig(path, metadata={"Date": None})


def on_pre_build(config: object) -> None:
    """mkdocs' hook."""
    draw(Path(__file__).with_name("rooms.svg"))
