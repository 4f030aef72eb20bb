"""Claims on records written by hand, whose answers are known: evidence, the main comparison, the command."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from analysis.claims.__main__ import main
from analysis.claims.evidence import Evidence
from analysis.claims.finding import FAILS, HOLDS, NOT_MEASURED, UNDECIDED
from analysis.claims.report import CHECKS, WIDTH, judge
from sae_zoo.records import RECORD

VARIANT = {"gated_ri_l1": "gated"}
OPTIONS = {
    "jumprelu": {"sae.kernel": "rectangle", "sae.bandwidth": 0.01, "sae.threshold_as": "log", "sae.sparsity_loss": "l0",
                 "sae.ste_into_pre_acts": False, "sae.auxk_coefficient": 0},
    "topk": {"sae.auxk_coefficient": 0.03125}, "gated": {"sae.form": "original", "sae.auxk_coefficient": 0},
    "gated_ri_l1": {"sae.form": "ri_l1", "sae.auxk_coefficient": 0},
    "relu": {"sae.form": "l1", "sae.auxk_coefficient": 0},
}
SITES = [f"{site}.{layer}" for site in ("residual", "mlp", "attention") for layer in (1, 3, 5)]
TARGETS = (10, 20, 40)


def run(label, target=20, seed=0, hook="residual.3", *, fvu=1.0, loss=None, **values):
    """A finished run on the law fvu * 2 L0^-0.7 (delta LM loss: loss * 4 / L0)."""
    l0 = values.pop("l0", target * (1.0 if label == "topk" else 1.01))
    return {
        "status": "finished", "error": None, "variant": VARIANT.get(label, label), "label": label, "l0_target": target,
        "sparsity_coefficient": None, "seed": seed, "lm": "builtin", "hook": hook, "data_id": f"d-{hook}", "d_in": 64,
        "d_sae": 4096, "n_tokens": 1_000_000, "l0": l0, "fvu": 2 * fvu * l0**-0.7,
        "delta_lm_loss": 4 * (fvu if loss is None else loss) / l0, "relative_reconstruction_bias": 1.0,
        "fraction_above_10pct": 0.001, "dead_fraction": 0.01, **OPTIONS.get(label, {}), "recipe.lr": 0.004, **values,
    }


def curve(label, seed=0, hook="residual.3", *, targets=TARGETS, **values):
    return [run(label, target, seed, hook, **values) for target in targets]


def write(folder, records):
    """Write records into a sweep folder, one job each; returns it."""
    for i, record in enumerate(records):
        (folder / f"job{i:03d}").mkdir(parents=True)
        (folder / f"job{i:03d}" / RECORD).write_text(json.dumps(record))
    return folder


def judged(records):
    """Records -> findings."""
    with tempfile.TemporaryDirectory() as folder:
        return judge(Evidence([write(Path(folder), records)]))


def both(ratio, *, sites=SITES, seeds=(0, 1, 2), site_noise=0.0, seed_noise=0.0, other="gated", draw=0):
    """JumpReLU and another arm whose losses are in a ratio, and each pair's log ratio [sites, seeds]."""
    rng = np.random.default_rng(draw)
    logs = math.log(ratio) + site_noise * rng.normal(size=(len(sites), 1)) + seed_noise * rng.normal(
        size=(len(sites), len(seeds)))
    records = [record for i, hook in enumerate(sites) for j, seed in enumerate(seeds) for record in (
        *curve(other, seed, hook), *curve("jumprelu", seed, hook, fvu=math.exp(logs[i, j])))]
    return records, logs


# The main comparison.


