import csv

import pytest

from sae_zoo.running.curves import Curves

ROWS = [(0, {"loss": 3.5, "epoch": 0}), (1, {"loss": 0.1 + 0.2}), (1, {"heldout": 7.0}), (2, {"loss": 1e-30}),
        (3, {"loss": -1.0, "rate": 0.25})]


def log(file, rows, start=0):
    curves = Curves(file)
    curves.start_at(start)
    for step, metrics in rows:
        curves.log_metrics(metrics, step)
    curves.sync()


@pytest.fixture
def whole(tmp_path):
    log(tmp_path / "whole.csv", ROWS)
    return (tmp_path / "whole.csv").read_text()


def test_rows_and_columns(tmp_path, whole):
    rows = list(csv.DictReader(whole.splitlines()))
    assert list(rows[0]) == ["step", "loss", "heldout", "rate"]
    assert [int(row["step"]) for row in rows] == [0, 1, 1, 2, 3]
    assert float(rows[1]["loss"]) == 0.1 + 0.2 and rows[2]["loss"] == "" and float(rows[4]["rate"]) == 0.25


@pytest.mark.parametrize("died_after", range(len(ROWS) + 1))
@pytest.mark.parametrize("resumed_at", range(4))
def test_a_resumed_file_is_that_of_a_run_that_was_not_interrupted(tmp_path, whole, died_after, resumed_at):
    """It resumes at a step whose earlier rows have all been written."""
    file = tmp_path / "metrics.csv"
    died_after = max(died_after, sum(step < resumed_at for step, _ in ROWS))
    log(file, ROWS[:died_after])
    log(file, [row for row in ROWS if row[0] >= resumed_at], start=resumed_at)
    assert file.read_text() == whole


@pytest.mark.parametrize("cut", range(1, 12))
def test_half_a_line_is_no_row(tmp_path, whole, cut):
    file = tmp_path / "metrics.csv"
    log(file, [*ROWS[:3], (2, {"loss": 1.25, "heldout": 12.5})])  # its first digits are those of an earlier step
    file.write_bytes(file.read_bytes()[:-cut])
    log(file, ROWS[3:], start=2)
    assert file.read_text() == whole


def test_from_the_start_is_from_nothing(tmp_path, whole):
    file = tmp_path / "metrics.csv"
    log(file, [(9, {"other": 1.0})])
    log(file, ROWS)
    assert file.read_text() == whole
