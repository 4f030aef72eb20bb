"""Curves at matched L0, at single L0s and of each language model alone, on records with known answers."""

import json
import math

import pytest

from analysis.claims.__main__ import main
from analysis.claims.evidence import Evidence
from analysis.claims.finding import FAILS, HOLDS, UNDECIDED
from analysis.claims.report import format_by_l0, judge_by_lm
from tests.analysis.test_claims import SITES, curve, judged, run, write


def test_at_what_l0():
    """JumpReLU is 20 % better at 10, as good at 20, 20 % worse at 40; at 80 TopK alone was measured."""
    losses = {10: 0.8, 20: 1.0, 40: 1.2}
    records = [record for hook in SITES for record in (
        *curve("topk", hook=hook, targets=(10, 20, 40, 80)),
        *(run("jumprelu", at, hook=hook, fvu=ratio, loss=2 * ratio, l0=at) for at, ratio in losses.items()))]
    found = judged(records)
    by_l0 = found["C2"].details["by_l0"]
    assert {at: ratio["effect"] for at, ratio in by_l0["fvu"].items()} == pytest.approx(losses)
    assert {at: ratio["effect"] for at, ratio in by_l0["delta_lm_loss"].items()} == pytest.approx(
        {at: 2 * ratio for at, ratio in losses.items()})
    assert by_l0["fvu"][10]["n_pairs"] == len(SITES)
    lines = format_by_l0(found).splitlines()
    assert lines[1].split() == ["L0", "C2", "FVU", "C2", "delta", "LM", "loss"]
    assert lines[2].split() == ["10", "0.800", "[0.800,", "0.800]", "1.600", "[1.600,", "1.600]"]
    assert format_by_l0(judged(curve("jumprelu"))) == ""


def test_each_language_model_alone(tmp_path, capsys):
    """JumpReLU is 20 % better on one and 20 % worse on the other, which is no finding on both."""
    records = [record for lm, ratio in (("small", 0.8), ("other", 1.25)) for hook in SITES for seed in range(3)
               for label, fvu in (("jumprelu", ratio), ("topk", 1.0))
               for record in curve(label, seed, hook, fvu=fvu, lm=lm, data_id=f"{lm}-{hook}")]
    assert judged(records)["C2"].verdict == UNDECIDED
    assert judge_by_lm(Evidence([write(tmp_path / "one", records[:18])])) == {}
    main([str(write(tmp_path / "both", records)), "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    by_lm = json.loads(last)["by_lm"]
    assert {lm: own["C2"]["verdict"] for lm, own in by_lm.items()} == {"other": FAILS, "small": HOLDS}
    assert by_lm["small"]["C2"]["effect"] == pytest.approx(0.8) and by_lm["small"]["C2"]["n_runs"] == 162
    start = lines.index("each language model alone:")
    assert lines[start + 1].split() == ["other", "small"]
    assert lines[start + 2].split()[:5] == ["C2", "does", "not", "hold", "1.250"]
    assert "holds          0.800 [" in lines[start + 2]
    for lm in by_lm:
        assert f"ratios at single L0s of {lm} alone, below 1 where JumpReLU is better:" in lines


def test_a_curve_with_fewer_points_does_not_gain_by_its_bend():
    """Both lie on one curve that bends, as FVU does in log-log; TopK was measured between the others, too."""
    def bent(label, targets, seed):
        return [run(label, at, seed, fvu=math.exp(-0.3 * math.log(at / 10) ** 2), l0=at) for at in targets]

    for at in ((10, 40), (10, 20, 40)):
        records = [record for seed in range(3) for record in (*bent("topk", (5, 10, 20, 40, 80), seed),
                                                              *bent("jumprelu", at, seed))]
        assert judged(records)["C2"].effect == pytest.approx(1)


def test_an_l0_that_was_only_nearly_measured_is_taken_and_a_far_one_is_not():
    records = [record for seed in range(3) for record in (*curve("topk", seed, targets=(10.3, 38)),
                                                          *curve("jumprelu", seed, fvu=0.9, targets=(10.3, 38)))]
    assert list(judged(records)["C2"].details["by_l0"]["fvu"]) == [10, 20]  # 40 is 5.3 % off


def test_curves_are_compared_where_both_were_measured():
    # Different slopes: the mean log ratio is that at the middle of the overlap (20 to 40, in log L0).
    records = []
    for seed in (0, 1, 2):
        records += [{**run("gated", t, seed, l0=t), "fvu": t**-0.5} for t in (20, 40, 80)]
        records += [{**run("jumprelu", t, seed, l0=t), "fvu": t**-0.9} for t in (10, 20, 40)]
    found = judged(records)["C1"]
    assert found.effect == pytest.approx(math.sqrt(20 * 40) ** -0.4)
    assert found.details["l0_range"] == [20, 40]
