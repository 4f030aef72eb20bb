"""The benchmark's protocol: search, matched L0, ratios, resuming, and sae_zoo itself as a contestant."""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import contestants, frontier, quality
from benchmarks.__main__ import main
from benchmarks.contestants import OURS, Bench, Job, find_cache, mean_and_spread
from benchmarks.quality import Trial, add_ratios, at_l0, bracket, next_control
from sae_zoo.data.corpus import TextFilesCorpus
from sae_zoo.data.harvesting import HarvestSpec, harvest
from sae_zoo.lm.hooks import resolve_hook
from sae_zoo.lm.load import load_lm

# The search, on laws that are known.


def law(kind):
    """(control -> record, rising) of L0 as a power of the control, FVU as one of L0."""
    def train(control):
        l0 = {"coefficient": 12 / control**0.7, "target": 1.25 * control**0.95,
              "saturating": 30 + 0.02 * control}[kind]
        return {"l0": l0, "l0_validation": l0, "fvu": 2 * l0**-0.6, "fvu_validation": 2 * l0**-0.6, "control": control}

    return train, kind != "coefficient"


def test_next_control_is_exact_on_a_power_law():
    train, rising = law("coefficient")
    points = [(c, train(c)["l0"]) for c in (0.5, 2.0, 9.0)]
    assert next_control(points, 20.0, rising=rising) == pytest.approx((12 / 20) ** (1 / 0.7))
    # One point: slope -1, or +1; at most a factor of ten; a slope of the wrong sign is noise.
    assert next_control([(2.0, 40.0)], 20.0, rising=False) == pytest.approx(4.0)
    assert next_control([(2.0, 40.0)], 20.0, rising=True) == pytest.approx(1.0)
    assert next_control([(2.0, 4000.0)], 20.0, rising=False) == pytest.approx(20.0)
    assert next_control([(1.0, 30.0), (1.1, 31.0)], 60.0, rising=False) <= 1.1
    assert 0 < next_control([(1.0, 0.0)], 20.0, rising=False) < 1.0  # all latents silent


@pytest.mark.parametrize("kind, known", [("coefficient", (1.0, 40.0)), ("coefficient", (0.001, 40.0)),
                                         ("target", (40.0, 40.0))])
def test_bracket_gets_around_what_is_wanted(kind, known):
    train, rising = law(kind)
    controls = []
    runs = bracket(train, (28, 56), (40, 40), controls, rising=rising, known=[known])
    l0s = [run["l0"] for run in runs]
    assert min(l0s) <= 40 <= max(l0s) and len(runs) <= 6 and controls == [run["control"] for run in runs]
    assert at_l0(runs, "l0", "fvu", 40.0) == pytest.approx(2 * 40**-0.6)  # exact on a power law
    more = bracket(train, (15, 110), (20, 80), controls, rising=rising, known=[known])
    assert more[: len(runs)] == runs and min(r["l0"] for r in more) <= 20 and max(r["l0"] for r in more) >= 80
    assert len(more) - len(runs) <= 4


def test_bracket_gives_up_where_the_control_does_not_get_there():
    train, rising = law("saturating")
    runs = bracket(train, (10, 20), (15, 15), [], rising=rising, known=[(40.0, 40.0)])
    assert len(runs) <= 3 and at_l0(runs, "l0", "fvu", 15.0) is None


def test_matched_l0_is_never_extrapolated():
    runs = [{"l0": l0, "fvu": fvu} for l0, fvu in ((45.0, 0.1), (20.0, 0.225))]
    assert at_l0(runs, "l0", "fvu", 30.0) == pytest.approx(0.15)
    for at in (19.9, 45.1):
        assert at_l0(runs, "l0", "fvu", at) is None
    assert at_l0([*runs, {"l0": 30.0, "fvu": None}], "l0", "fvu", 30.0) == pytest.approx(0.15)
    assert at_l0([*runs, {"l0": 120.0, "fvu": 0.01}], "l0", "fvu", 80.0) is None, "its neighbours are too far apart"
    assert at_l0([], "l0", "fvu", 40.0) is None


