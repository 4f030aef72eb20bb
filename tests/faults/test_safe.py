"""Safe by default: nothing on disk or on a command line makes the program run something else, or write elsewhere."""

import ast
import re
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo import evaluate, harvest, pretrain, train
from sae_zoo.config import CONFIG_DIR
from sae_zoo.data.cache import make_cache_id

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("sae_zoo", "analysis", "benchmarks") for path in (ROOT / room).rglob("*.py")]


def calls(path):
    """(dotted name, keyword arguments as source) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_or_made_from_a_name(path):
    for name, keywords in calls(path):
        last = name.split(".")[-1]
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", name
        if name.split(".")[0] in ("np", "numpy") and last == "load":
            assert keywords.get("allow_pickle", "False") == "False", name
        if last == "load_dataset" or last == "from_pretrained":
            assert keywords.get("trust_remote_code", "False") == "False"
        assert last not in ("read_pickle", "instantiate") and name not in ("eval", "exec"), name
        assert name not in ("pickle.load", "pickle.loads", "dill.load", "joblib.load", "torch.hub.load",
                            "torch.jit.load", "load_from_checkpoint"), name


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_config_names_a_class(path):
    assert not re.search(r"\b_target_\b", path.read_text())


@pytest.mark.parametrize("module", [train, harvest, pretrain, evaluate], ids=lambda m: m.__name__)
@pytest.mark.parametrize("override", ["+x._target_=os.system", "sae._target_=os.system",
                                      "+hydra.callbacks.x={_target_: subprocess.call, args: [touch]}"])
def test_target_is_refused(module, override, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", override])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and f"error: {override} is refused" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [train, harvest, pretrain, evaluate], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("where", "text"), [
    ("hydra/launcher/evil.yaml", "_target_: subprocess.call"),
    ("experiment/evil.yaml", "hydra:\n  callbacks:\n    x: {'_target_' : \"os.system\", command: touch x}"),
    ("evil.yaml", "x:\n  - \"_tar\\u0067et_\": hydra.utils.get_method"),
    ("evil.yaml", "hydra:\n  searchpath: ['file:///tmp']"),
])
@pytest.mark.parametrize("flag", ["--config-dir=more", "-cd=more", "--config-path={path}"])
def test_a_folder_of_configs_that_name_a_class_is_refused(module, where, text, flag, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "more" / where
    file.parent.mkdir(parents=True)
    file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["x", flag.format(path=tmp_path / "more")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"{where} is refused" in error
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_a_folder_of_configs_of_ones_own_is_read(monkeypatch, capsys, tmp_path):
    """Beside a sweep's multirun.yaml, in which Hydra names its own launcher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more/experiment").mkdir(parents=True)
    (tmp_path / "more/experiment/mine.yaml").write_text("# @package _global_\nl0_target: -7")
    (tmp_path / "more/multirun.yaml").write_text(
        "hydra:\n  launcher:\n    _target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher")
    monkeypatch.setattr(sys, "argv", ["x", "--config-dir=more", "experiment=mine", f"output_dir={tmp_path / 'out'}"])
    with pytest.raises(SystemExit):
        train.main()
    assert "l0_target is -7" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--experimental-rerun=config.pickle", "hydra.searchpath=[file:///tmp]"])
def test_pickles_and_search_paths_are_refused(argument, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", argument])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "refused" in error


def test_a_value_that_only_looks_like_it_is_not_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "sae.sparsity_loss=l0_target_gemma_scope_2", "lm=banana"])
    with pytest.raises(SystemExit):
        train.main()
    assert "refused" not in capsys.readouterr().err


NAMES = st.one_of(st.sampled_from(["..", ".", "../../x", "/etc/x", "a/../../..", "...", "a/b", "~", "é" * 200, ""]),
                  st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12))


def quoted(text):
    """As the value of an override."""
    return "'" + re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", text) + ("'" if not text.endswith("\\") else "\\'")


def folder(entry, overrides):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(entry, overrides, return_hydra_config=True)
    return Path(cfg.hydra.run.dir)


@settings(max_examples=40, deadline=None)
@given(name=NAMES, key=st.sampled_from(["sweep", "sae.name", "lm.name", "hook.site", "seed", "recipe.lr"]))
def test_names_from_the_config_stay_below_the_output_directory(name, key):
    run_dir = folder("train", [f"{key}={quoted(name)}", "output_dir=/o"])
    assert len(run_dir.parts) == 5 and run_dir.parts[:3] == ("/", "o", "runs")
    assert not {".", ".."} & set(run_dir.parts[3:]) and all(len(part) <= 255 for part in run_dir.parts)


@settings(max_examples=25, deadline=None)
@given(name=NAMES)
def test_the_name_of_a_pretrained_model_and_of_a_cache_stay_there_too(name):
    assert folder("pretrain", [f"name={quoted(name)}", "output_dir=/o"]).parent == Path("/o/lm")
    cache_id = make_cache_id(lm=name, hook=name, identity={})
    assert Path("/o", cache_id).resolve().parent == Path("/o") and "/" not in cache_id