def test_a_known_ratio_is_recovered_and_covered():
    records, logs = both(0.93, site_noise=0.02, seed_noise=0.01)
    found = judged(records)["C1"]
    assert found.verdict == HOLDS and found.n_runs == len(records) == 162
    assert found.effect == pytest.approx(math.exp(logs.mean()), rel=1e-6)
    low, high = found.interval
    # Nine sites: the standard error of their mean is 0.02 / 3 and a bit.
    assert low < 0.93 < high and 0.01 < high - low < 0.06
    assert found.details["n_pairs"] == 27 and found.details["method"] == "bootstrap over 9 site/layer means"
    assert found.details["n_sites"] == 9
    assert found.details["n_sites_lower"] == (np.exp(logs.mean(1)) < 1).sum()
    by_site = found.details["by_metric"]["delta_lm_loss"]["by_group"]
    assert by_site["mlp.3"]["effect"] == pytest.approx(math.exp(logs[4].mean()), rel=1e-6)
    assert f"FVU {found.effect:.3f} [{low:.3f}, {high:.3f}] over 27 pairs" in found.words


@pytest.mark.parametrize(("ratio", "c1", "c2"), [
    (0.93, HOLDS, HOLDS), (1.0, UNDECIDED, UNDECIDED), (1.08, FAILS, FAILS)])
def test_verdicts_follow_the_intervals(ratio, c1, c2):
    found = {}
    for claim, other in (("C1", "gated"), ("C2", "topk")):
        records, _ = both(ratio, site_noise=0.03, seed_noise=0.01, other=other, draw=3)
        found[claim] = judged(records)[claim]
    assert (found["C1"].verdict, found["C2"].verdict) == (c1, c2)


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, HOLDS), (1.008, HOLDS), (1.01, UNDECIDED), (1.012, FAILS)])
def test_as_good_as_topk_has_a_margin_of_one_percent(ratio, verdict):
    records, _ = both(ratio, seed_noise=0.001, other="topk")
    found = judged(records)["C2"]
    assert found.verdict == verdict and found.effect == pytest.approx(ratio, abs=1e-3)


def test_both_losses_are_needed():
    records, _ = both(0.9, seed_noise=0.001)
    worse = [{**r, "delta_lm_loss": r["delta_lm_loss"] * (1.2 if r["label"] == "jumprelu" else 1)} for r in records]
    assert judged(worse)["C1"].verdict == FAILS
    without = [{**r, "delta_lm_loss": None} for r in records]
    found = judged(without)["C1"]
    assert found.verdict == UNDECIDED and found.effect == pytest.approx(0.9, abs=1e-2)
    assert any("delta LM loss is not measured" in caveat for caveat in found.caveats)


def test_one_site_that_contradicts_every_site():
    records, _ = both(0.9, seed_noise=0.002)
    records = [{**r, "fvu": r["fvu"] * 1.2} if (r["label"], r["hook"]) == ("jumprelu", "mlp.5") else r for r in records]
    found = judged(records)["C1"]
    assert found.interval[1] < 1 and found.verdict == UNDECIDED  # on average it is lower, but the claim says every
    assert found.details["sites_interval_above_1"] == ["mlp.5"] and "Contradicted at mlp.5." in found.caveats
    assert (found.details["n_sites_lower"], found.details["n_sites_interval_below_1"]) == (8, 8)


def test_the_better_gated_at_each_l0():
    # FVU 1 and L0/20 cross at L0 20; the better is min(1, L0/20). In log L0 from 10 to 40 the mean of its logarithm is
    # that of a ramp from -log 2 to 0 and then 0: -log(2)/4. JumpReLU at 0.5 throughout is at -log 2.
    fvu = {"gated": lambda l0: 1.0, "gated_ri_l1": lambda l0: l0 / 20, "jumprelu": lambda l0: 0.5}
    records = [{**run(label, target, seed, l0=target), "fvu": value(target)}
               for seed in (0, 1, 2) for target in (10, 20, 40) for label, value in fvu.items()]
    found = judged(records)["C1"]
    assert math.log(found.effect) == pytest.approx(-math.log(2) + math.log(2) / 4, abs=0.01)  # a grid of 25


