"""The files of conf/experiment: every job of every one composes, has a name of its own and is known to the claims."""

import copy
import itertools
import json
import math
import re
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict, read_write

from analysis.claims.ablations import CHECKS
from analysis.claims.evidence import Evidence
from analysis.claims.finding import HOLDS
from sae_zoo import train
from sae_zoo.config import CONFIG_DIR, compose_config, plain
from sae_zoo.data.cache import open_cache
from sae_zoo.functional.kernel_widths import KERNEL_STD
from sae_zoo.records import RECORD, read_record
from sae_zoo.running import job as running_job
from sae_zoo.running.settings import TrainSettings

FILES = {path.stem: path for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml"))}
# Axes whose values stand at the top of a config and that nothing else there depends on.
PLAIN = ("seed", "l0_target", "hook", "hook.site", "hook.layer")


@cache
def composed(name, *overrides):
    """What the sweep of ``experiment=name`` composes, for each job: its config, the same without Hydra's part, what is
    to be set in both, all its overrides.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", [f"experiment={name}", *overrides], run_mode=RunMode.MULTIRUN)
        assert master.hydra.mode == RunMode.MULTIRUN
        params = [f"{key}={value}" for key, value in master.hydra.sweeper.params.items()]
        parser = OverridesParser.create(loader)
        parsed = parser.parse_overrides([*params, f"experiment={name}", *overrides])
        (argument_lists,) = BasicSweeper.split_arguments(parsed, None)
        configs, found = {}, []
        for arguments in argument_lists:
            # Composing takes a tenth of a second, so it is done once for each choice of what other values depend on.
            plain = tuple(a for a in arguments if a.split("=")[0] in PLAIN)
            choice = tuple(a for a in arguments if a not in plain)
            if choice not in configs:
                config = loader.load_sweep_config(master, arguments)
                task = copy.deepcopy(config)
                with read_write(task), open_dict(task):
                    del task["hydra"]
                configs[choice] = config, task
            values = [(override.key_or_group, override.value()) for override in parser.parse_overrides(plain)]
            found.append((*configs[choice], values, arguments))
        return found


def jobs(name, *overrides):
    """(config, config of its task) of every job of ``experiment=name``; valid until the next is asked for."""
    for config, task, values, arguments in composed(name, *overrides):
        for key, value in values:
            OmegaConf.update(config, key, value)
            OmegaConf.update(task, key, value)
        with read_write(config.hydra):
            config.hydra.overrides.task = arguments
        yield config, task


def test_the_shortcut_gives_what_hydra_composes():
    for name, number in (("bandwidth", 7), ("bandwidth", 100), ("frontier", 777)):
        config, task = next(itertools.islice(jobs(name), number, None))
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            master = loader.load_configuration("train", [f"experiment={name}"], run_mode=RunMode.MULTIRUN)
            own = loader.load_sweep_config(master, OmegaConf.to_container(config.hydra.overrides.task))
            assert (own.hydra.sweep.dir, own.hydra.sweep.subdir) == (config.hydra.sweep.dir, config.hydra.sweep.subdir)
            own = OmegaConf.to_container(own)
            del own["hydra"]
            assert own == OmegaConf.to_container(task)


@pytest.mark.parametrize("name", FILES)
def test_head_tells_the_command_and_the_number_of_runs(name):
    head = [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]
    assert head[0] == "# @package _global_" and head[1] == f"# python -m sae_zoo.train experiment={name}"
    ((n_runs, product),) = re.findall(r"(\d+) runs: (.*?)[.;]", " ".join(line[2:] for line in head[2:]))
    factors = re.findall(r"\d+|with and without|without and with", product)
    assert int(n_runs) == len(composed(name)) == math.prod(int(f) if f.isdecimal() else 2 for f in factors)


@pytest.mark.parametrize("name", FILES)
def test_every_job_builds_its_sae_and_has_a_folder_of_its_own(name):
    folders = defaultdict(set)
    for config, task in jobs(name):
        if config.seed == 0:
            assert TrainSettings.of(plain(task)).recipe.n_steps == config.recipe.n_steps
        folder, job = config.hydra.sweep.dir, config.hydra.sweep.subdir
        hook = f"{config.hook.site}.{config.hook.layer}"
        assert folder == f"outputs/runs/{name}/{config.lm.name}-{hook}"
        assert len(job) <= 100 and job not in folders[folder], "two jobs with one folder"
        folders[folder].add(job)
        together = config.hook.harvest_together
        if together is not None:
            assert config.hook.layer in together.layers and config.hook.site in together.sites
    assert len({frozenset(own) for own in folders.values()}) == 1 and (len(folders) > 1) == (together is not None)


@pytest.mark.parametrize("name", FILES)
def test_labels_are_the_arms(name):
    """One curve a label in the frontier's table: runs of a label and target differ in their seed alone."""
    curves = defaultdict(set)
    for config, _ in jobs(name):
        sae = OmegaConf.to_container(config.sae, resolve=True)
        recipe = OmegaConf.to_container(config.recipe, resolve=True)
        coefficient = sae.pop("sparsity_coefficient", None)
        curves[sae.pop("name")].add(json.dumps([sae, recipe]))
        assert coefficient is None or coefficient > 0
    assert all(len(configs) == 1 for configs in curves.values())
    if not name.startswith("frontier"):
        assert not set(curves) & {"jumprelu", "topk", "relu", "gated"}, "an ablation in an arm of the main comparison"


def test_an_axis_on_the_command_line_takes_the_place_of_the_files():
    found = [(c.sae.name, c.l0_target, c.hydra.sweep.dir) for c, _ in jobs(
        "frontier", "sae=topk", "l0_target=20,40", "seed=0", "hook.layer=3", "d_sae=512")]
    assert found == [("topk", target, f"outputs/runs/frontier/builtin-{site}.3-d_sae=512")
                     for site in ("residual", "mlp", "attention") for target in (20, 40)]
    named = jobs("kernels", "sweep=mine", "seed=0", "l0_target=20", "sae.kernel=gaussian,triangle")
    assert {config.hydra.sweep.dir for config, _ in named} == {"outputs/runs/mine/builtin-residual.3"}
    assert compose_config("train", ["experiment=kernels", "sae.kernel=gaussian"])["sae"]["bandwidth"] == 0.00288675


def test_kernels_have_one_standard_deviation():
    bandwidth = {config.sae.kernel: config.sae.bandwidth for config, _ in jobs("kernels")}
    assert bandwidth.keys() == KERNEL_STD.keys()
    assert bandwidth["rectangle"] == compose_config("train", [])["sae"]["bandwidth"], "not the default's any more"
    for kernel, std in KERNEL_STD.items():
        assert bandwidth[kernel] * std == pytest.approx(bandwidth["rectangle"] * KERNEL_STD["rectangle"], rel=1e-5)


# What the claims make of records whose every setting comes from the configs.


def fvu_scale(config):
    """Known answers: which arms are worse, and by what share."""
    sae = config.sae
    worse = {"relu_l1": 1.5, "relu_l0": 1.4, "jumprelu_l1": 1.3}.get(f"{sae.variant}_{sae.get('penalty')}", 1.0)
    worse *= 1.2 if sae.get("ste_into_pre_acts") else 1.0
    return worse * {0.001: 1.3, 0.1: 1.5}.get(sae.bandwidth, 1.0)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The claims on what a sweep of each ablation would write, and on JumpReLU's part of the frontier."""
    root, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    measured = {}  # by what was trained: the same run in two sweeps has the same numbers
    for name in ("bandwidth", "kernels", "sparsity_loss", "activation_penalty", "ste_into_pre_acts", "frontier"):
        for i, (config, task) in enumerate(jobs(name)):
            if name == "frontier" and (task.sae.name, task.hook.site, task.hook.layer) != ("jumprelu", "residual", 3):
                continue
            identity = running_job._identity(plain(task))
            trained = json.dumps({key: value for key, value in identity.items() if key not in ("label", "config_hash")})
            if trained not in measured:
                l0 = config.l0_target * math.exp(0.005 * rng.normal())
                measured[trained] = {"l0": l0, "fvu": 2 * fvu_scale(config) * l0**-0.7 * math.exp(0.002 * rng.normal())}
            record = {**identity, **measured[trained], "status": "finished", "error": None, "data_id": identity["hook"],
                      "d_in": 256, "seconds": float(rng.random())}
            (root / name / str(i)).mkdir(parents=True)
            (root / name / str(i) / RECORD).write_text(json.dumps(record))
    evidence = Evidence([root])
    return {claim: check.judge(evidence) for claim, check in CHECKS.items()}


def test_claims_know_the_arms_of_the_bandwidth(findings):
    found = findings["C10"]
    assert found.verdict == HOLDS and found.details["by_bandwidth"].keys() == {"0.001", "0.003", "0.01", "0.03", "0.1"}
    for bandwidth, ratio in {"0.001": 1.3, "0.01": 1.0, "0.1": 1.5}.items():
        assert found.details["by_bandwidth"][bandwidth]["effect"] == pytest.approx(ratio, rel=0.01)
    assert found.n_runs == 135 + 9  # of residual.3 in frontier three targets more; the other three are the same runs


def test_claims_know_the_arms_of_the_kernels(findings):
    found = findings["C11"]
    assert found.verdict == HOLDS and found.details["by_kernel"].keys() == KERNEL_STD.keys() - {"rectangle"}
    assert found.n_runs >= 36


def test_claims_know_the_arms_of_the_target_loss(findings):
    found = findings["C12"]
    assert found.verdict == HOLDS and 0 < found.effect < 0.01 and found.n_runs >= 30
    assert found.details["fvu_ratio"]["effect"] == pytest.approx(1, abs=0.01)


def test_claims_know_the_arms_of_activation_penalty_and_ste(findings):
    found = findings["C13"]
    assert found.verdict == HOLDS
    effects = {name: own["effect"] for name, own in found.details["ratios"].items()}
    expected = {"ste_into_pre_acts": 1.2, "jumprelu_l1": 1.3, "relu_l0": 1.4, "relu_l1": 1.5}
    assert effects == pytest.approx(expected, rel=0.01)


# The real thing.


@pytest.fixture
def run(enter):
    def call(*overrides):
        status, out, err = enter(train, *overrides)
        return status, out + err

    return call


def test_one_command_sweeps_several_hook_points_in_one_pass(run, tmp_path):
    command = ["experiment=bandwidth", "seed=0", "l0_target=10", "sae.bandwidth=0.02",
               "hook={site:residual,layer:3},{site:mlp,layer:1}",
               "hook.harvest_together={layers: [1, 3], sites: [residual, mlp]}", f"output_dir={tmp_path}", "d_sae=128",
               "data.n_tokens={train: 3000, validation: 500, test: 500}", "recipe.n_steps=10", "recipe.batch_size=64",
               "evaluation.n_lm_tokens=256", "trainer.progress_bar=false"]
    status, printed = run(*command)
    assert status == 0, printed
    folders = sorted(path.parents[1] for path in (tmp_path / "runs/bandwidth").glob(f"*/*/{RECORD}"))
    assert [folder.name.split("-")[1] for folder in folders] == ["mlp.1", "residual.3"]
    job = "jumprelu_bandwidth_0.02-l0_10-seed_0-sae.bandwidth=0.02"
    for folder in folders:
        record = read_record(folder / job)
        assert record["status"] == "finished" and record["error"] is None
        assert (record["label"], record["sae.bandwidth"]) == ("jumprelu_bandwidth_0.02", 0.02)
        assert (folder / "frontier.png").exists() and str(folder / "frontier.png") in printed
    assert printed.count("harvesting") == 1 and "harvesting residual.3, residual.1, mlp.1, mlp.3 of" in printed
    caches = [open_cache(path.parent) for path in (tmp_path / "cache").glob("*/manifest.json")]
    assert {cache.cache_id.split("-")[1] for cache in caches} == {"residual.1", "residual.3", "mlp.1", "mlp.3"}
    status, printed = run(*command)
    assert status == 0 and printed.count("is finished; skipped") == 2 and "harvesting" not in printed


def test_an_experiment_that_is_not_there_is_one_line(run):
    status, printed = run("experiment=banana")
    (line,) = [line for line in printed.splitlines() if line.startswith("sae_zoo.train: error: ")]
    assert status == 2 and "experiment/banana" in line and "frontier" in line and "Traceback" not in printed