def test_seeds_are_averaged_only_together():
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([1.0]) == (1.0, None)
    assert mean_and_spread([1.0, None]) == (None, None)


class Law:
    """Stands where a Bench does: FVU is a power of L0 and best at a rate of 8e-3; rates above 3e-2 fail; L0 is k, or
    falls with the coefficient, the faster the higher the rate; seeds differ by 2 % in L0.
    """

    def __init__(self):
        self.n_trained = 0

    def record(self, job):
        self.n_trained += 1
        if job.lr is not None and job.lr > 3e-2:
            raise contestants.RunFailed("diverged")
        l0 = job.sparsity
        if job.variant != "topk":
            l0 = 30 / job.sparsity ** (0.6 + 10 * job.lr) * (1 + 0.02 * job.seed)
        fvu = (1 + abs(math.log(job.lr / 8e-3))) * l0**-0.6 if job.lr else 1.0
        return {"l0": l0, "fvu": fvu, "fvu_validation": fvu, "l0_validation": l0, "seconds": 1.0, "dead_fraction": 0.0,
                "sparsity": job.sparsity}


def base(variant):
    return Job(contestant="x", variant=variant, d_sae=8, batch=1, steps=1, seed=0, lr=None, sparsity=None)


def test_the_grid_of_rates_grows_while_the_best_is_at_its_edge():
    trial = Trial(Law(), base("topk"), {"control": "k"}, [20, 40, 80], lambda line: None)
    assert list(trial.choose_lr([1e-3, 2e-3], 0)) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert list(trial.choose_lr([4e-3, 8e-3, 1.6e-2], 0)) == [4e-3, 8e-3, 1.6e-2]
    assert list(trial.choose_lr([1.6e-2, 3.2e-2], 0)) == [1.6e-2, 3.2e-2, 8e-3, 4e-3]
    assert trial.choose_lr([3.2e-2, 8e-3], 0)[3.2e-2] == math.inf


def test_a_coefficient_is_searched_at_every_rate_and_every_seed_is_matched():
    bench = Law()
    trial = Trial(bench, base("relu"), {"control": "coefficient", "start": 0.05}, [20, 40, 80], lambda line: None)
    found = trial.choose_lr([4e-3, 8e-3, 1.6e-2], 0)
    for lr, fvu in found.items():
        assert fvu == pytest.approx((1 + abs(math.log(lr / 8e-3))) * 40**-0.6)
    assert bench.n_trained <= 9
    curves = trial.curves(8e-3, [0, 1, 2])
    assert len({len(curve) for curve in curves}) == 1 and len(curves[0]) <= 7
    assert all(any(abs(run["l0"] / target - 1) < 0.17 for run in curves[0]) for target in (20, 40, 80))
    for curve in curves:
        assert [run["l0"] for run in curve] == sorted(run["l0"] for run in curve)
        for target in (20, 40, 80):
            assert trial.at_target(curve, "fvu", target) == pytest.approx(target**-0.6)


def result(*fvus):
    return {"at": {str(t): {"fvu": fvu, "delta_lm_loss": fvu} for t, fvu in zip((20, 40), fvus, strict=True)}}


def test_ratios_are_to_the_better_of_the_rivals():
    of_variant = {OURS: result(0.2, 0.1), "sae-lens": result(0.25, 0.08), "dictionary-learning": result(0.4, None),
                  "eai-sparsify": result(0.01, 0.01)}
    add_ratios(of_variant)
    assert of_variant[OURS]["at"]["20"]["fvu_ratio"] == pytest.approx(0.8)
    assert of_variant[OURS]["at"]["40"]["fvu_ratio"] == pytest.approx(1.25)
    assert of_variant["dictionary-learning"]["at"]["40"]["fvu_ratio"] is None
    alone = {OURS: result(0.2, 0.1), "sae-lens": {"absent": "not installed"}}
    add_ratios(alone)
    assert alone[OURS]["at"]["20"]["fvu_ratio"] is None and "at" not in alone["sae-lens"]