@pytest.mark.parametrize(("jumprelu", "reason"), [
    ([run("jumprelu", t) for t in (80, 160)], "no L0 was measured by all: the ranges are"),
    ([run("jumprelu", 20)], "a curve needs two"),
    ([run("jumprelu", t, data_id="other") for t in TARGETS], "no curve of Gated and Gated RI-L1 at"),
    ([run("jumprelu", t, n_tokens=2_000_000) for t in TARGETS], "no curve of JumpReLU at"),
    ([run("jumprelu", t, seed=1) for t in TARGETS], "no curve of JumpReLU at residual.3, seed 0"),
    ([run("jumprelu", t, status="failed", error="loss is\nNaN") for t in TARGETS],
     "sweep/job003: not finished: loss is NaN"),
    ([{k: v for k, v in run("jumprelu", t).items() if k != "d_sae"} for t in TARGETS],
     "its record does not tell d_sae"),
    ([run("jumprelu", t) | {"l0": 0.0} for t in TARGETS], "its L0 is 0.0"),
    ([run("jumprelu", t) | {"fvu": None, "delta_lm_loss": None} for t in TARGETS], "fvu is measured at 0 L0s"),
    ([*curve("jumprelu"), run("jumprelu", 20, l0=21.0)], "have the same target or the same L0"),
    ([*curve("jumprelu"), run("jumprelu", 20, fvu=1.02)], "have the same target or the same L0"),
    ([*curve("jumprelu"), run("jumprelu", 21, l0=20.2)], "have the same target or the same L0"),
    ([*curve("jumprelu"), *curve("jumprelu", **{"sae.bandwidth": 0.1})], "none has most runs"),
    (curve("jumprelu", **{"sae.ste_into_pre_acts": True}), "3 runs of another form than the published one"),
])
def test_no_verdict_from_runs_that_cannot_be_compared(tmp_path, jumprelu, reason):
    evidence = Evidence([write(tmp_path / "sweep", [*curve("gated"), *jumprelu])])
    found = judge(evidence)["C1"]
    assert (found.verdict, found.effect, found.interval, found.n_runs) == (NOT_MEASURED, None, None, 0)
    assert any(reason in line for line in [*evidence.left_out, *found.left_out])


def test_a_loss_without_a_logarithm_leaves_its_curve_out():
    records, _ = both(0.9, seeds=(0,), sites=SITES[:4])
    records = [{**r, "delta_lm_loss": -0.001} if (r["hook"], r["l0_target"]) == (SITES[0], 40) else r for r in records]
    found = judged(records)["C1"]
    assert {m: own["n_pairs"] for m, own in found.details["by_metric"].items()} == {"fvu": 4, "delta_lm_loss": 3}
    assert any("residual.1, seed 0" in line and "has no logarithm" in line for line in found.left_out)


def test_copies_count_once_and_other_configurations_are_said(tmp_path):
    records, _ = both(0.9, seeds=(0, 1, 2), sites=SITES[:3])
    sweep = write(tmp_path / "sweep", records)
    more = [run("jumprelu", t, 0, SITES[0], fvu=3.0, **{"sae.bandwidth": 0.1}) for t in TARGETS]
    more += [run("jumprelu", t, 0, SITES[0], fvu=5.0, **{"sae.kernel": "gaussian"}) for t in TARGETS]
    others = write(tmp_path / "others", [*records[:6], *more])
    evidence = Evidence([sweep, sweep / "job000", others])
    found = judge(evidence)["C1"]
    assert found.effect == pytest.approx(0.9) and found.n_runs == len(records)
    assert evidence.left_out == [f"others/job{i:03d}: a copy of sweep/job{i:03d}" for i in range(6)]
    assert ("residual.1: JumpReLU has 2 configurations, which differ in sae.bandwidth; that with most runs is taken, "
            "the other 3 runs are not") in found.left_out
    assert "JumpReLU: 3 runs of another form than the published one, which belong to the ablations" in found.left_out


