"""The latent browser's content and file, without a browser; test_dashboard_page.py has one."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from analysis.dashboard.__main__ import main
from analysis.dashboard.content import gather
from analysis.dashboard.frontier import frontier
from analysis.dashboard.page import render
from analysis.latents import open_runs
from sae_zoo.config import compose_config
from sae_zoo.records import read_record
from sae_zoo.running.job import run_job
from sae_zoo.running.settings import TrainSettings


def data_of(page):
    """The content that is inside a page."""
    (data,) = re.findall(r'<script type="text/plain" id="data">([A-Za-z0-9+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture(scope="module")
def runs(trained):
    return open_runs([trained / "jumprelu", trained / "topk"])


@pytest.fixture(scope="module")
def content(runs):
    return gather(runs, n_latents=200)


def test_every_latent_is_listed_and_a_bounded_number_has_details(runs, content):
    for part, run in zip(content["runs"], runs, strict=True):
        assert part["metrics"]["fvu"] == run.record["fvu"] and part["n_tokens"] == run.record["n_eval_tokens"]
        assert len(part["frequency"]) == len(part["max"]) == len(part["mean"]) == len(part["promoted"]) == 512
        assert sum(part["frequency"]) == pytest.approx(run.record["l0"], rel=5e-3)
        assert len(part["details"]) == 100 and all(part["frequency"][latent] > 0 for latent in part["details"])
        assert "100 of the " in part["notes"][0]
        for latent, details in part["details"].items():
            assert sum(details["counts"]) == pytest.approx(part["frequency"][latent] * part["n_tokens"], rel=5e-3)
            kind, at, tokens, on, values = details["contexts"][0]
            assert kind == 0 and values[on.index(at)] == part["max"][latent]
            (promoted, effects), (suppressed, _) = details["effects"]
            assert promoted[:4] == part["promoted"][latent] and len(suppressed) == len(effects) == 10
            assert max(*tokens, *promoted, *suppressed) < len(content["tokens"])
    assert "after those that are nearest to the first run's" in content["runs"][1]["notes"][0]


def test_the_second_run_shows_what_the_first_one_is_compared_with(runs, content):
    a, b = (run.sae.W_dec.numpy() for run in runs)
    cosines = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    first, second = content["runs"]
    for latent, details in first["details"].items():
        ids, near = details["nearest"][1]
        assert ids == np.argsort(-cosines[latent])[:3].tolist()
        np.testing.assert_allclose(near, -np.sort(-cosines[latent])[:3], rtol=5e-3)
        assert second["frequency"][ids[0]] == 0 or ids[0] in second["details"]
    for latent, details in second["details"].items():
        assert details["nearest"][0][0] == np.argsort(-cosines[:, latent])[:3].tolist()


def test_details_of_all_latents_if_there_is_room(runs):
    (part,) = gather(runs[:1], n_latents=8192)["runs"]
    assert list(part["details"]) == [i for i, frequency in enumerate(part["frequency"]) if frequency]
    assert part["notes"] == [] and "nearest" not in next(iter(part["details"].values()))
    # A page of a default run (4,096 latents) has to stay below 10 MB, one of two as well.
    assert len(render({"runs": [part]})) / len(part["details"]) < 1100


@pytest.mark.parametrize("n", [1, 0, -5])
def test_too_few_latents_are_refused(runs, n):
    with pytest.raises(ValueError, match=f"--latents is {n}; it must be at least 1 for each of the 2 runs"):
        gather(runs, n_latents=n)


# The frontier.


def record(label, target, seed=0, **values):
    return {"status": "finished", "error": None, "variant": label, "label": label, "l0_target": target, "seed": seed,
            "l0": target * 1.01, "fvu": 1 / target, "delta_lm_loss": 2 / target, "lm": "x", "hook": "residual.3",
            "data_id": "d", "d_in": 4, "d_sae": 8, "n_tokens": 9, **values}


def test_the_frontier_is_that_of_the_whole_sweep(sweep):
    folder = sweep(*(record("topk", target, seed, fvu=(1 + seed) / target) for target in (10, 20) for seed in (0, 1)),
                   record("relu", 10), record("relu", 20, status="failed"), record("topk", 40, d_sae=16),
                   record("gated", 10, delta_lm_loss=None))
    shown = [{**read_record(folder / job), "run_dir": str(folder / job)} for job in ("job002", "job004")]
    found = frontier(shown)
    assert [panel["title"] for panel in found["panels"]] == ["delta LM loss (nats per token)", "FVU"]
    delta, fvu = found["panels"]
    assert {(p["name"], p["shown"]) for p in fvu["points"]} == {
        ("sweep/job000", None), ("sweep/job001", None), ("sweep/job002", 0), ("sweep/job003", None),
        ("sweep/job004", 1), ("sweep/job007", None)}
    assert "sweep/job007" not in {p["name"] for p in delta["points"]}
    assert fvu["lines"]["topk"] == [pytest.approx((10.1, 0.15)), pytest.approx((20.2, 0.075))]
    assert found["styles"]["topk"] == {"color": "#D55E00", "marker": "^"}
    assert set(found["styles"]) == {"topk", "relu", "gated"}


# The file.


class Elements(HTMLParser):
    """The names of a page's elements, and what would make a browser load something."""

    def __init__(self, page):
        super().__init__()
        self.names, self.loads = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "data", "action")
                       or (name == "href" and not value.startswith("#"))]