def test_a_point_of_the_frontier_is_compared_at_its_own_l0():
    def points(*pairs):
        return [{"l0": l0, "fvu": fvu} for l0, fvu in pairs]

    theirs = points((20, 0.2), (45, 0.4 / 3))
    for (l0, fvu), good in {(20.1, 0.19): True, (20.1, 0.21): False, (30, 0.1632): True, (30, 0.1634): False,
                            (15, 0.15): True, (15, 0.25): None, (50, 0.13): None, (50, 0.14): False}.items():
        point = {"l0": l0, "fvu": fvu}
        assert frontier.at_least_as_good(point, [point], theirs) is good, (l0, fvu)


def test_a_coefficient_that_was_not_searched_for_has_no_frontier(tmp_path):
    class Coefficients:
        def versions(self, name):
            return {name: "1"}

        def has(self, name, variant):
            return variant == "jumprelu"

        def control(self, name, variant):
            return {"control": "coefficient", "start": 1.0}

        def record(self, job):
            return {"l0": 30 / job.sparsity, "fvu": 0.1, "delta_lm_loss": 0.1, "seconds": 2.0, "lr": job.lr}

    args = argparse.Namespace(d_sae=8, batch=1, steps=1, seed=0, targets=[20, 40])
    assert frontier.measured(tmp_path / "summary.json") == {}
    with pytest.raises(contestants.PeerAbsent, match="its jumprelu has a coefficient and no target; let quality find"):
        frontier._frontier(Coefficients(), "x", {}, args)
    found = {("x", "jumprelu"): {"lr": 2e-3, "curve": [[0.3, 100.0], [3.0, 10.0]]}}
    result = frontier._frontier(Coefficients(), "x", found, args)
    assert [point["l0"] for point in result["points"]["jumprelu"]] == pytest.approx([20, 40])
    assert result["lr"] == {"jumprelu": 2e-3} and result["seconds"] == 4.0


# sae_zoo as a contestant, on activations of the built-in language model.


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(f"word {(i * j) % 17} is {j % 7} of {i}" for j in range(60)))
    lm = load_lm("builtin")
    spec = HarvestSpec(context_size=64, n_tokens={"train": 6000, "validation": 700, "test": 700}, dtype="float32",
                       rows_per_shard=4096, seed=0)
    caches = harvest(lm, "builtin", [resolve_hook(lm.model, "auto", 3, "residual")], TextFilesCorpus(paths=str(folder)),
                     spec, root=tmp_path_factory.mktemp("cache"), batch_size=16, progress_bar=False)
    return caches["residual.3"]


BASE = {"d_sae": 128, "batch": 128, "steps": 30}


def test_a_run_of_ours_is_scored_and_not_trained_twice(cache, tmp_path):
    with Bench(cache, tmp_path, tmp_path, threads=1) as bench:
        job = Job(contestant=OURS, variant="topk", seed=0, lr=2e-3, sparsity=8, **BASE)
        record = bench.record(job)
        assert record["l0"] == pytest.approx(8, abs=0.1) and 0 < record["fvu"] < 1 and record["seconds"] > 0
        assert 0 < record["fvu_validation"] < 1 and record["fvu_validation"] != record["fvu"]
        assert record["settings"]["lr"] == pytest.approx(2e-3)
        assert record["settings"]["n_steps"] == 30 and record["data_id"] == cache.data_id
        assert bench.record(replace(job, seed=1))["fvu"] != record["fvu"]
    (file,) = tmp_path.glob("sae_zoo-topk-lr-0.002-sparsity-8-seed-0-*.json")
    assert json.loads(file.read_text()) == record
    file.write_text(json.dumps(record | {"fvu": 0.5}))
    with Bench(cache, tmp_path, tmp_path, threads=1) as bench:
        assert bench.record(job)["fvu"] == 0.5  # read, not trained
        file.unlink()
        again = bench.record(job)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json"]  # nothing half-done stays