def test_a_training_that_was_repeated_elsewhere_counts_once_by_the_one_that_was_scored_on_most():
    records, _ = both(0.9, sites=SITES[:1])
    again = [run("jumprelu", 20, fvu=0.9 * 1.004, hook=SITES[0], loss=2.0, n_lm_targets=more) for more in (100, None)]
    first = [r | {"n_lm_targets": 1000} for r in records]
    for found in (judged([*first, *again])["C1"], judged([*again, *first])["C1"]):
        assert found.effect == pytest.approx(0.9) and found.n_runs == len(records) and not found.left_out


def test_4_and_4_point_0_are_one_configuration():
    records, _ = both(0.9, sites=SITES[:1])
    for i, record in enumerate(records):
        record["recipe.lr_l0"] = 4 if i % 2 else 4.0
    assert judged(records)["C1"].effect == pytest.approx(0.9)


# Uncertainty and caveats.


def test_fewer_than_three_pairs_decide_nothing():
    for sites, seeds in (([SITES[0]], (0,)), ([SITES[0]], (0, 1)), (SITES[:2], (0,))):
        records, _ = both(0.5, sites=sites, seeds=seeds)
        found = judged(records)["C1"]
        assert found.verdict == UNDECIDED and found.interval is None and found.effect == pytest.approx(0.5)
        assert "Fewer than 3 pairs of site/layer and seed: no interval can be given." in found.caveats
        assert "FVU 0.500 (no interval)" in found.words


def test_scale_seeds_sites_auxk_and_recipes_are_said():
    records, _ = both(0.9, seeds=(0,))
    caveats = judged(records)["C1"].caveats
    assert "One seed: the spread over seeds is not measured." in caveats
    assert any("builtin, 4,096 latents, 1,000,000 tokens" in caveat for caveat in caveats)
    assert any("Gated RI-L1 has no curve at 9 of 9 pairs" in caveat for caveat in caveats)
    assert not any("AuxK" in caveat or "recipes" in caveat or "site/layer pairs" in caveat for caveat in caveats)

    records, _ = both(0.9, sites=SITES[:2])
    jumprelu = {"sae.auxk_coefficient": 0.03125, "recipe.lr": 0.006, "recipe.auxk_coefficient": 0.03125}
    caveats = judged([r | (jumprelu if r["label"] == "jumprelu" else {}) for r in records])["C1"].caveats
    assert "JumpReLU: trained with AuxK (sae.auxk_coefficient above 0), published without." in caveats
    assert "The arms' recipes differ in recipe.lr." in caveats
    assert "Only residual.1 and residual.3: nothing is said of other sites and layers." in caveats
    assert not any("One seed" in caveat for caveat in caveats)

    untold = [{k: v for k, v in r.items() if "." not in k} for r in records]
    assert any("36 of 36 records do not tell the SAE's options" in c for c in judged(untold)["C1"].caveats)
    paper = [r | {"lm": "gemma2_9b", "d_sae": 131_072, "n_tokens": 8_000_000_000} for r in records]
    assert not any("scale" in caveat for caveat in judged(paper)["C1"].caveats)


# Shrinkage, frequency, dead latents, uniformity.


def arms(key, values):
    """Curves of several labels at three sites, three seeds; ``key`` of a run is values[label](target) to 0.05 %."""
    rng = np.random.default_rng(0)
    return [run(label, t, seed, hook) | {key: value(t) * (1 + 0.0005 * rng.uniform(-1, 1))}
            for hook in SITES[:3] for seed in (0, 1, 2) for label, value in values.items() for t in TARGETS]


def flat(key, shares):
    """Curves on which a share does not depend on L0; None leaves a label out."""
    return arms(key, {label: lambda t, share=share: share for label, share in shares.items() if share is not None})


@pytest.mark.parametrize(("jumprelu", "relu", "verdict"), [
    (0.998, 0.9, HOLDS), (0.98, 0.9, FAILS), (1.03, 0.9, FAILS), (0.998, 0.997, FAILS), (0.998, None, UNDECIDED),
    (0.9, None, FAILS)])
