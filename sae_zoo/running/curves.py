"""Training curves: one ``metrics.csv`` that goes on where a resumed run does, so that it holds what an uninterrupted
one would."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from sae_zoo.files import write_text


class Curves(Logger):
    """A Lightning logger: a row for each time something is logged, a column for each metric, ``step`` first.

    Lightning's own CSVLogger deletes the file that it finds, or begins another beside it.

    Args:
        file: where to write; what stands there is kept until :meth:`start_at`.
    """

    name, version = "metrics", None

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self._columns: list[str] = []

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Keep the rows of the steps before ``step``: later ones will be taken, and logged, again."""
        rows = []
        if step > 0 and self.file.exists():
            text = self.file.read_text()
            whole = text[: text.rfind("\n") + 1]  # a process that died may have left half a line
            rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) < step]
        self._columns = list(rows[0]) if rows else []
        self._rewrite(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{key: value for key, value in metrics.items() if key != "epoch"}}  # there is but one
        if new := [key for key in row if key not in self._columns]:
            with open(self.file, newline="") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        with open(self.file, "a", newline="") as file:
            self._writer(file).writerow(row)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in the run's config."""

    @rank_zero_only
    def sync(self) -> None:
        """Make the rows survive a power cut."""
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())

    def _writer(self, file: io.TextIOBase) -> csv.DictWriter:
        return csv.DictWriter(file, self._columns, lineterminator="\n")

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = self._writer(text)
        if self._columns:
            writer.writeheader()
        writer.writerows(rows)
        write_text(self.file, text.getvalue())
