"""The results that ship: complete records, from which the commands in their README.md work."""

import json
import re
from pathlib import Path

import pytest

from analysis.claims.evidence import Evidence
from analysis.claims.report import format_by_lm, judge, judge_by_lm
from analysis.paper import FIGURES, draw_paper
from sae_zoo.records import RECORD

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
SWEEPS = sorted([*RESULTS.glob("width_*"), RESULTS / "neox_1024"])


def test_every_run_has_finished_what_missed_its_target_is_said_and_none_names_a_place_on_a_disk():
    readme = (RESULTS / "README.md").read_text()
    files = [path for path in RESULTS.rglob("*") if path.suffix in (".json", ".csv", ".md")]
    assert len(files) > 20
    for path in files:
        text = path.read_text()
        assert not re.search(r"(^|[\s\"'(])/(tmp|home|root|work|Users)/", text), path
        if path.name == RECORD:
            record = json.loads(text)
            assert record["status"] == "finished" and "traceback" not in record, path
            assert not record["l0_missed"] or f"{path.parent.parent.name}/{path.parent.name}" in readme


def test_the_claims_are_judged_and_nothing_is_left_out():
    evidence = Evidence([RESULTS])
    findings = judge(evidence)
    verdicts = dict(re.findall(r"^\| (C\d+) \|[^|]*\| ([a-z ]+) \|", (RESULTS / "README.md").read_text(), re.MULTILINE))
    assert verdicts == {name: found.verdict for name, found in findings.items()}
    assert not evidence.left_out and len(evidence.runs) == len(list(RESULTS.rglob(RECORD)))


def test_the_table_of_each_language_model_alone_is_the_commands():
    lines = [line.split() for line in format_by_lm(judge_by_lm(Evidence([RESULTS]))).splitlines()]
    page = (RESULTS / "README.md").read_text()
    header, *rows = re.findall(r"^\| (claim|C\d+) \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    assert list(header[1:]) == lines[1] and [" ".join(row).split() for row in rows] == lines[2:]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.name)
def test_the_figures_are_drawn(sweep, tmp_path):
    drawn = draw_paper([sweep], tmp_path).files
    assert {"fvu", "delta_lm_loss", "shrinkage", "r_l0", "frequencies"} <= set(drawn) <= set(FIGURES)


def test_the_table_of_all_places_says_what_the_records_say():
    labels, rows = ("jumprelu", "topk", "gated", "gated_ri_l1", "relu"), re.findall(
        r"^\| (\w+\.\d), (\d+) \|(.*)\|$", (RESULTS / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 18 + 5
    for place, target, cells in rows:
        # The built-in one is trained on at layers 1, 3, 5.
        sweep = "neox_1024" if place == "residual.2" else "width_1024"
        for label, cell in zip(labels, cells.split("|"), strict=True):
            record = json.loads((RESULTS / f"{sweep}/{place}/{label}-l0_{target}-seed_0" / RECORD).read_text())
            missed = f" (at L0 {record['l0']:.1f})" if record["l0_missed"] else ""
            assert cell.strip() == f"{record['fvu']:.4f}, {record['delta_lm_loss']:.4f}{missed}", (place, label, target)


def test_the_table_says_what_the_records_say():
    readme = (RESULTS / "README.md").read_text()
    header, *rows = re.findall(r"^\| (?:L0|\d+) \|.*$", readme, re.MULTILINE)
    labels = [name.strip().lower() for name in header.strip("|").split("|")][1:]
    for row in rows:
        target, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        for label, cell in zip(labels, cells, strict=True):
            record = json.loads((RESULTS / "width_4096" / f"{label}-l0_{target}-seed_0" / RECORD).read_text())
            assert cell == (f"{record['fvu']:.4f}, {record['delta_lm_loss']:.4f}, {record['dead_fraction']:.1%}"
                            .replace("%", " %")), (label, target)