def test_shrinkage(jumprelu, relu, verdict):
    found = judged(flat("relative_reconstruction_bias", {"jumprelu": jumprelu, "relu": relu}))["C4"]
    assert found.verdict == verdict and found.effect == pytest.approx(jumprelu, abs=1e-3)
    if relu:
        assert found.details["by_variant"]["relu"]["effect"] == pytest.approx(relu, abs=1e-3)


def frequent(jumprelu, topk, gated, **more):
    shares = {"jumprelu": jumprelu, "topk": topk, "gated": gated, "gated_ri_l1": gated and gated / 2}
    return [record | more for record in flat("fraction_above_10pct", shares)]


@pytest.mark.parametrize(("records", "verdict", "effect"), [
    (frequent(0.004, 0.003, 0.001), HOLDS, 0.003),
    (frequent(0.004, 0.0005, 0.001), FAILS, 0.003),
    (frequent(0.0005, 0.003, 0.001), FAILS, -0.0005),
    (frequent(0.004, None, 0.001), UNDECIDED, 0.003),
    (frequent(0.004, 0.003, 0.0), HOLDS, 0.004),  # zero is a share
    (frequent(0.004, 0.003, 0.001, d_sae=131_072), FAILS, 0.003),  # 0.4 % of 131,072 is not under 0.06 %
    (frequent(0.0004, 0.0003, 0.0001, d_sae=131_072), HOLDS, 0.0003),
    (frequent(0.004, 0.003, None), NOT_MEASURED, None),
])
def test_frequent_latents(records, verdict, effect):
    found = judged(records)["C5"]
    assert found.verdict == verdict and (found.effect == effect if effect is None else
                                         found.effect == pytest.approx(effect, abs=1e-5))


@pytest.mark.parametrize(("jumprelu", "topk", "gated", "auxk", "verdict"), [
    (0.01, 0.02, 0.03, 0, HOLDS), (0.025, 0.02, 0.03, 0, HOLDS), (0.04, 0.02, 0.03, 0, FAILS),
    (0.09, 0.2, 0.3, 0, FAILS),  # fewer than the others, but not few
    (0.01, 0.02, None, 0, UNDECIDED), (0.01, 0.02, 0.03, 0.03125, NOT_MEASURED),
    (0.01, 0.02, 0.03, None, NOT_MEASURED)])
def test_dead_latents(jumprelu, topk, gated, auxk, verdict):
    records = flat("dead_fraction", {"jumprelu": jumprelu, "topk": topk, "gated": gated})
    records = [r | ({"sae.auxk_coefficient": auxk} if r["label"] == "jumprelu" else {}) for r in records]
    found = judged(records)["C9"]
    assert found.verdict == verdict
    if verdict != NOT_MEASURED:
        assert found.effect == pytest.approx(jumprelu - topk, abs=1e-4)
        assert found.details["share"]["effect"] == pytest.approx(jumprelu, abs=1e-4)


def test_dead_latents_where_the_recipe_has_auxk_for_all():
    records = flat("dead_fraction", {"jumprelu": 0.01, "topk": 0.02, "gated": 0.03})
    main = [r | {"sae.auxk_coefficient": 0.03125} for r in records]
    without = [r | {"label": "jumprelu_auxk_0", "dead_fraction": 0.09} for r in records if r["label"] == "jumprelu"]
    assert judged(main)["C9"].verdict == NOT_MEASURED
    found = judged(main + without)["C9"]
    assert found.verdict == FAILS and found.details["share"]["effect"] == pytest.approx(0.09, abs=1e-4)
    # experiment=auxk alone has TopK, too, under labels of its own
    topk = [r | {"label": f"topk_auxk_{c:g}", "sae.auxk_coefficient": c, "dead_fraction": 0.02 if c else 0.5}
            for r in records if r["label"] == "topk" for c in (0, 0.03125)]
    difference = judged(without + topk)["C9"].details["differences"]["TopK with AuxK"]
    assert difference["effect"] == pytest.approx(0.07, abs=1e-4)