def test_text_from_a_corpus_is_never_mark_up(content):
    hostile = ['</script><script>alert(1)</script>', '<img src="http://x.invalid/">', "{{script}}", "\u2028"]
    page = render({**content, "tokens": hostile * len(content["tokens"]), "where": "<b>" + hostile[0]})
    harmless = render({"runs": []})
    assert Elements(page).names == Elements(harmless).names and Elements(page).loads == []
    assert data_of(page)["tokens"][:4] == hostile and data_of(page)["where"].startswith("<b></script>")
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page


def test_the_command_writes_one_file(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(trained / "topk"), "--latents", "5"])
    file = trained / "topk" / "dashboard.html"
    assert capsys.readouterr().out == f"{file}  ({file.stat().st_size / 1e6:.1f} MB)\n"
    first = file.read_text()
    assert len(data_of(first)["runs"][0]["details"]) == 5
    main([str(trained / "topk"), "--latents", "5", "--output", "again.html"])
    assert (tmp_path / "again.html").read_text() == first
    file.unlink()


@pytest.mark.parametrize("arguments, message", [
    ([], "required: RUN"), (["."], ". holds no record.json"), (["nowhere"], "nowhere is no folder"),
    (["{topk}", "--latents", "0"], "--latents is 0"), (["{topk}", "--latents", "many"], "invalid int"),
    (["{topk}", "--output", "no/such/folder.html"], "no/such is no folder; make it first"),
])
def test_a_mistake_is_one_line(trained, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(topk=trained / "topk") for argument in arguments])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert len(printed.err.splitlines()) == 1 and message in printed.err


def test_a_run_on_a_users_file_has_no_text_and_says_so(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "acts.npy", (rng.random((5000, 30)) < 0.1).astype("float32") @ rng.normal(size=(30, 16)))
    folder = tmp_path / "runs" / "mine" / "topk"
    folder.mkdir(parents=True)
    run_job(TrainSettings.of(compose_config("train", [
        "data=file", f"data.path={tmp_path / 'acts.npy'}", "sae=topk", "l0_target=4", "d_sae=64", "recipe.n_steps=40",
        f"output_dir={tmp_path}", "trainer.progress_bar=false"])), folder)
    found = gather(open_runs([folder]), n_latents=100)
    (part,) = found["runs"]
    assert part["notes"] == ["These activations came from a file, without their text: there are no contexts and no "
                             "tokens."]
    assert part["promoted"] is None and found["tokens"] == [] and found["where"].startswith("file-")
    assert [panel["title"] for panel in found["frontier"]["panels"]] == ["FVU"]
    details = next(iter(part["details"].values()))
    assert details["contexts"] == [] and details["effects"] is None and sum(details["counts"]) > 0