def test_the_recipes_other_rates_follow_the_grid():
    jobs = [Job(contestant=OURS, variant="jumprelu", seed=0, lr=lr, sparsity=8.5, **BASE) for lr in (None, 1e-4, 4e-4)]
    recipes = [contestants.our_settings(job).config["recipe"] for job in jobs]
    own, low, high = ({key: value for key, value in recipe.items() if key.endswith("lr")} for recipe in recipes)
    assert low["lr"] == pytest.approx(1e-4) and len(own) >= 2
    for key in own:
        assert high[key] == pytest.approx(4 * low[key]) and low[key] / low["lr"] == pytest.approx(own[key] / own["lr"])


def test_the_rows_of_the_peers_are_our_batches_in_our_order(cache, tmp_path):
    with Bench(cache, tmp_path, tmp_path, threads=1) as bench:
        job = Job(contestant="sae-lens", variant="topk", seed=3, lr=2e-3, sparsity=8, **BASE)
        rows = torch.from_numpy(np.load(bench._rows_file(job)))
        ours = torch.cat(list(cache.batches("train", 128, n_batches=30, seed=3)))
        assert torch.equal(rows, ours)
    assert not list(tmp_path.iterdir())


def test_quality_and_frontier_from_the_command_line(cache, tmp_path, capsys):
    shared = ["--cache", str(cache.path), "--d-sae", "128", "--batch", "128", "--steps", "30", "--threads", "1",
              "--json", "--contestants", "sae_zoo,sae-lens", "--peers-dir", str(tmp_path / "none"),
              "--targets", "6,9,14", "--out", str(tmp_path / "out")]
    main(["quality", *shared, "--variants", "topk", "--seeds", "0,1", "--lrs", "4e-3,2e-2,1e-1"])
    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    assert summary == json.loads((tmp_path / "out" / quality.SUMMARY).read_text())
    ours, peer = summary["variants"]["topk"][OURS], summary["variants"]["topk"]["sae-lens"]
    assert "not installed" in peer["absent"] and "sae-lens: absent, not installed" in printed
    by_lr = {float(lr): fvu for lr, fvu in ours["fvu_validation_by_lr"].items()}
    assert ours["lr"] == min(by_lr, key=by_lr.get) and ours["lr_at_edge"] == (ours["lr"] in (min(by_lr), max(by_lr)))
    fvus = [ours["at"][target]["fvu"] for target in ("6", "9", "14")]
    assert fvus == sorted(fvus, reverse=True) and len(ours["at"]["9"]["fvu_by_seed"]) == 2
    assert ours["at"]["9"]["fvu_ratio"] is None  # no rival is there
    assert 0 < ours["alive_share"] <= 1 and ours["defaults"]["settings"]["lr"] != ours["settings"]["lr"]

    main(["quality", *shared, "--variants", "topk", "--seeds", "0,1", "--lrs", "4e-3", "--contestants", "sae-lens"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary  # what was measured before stays

    n_files = len(list((tmp_path / "out").iterdir()))
    main(["frontier", *shared])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])["contestants"]
    assert result["sae-lens"]["absent"]
    assert len(list((tmp_path / "out").iterdir())) == n_files  # trained anew, elsewhere
    assert [len(points) for points in result[OURS]["points"].values()] == [3, 3]
    assert result[OURS]["lr"] == {"topk": ours["lr"], "jumprelu": None}
    assert "sae_zoo jumprelu: quality has not found its best rate; its default was used" in printed


def test_the_cache_is_found_or_named(cache, tmp_path):
    assert find_cache(None, cache.path.parent).cache_id == cache.cache_id
    assert find_cache(str(cache.path)).cache_id == cache.cache_id
    with pytest.raises(ValueError, match=r"there is no cache in .*make the README's by"):
        find_cache(None, tmp_path)
    (tmp_path / "a").symlink_to(cache.path)
    (tmp_path / "b").symlink_to(cache.path)
    with pytest.raises(ValueError, match=r"holds 2 caches \(a, b\); choose one with --cache"):
        find_cache(None, tmp_path)


def test_another_language_models_cache_is_refused(cache, tmp_path):
    cache.manifest["identity"]["lm"], was = "another", cache.manifest["identity"]["lm"]
    try:
        with pytest.raises(ValueError, match="is not of the built-in language model"):
            Bench(cache, tmp_path, tmp_path, threads=1)
    finally:
        cache.manifest["identity"]["lm"] = was