@pytest.mark.parametrize(("slopes", "scales", "verdict"), [
    ({"jumprelu": -0.3, "topk": -0.3, "gated": -0.32}, {}, HOLDS),
    ({"jumprelu": -0.3, "topk": 0.1}, {}, FAILS),
    ({"jumprelu": -0.3, "topk": -0.3}, {"topk": 1.5}, FAILS),
    ({"jumprelu": -0.3}, {}, UNDECIDED),
    ({"topk": -0.3}, {}, NOT_MEASURED),
])
def test_uniformity(slopes, scales, verdict):
    law = {label: lambda t, k=k, label=label: scales.get(label, 1) * 0.5 * (t / 20) ** k for label, k in slopes.items()}
    found = judged(arms("r_l0", law))["C14"]
    assert found.verdict == verdict
    if verdict != NOT_MEASURED:
        assert found.effect == pytest.approx(-0.3, abs=2e-3)
        assert found.details["slopes"].keys() == slopes.keys()


# The command.


def test_command_prints_a_table_and_json_as_the_last_line(tmp_path, capsys):
    records, _ = both(0.93, site_noise=0.02, seed_noise=0.01)
    folder = write(tmp_path / "sweep", [*records, run("relu", status="failed", error="out of memory")])
    main([str(folder), "--json"])
    lines = capsys.readouterr().out.splitlines()
    table, last = lines[:-1], json.loads(lines[-1])
    assert max(map(len, table)) <= WIDTH <= 120
    assert list(last["claims"]) == ["C1", "C2", "C3", "C4", "C5", "C8", "C9", "C10", "C11", "C12", "C13", "C14"]
    for name, claim in last["claims"].items():
        assert claim["verdict"] in (HOLDS, FAILS, UNDECIDED, NOT_MEASURED) and claim["metric"] and claim["caveats"]
        assert (claim["effect"] is None) == (claim["verdict"] == NOT_MEASURED)
        assert claim["rule"].startswith(name) and "does not hold if" in claim["rule"].replace("It does", "does")
        assert any(line.startswith(name) and f" {claim['verdict']} " in line for line in table)
    assert last["claims"]["C1"]["verdict"] == HOLDS and last["claims"]["C1"]["n_runs"] == 162
    assert last["left_out"] == ["sweep/job162: not finished: out of memory"] and "  " + last["left_out"][0] in table
    main([str(folder)])
    assert not capsys.readouterr().out.splitlines()[-1].startswith("{")


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "DIR"), (["{tmp}/nothing"], "is not a folder"), (["{tmp}/empty"], "holds no record.json"),
    (["{tmp}/sweep", "--color"], "--color"), (["{tmp}/damaged"], "is not a record"), (["{tmp}/ste"], "is not JSON")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    write(tmp_path / "sweep", curve("topk"))
    for name, file in (("damaged", "record.json"), ("ste", "ste.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.startswith("analysis.claims: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_nothing_but_failed_runs_measures_nothing():
    assert {found.verdict for found in judged([run("topk", status="failed", error="x")]).values()} == {NOT_MEASURED}


def test_as_a_module_without_training_code(tmp_path):
    folder = write(tmp_path, both(0.9, sites=SITES[:1])[0])
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "analysis.claims", str(folder), "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["claims"]["C1"]["effect"] == pytest.approx(0.9)
    code = ("import sys, analysis.claims.report; "
            "assert not {'torch', 'hydra', 'sae_zoo.saes', 'matplotlib.pyplot'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).returncode == 0


def test_every_claim_is_there_once():
    assert [int(name[1:]) for name in CHECKS] == [*range(1, 6), *range(8, 15)]
