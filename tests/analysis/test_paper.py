"""The paper's figures on records written by hand: what is drawn, what is left out and said, what is refused."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from analysis.paper import FIGURES, NotMeasured, draw_paper, load_runs
from analysis.paper.__main__ import main
from analysis.paper.curves import METRICS, draw_curves, notes_on_curves
from sae_zoo.frontier.style import STYLES, styles

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("gated", "gated_ri_l1", "jumprelu", "relu", "topk")
HOOKS = tuple(f"{site}.{layer}" for site in ("residual", "mlp", "attention") for layer in (1, 3, 5))


def record(label="topk", target=20, seed=0, hook="residual.3", **values):
    by = random.Random(f"{label} {target} {seed} {hook}").uniform
    scale = (1 + LABELS.index(label) if label in LABELS else 1.5) * by(0.95, 1.05)
    return {
        "status": "finished", "error": None, "variant": label.split("_")[0], "label": label, "l0_target": target,
        "sparsity_coefficient": None, "l0": target * by(0.98, 1.02), "l0_missed": False, "fvu": scale * target**-0.5,
        "delta_lm_loss": 4 * scale / target, "relative_reconstruction_bias": by(0.9, 1.01),
        "fraction_above_1pct": 2e-3 * target * by(0.9, 1), "fraction_above_10pct": 2e-4 * target * by(0.9, 1),
        "dead_fraction": by(0, 0.1), "r_l0": by(0.3, 0.7), "seconds_training": by(60, 90), "d_in": 64, "d_sae": 4096,
        "n_tokens": 1_000_000, "seed": seed, "lm": "builtin", "hook": hook, "data_id": f"data {hook}", **values,
    }


def grid(labels=("jumprelu", "topk"), targets=(10, 40, 160), seeds=(0, 1), hooks=("residual.3",), **values):
    return [record(v, t, s, h, **values) for h in hooks for v in labels for t in targets for s in seeds]


def panels(figure):
    """title -> axes of each panel."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curves_of(axes):
    """label -> (points of its line, its markers), found by colour alone."""
    found = {}
    for label, style in STYLES.items():
        own = [line for line in axes.lines if line.get_color() == style.color]
        points = [list(zip(*line.get_data(), strict=True)) for line in own if line.get_linestyle() == "-"]
        markers = [list(zip(*line.get_data(), strict=True)) for line in own if line.get_marker() == style.marker]
        if own:
            found[label] = (*points, *markers)
    return found


@pytest.mark.parametrize("key", METRICS)
def test_every_run_is_a_marker_and_lines_go_through_means(sweep, key):
    hooks = ("residual.3", "mlp.1")
    records = grid(LABELS, hooks=hooks)
    figure = draw_curves(load_runs([sweep(*records)]), key)
    assert set(panels(figure)) == {"residual, layer 3", "mlp, layer 1"}
    for hook, title in zip(hooks, ("residual, layer 3", "mlp, layer 1"), strict=True):
        axes = panels(figure)[title]
        assert axes.get_xscale() == "log"
        assert axes.get_yscale() == {"delta_lm_loss": "log", "fvu": "log", "fraction_above_1pct": "log",
                                     "fraction_above_10pct": "log"}.get(key, "linear")
        drawn = curves_of(axes)
        assert set(drawn) == set(LABELS)
        for label, (line, markers) in drawn.items():
            own = [r for r in records if r["label"] == label and r["hook"] == hook]
            assert sorted(markers) == sorted((r["l0"], r[key]) for r in own)
            at = [[r for r in own if r["l0_target"] == target] for target in (10, 40, 160)]
            assert np.allclose(line, [(np.mean([r["l0"] for r in rs]), np.mean([r[key] for r in rs])) for rs in at])
        for x, y in (point for line, markers in drawn.values() for point in markers):
            assert axes.get_xlim()[0] < x < axes.get_xlim()[1] and axes.get_ylim()[0] <= y < axes.get_ylim()[1]


def test_panels_stand_by_site_and_layer_and_share_axes(sweep):
    hooks = ["my_site.3", "attention.10", "mlp.3", "residual.10", "attention.3", "residual.9", "residual.3"]
    figure = draw_curves(load_runs([sweep(*grid(seeds=(0,), hooks=hooks))]), "fvu")
    at = panels(figure)
    rows = [["residual, layer 3", "residual, layer 9", "residual, layer 10"], ["mlp, layer 3"],
            ["attention, layer 3", "attention, layer 10"], ["my_site, layer 3"]]
    assert list(at) == [title for row in rows for title in row]
    tops = [{round(at[title].get_position().y1, 6) for title in row} for row in rows]
    assert all(len(top) == 1 for top in tops) and [max(top) for top in tops] == sorted(map(max, tops), reverse=True)
    left = {layer: {round(axes.get_position().x0, 6) for title, axes in at.items() if title.endswith(f" {layer}")}
            for layer in (3, 9, 10)}
    assert all(len(x) == 1 for x in left.values()) and max(left[3]) < max(left[9]) < max(left[10])
    assert len({axes.get_xlim() for axes in at.values()}) == 1
    for row in rows:
        assert len({at[title].get_ylim() for title in row}) == 1
    numbered = [title for title, axes in at.items() if axes.yaxis.get_tick_params()["labelleft"]]
    assert numbered == [row[0] for row in rows]
    numbered = {title for title, axes in at.items() if axes.xaxis.get_tick_params()["labelbottom"]}
    assert numbered == {"residual, layer 9", "attention, layer 10", "my_site, layer 3"}


def test_shares_are_in_percent_and_zero_is_drawn(sweep):
    records = [record("topk", 10, fraction_above_10pct=0.0), record("topk", 40), record("topk", 160)]
    runs = load_runs([sweep(*records)])
    axes = draw_curves(runs, "fraction_above_10pct").axes[0]
    assert curves_of(axes)["topk"][1][0] == (records[0]["l0"], 0.0)
    assert axes.get_yscale() == "symlog" and axes.get_ylim()[0] == 0
    ticks = axes.get_yticks()
    labels = [axes.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert labels[0] == "0"
    assert [float(label) for label in labels] == pytest.approx([100 * t for t in ticks])
    assert notes_on_curves(runs) == []


def test_a_metric_that_no_run_has_is_not_drawn_and_the_reason_said(sweep, tmp_path):
    records = grid(r_l0=None, delta_lm_loss=-0.1)
    for r in records:
        del r["seconds_training"]
    result = draw_paper([sweep(*records)], tmp_path / "figures")
    lines = result.text.splitlines()
    assert "fig_r_l0: not drawn: no run has r_l0" in lines
    assert "fig_delta_lm_loss: not drawn: no run has delta_lm_loss above 0" in lines
    assert "fig_cost: not drawn: no run has seconds_training" in lines
    assert "fig_frequencies: not drawn: no latents.csv beside the records of L0 target 40" in lines
    assert ("fig_thresholds: not drawn: no thresholds.json beside the records; "
            "python -m analysis.thresholds RUN writes it") in lines
    assert set(result.files) == set(FIGURES) - {"r_l0", "delta_lm_loss", "cost", "frequencies", "thresholds"}
    drawn = {f"fig_{name}.{suffix}" for name in result.files for suffix in ("png", "svg")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == drawn


def test_a_metric_that_some_runs_lack_is_drawn_where_it_is_and_the_rest_said(sweep):
    records = grid(["topk"], hooks=("residual.1", "residual.3"))
    records[0]["r_l0"] = None  # a seed of the first target
    for r in records[6:]:
        del r["r_l0"]  # all of the second place
    runs = load_runs([sweep(*records)])
    (axes,) = draw_curves(runs, "r_l0").axes
    assert axes.get_title(loc="left") == "residual, layer 1"
    line, markers = curves_of(axes)["topk"]
    assert len(line) == 2 and len(markers) == 5  # no mean of one seed beside means of two
    (note,) = notes_on_curves(runs)
    assert "r_l0 is missing in 7 of 12 runs" in note and "sweep/job000, sweep/job006" in note and "3 more" in note


def test_failed_runs_are_left_out_and_said(sweep, tmp_path):
    records = grid(["topk"])
    failed = record("topk", 80, status="failed", error="loss is\nNaN", lm=None, hook=None, d_sae=None, l0=None)
    runs = load_runs([sweep(*records, failed)])
    assert len(runs.finished) == 6 and runs.failed == ["sweep/job006: loss is NaN"]
    text = draw_paper([tmp_path / "sweep"], tmp_path / "figures").text
    assert text.endswith("failed (1):\n  sweep/job006: loss is NaN")


@pytest.mark.parametrize(("key", "other", "hook"), [
    ("lm", "gemma2_2b", "mlp.1"), ("d_sae", 8192, "mlp.1"), ("n_tokens", 2_000_000, "mlp.1"),
    ("data_id", "other", "residual.3"), ("d_in", 128, "residual.3"), ("lm", None, "residual.3")])
def test_incompatible_runs_are_refused_with_the_reason(sweep, key, other, hook):
    with pytest.raises(ValueError, match=f"{key} differs: ") as error:
        load_runs([sweep(record(), record("jumprelu", hook=hook, **{key: other}))])
    assert f"{key} differs: " in str(error.value)
    assert f"{record()[key]} (sweep/job000)" in str(error.value) and f"{other} (sweep/job001)" in str(error.value)
    assert "\n" not in str(error.value)


def test_places_may_have_data_and_widths_of_their_own(sweep):
    records = [record(hook="residual.3", d_in=64), record(hook="attention.3", d_in=128, data_id="another")]
    assert list(load_runs([sweep(*records)]).places) == [("residual", 3), ("attention", 3)]


def test_a_hook_that_is_no_site_and_layer_is_refused(sweep):
    with pytest.raises(ValueError, match=r"hook of sweep/job000 is 'residual'; <site>\.<layer> is expected"):
        load_runs([sweep(record(hook="residual"))])


def test_activations_without_a_language_model_are_one_panel(sweep):
    runs = load_runs([sweep(*grid(hooks=(None,), lm=None, data_id="d1", delta_lm_loss=None))])
    assert list(runs.places) == [("", 0)] and runs.setting.startswith("data d1")
    assert draw_curves(runs, "fvu").axes[0].get_title(loc="left") == ""
    with pytest.raises(NotMeasured):
        draw_curves(runs, "delta_lm_loss")


def test_a_curve_is_of_the_config_of_most_runs(sweep):
    main = grid(["jumprelu"], **{"sae.kernel": "rectangle", "recipe.lr": 1e-3})
    ablation = grid(["jumprelu"], targets=(20, 40), **{"sae.kernel": "gaussian", "recipe.lr": 1e-3})
    other = grid(["topk"], **{"sae.auxk_coefficient": 0.03, "recipe.lr": 2e-3})
    runs = load_runs([sweep(*main, *ablation, *other)])
    line, markers = curves_of(draw_curves(runs, "fvu").axes[0])["jumprelu"]
    assert len(line) == 3 and sorted(markers) == sorted((r["l0"], r["fvu"]) for r in main)
    (note,) = runs.notes
    assert "jumprelu have 2 configs, which differ in sae.kernel; that of 6 runs is drawn, 4 are not" in note
    assert "sweep/job006, " in note and "sweep/job005" not in note
    assert note in draw_paper([runs.directories[0]]).text


def test_configs_of_as_many_runs_are_refused(sweep):
    kernels = [record("jumprelu", 20, **{"sae.kernel": name}) for name in ("rectangle", "gaussian")]
    with pytest.raises(ValueError, match=r"jumprelu have 2 configs, which differ in sae\.kernel; none is that of most"):
        load_runs([sweep(*kernels)])


def test_runs_that_differ_in_more_than_their_seed_are_not_joined(sweep):
    runs = load_runs([sweep(record("topk", 20), record("topk", 20, fvu=0.5, l0=21.0), record("topk", 40))])
    own = [line for line in draw_curves(runs, "fvu").axes[0].lines if line.get_color() == STYLES["topk"].color]
    assert [line.get_linestyle() for line in own] == ["None"]
    assert ["no line joins the runs of topk at residual.3" in note for note in notes_on_curves(runs)] == [True]


# How it looks.


def latents(seed, n=400, dead=0.1):
    by = random.Random(seed)
    return [0.0 if by.random() < dead else round(10 ** by.uniform(-4.9, -0.1), 5) for _ in range(n)]


STEP = {"shape": [384, 8192, 4096, 40], "encoder_gemm_ms": 98.0,
        "variants": {"topk": {"ms": 162.0, "ratio": 1.65}, "gated": {"ms": 175.0, "ratio": 1.79}}, "peers": {}}


def test_the_second_form_of_gated_has_a_style_of_its_own_everywhere():
    assert styles(["gated_ri_l1"])["gated_ri_l1"] == styles([*STYLES, "gated_ri_l1", "a"])["gated_ri_l1"]
    looks = styles([*STYLES, *(f"other{i}" for i in range(20))])
    assert len(set(looks.values())) == len(STYLES) + 20 and len({looks[label].marker for label in LABELS}) == 5


THRESHOLDS = {"hook": "residual.3", "l0": 39.8, "d_sae": 131072, "bandwidth": 0.01, "kernel": "epanechnikov",
              "n_rows": 2_000_000,
              "latents": [{"latent": 131071 - i, "frequency": 0.1267, "threshold": 0.03,
                           "thresholds": [0.01 * j for j in range(9)],
                           "loss": [2e-5 * 10.0**-i * (j - 4) ** 2 for j in range(9)],
                           "gradient": [-2e-3 * 10.0**-i * (4 - j) for j in range(9)]} for i in range(3)]}


@pytest.mark.parametrize("records", [
    grid(LABELS, (5, 10, 20, 40, 80, 160), (0,), HOOKS),
    grid(LABELS, (5, 10, 20, 40, 80, 160)),
    grid(["topk"], (20,), (0,)),
    grid(["topk", "jumprelu"], (20, 40, 80), (0,), ("residual.3", "attention.5")),
    grid([f"a_label_of_mine_{i}" for i in range(14)], (20, 40), (0,), lm="EleutherAI/pythia-160m-deduped"),
], ids=["nine", "one", "one_run", "ragged", "many_labels"])
def test_no_text_overlaps_or_is_cut(sweep, records):
    middle = sorted({r["l0_target"] for r in records})[len({r["l0_target"] for r in records}) // 2]
    runs = load_runs([sweep(*({**r, "frequencies": latents(r["label"], 50)} if r["l0_target"] == middle else r
                              for r in records))])
    (runs.directories[0] / "step.json").write_text(json.dumps(STEP))
    (runs.directories[0] / "thresholds.json").write_text(json.dumps(THRESHOLDS))
    for name, draw in FIGURES.items():
        if name == "advantage" and not {"jumprelu", "topk"} <= {r["label"] for r in records}:
            continue  # nothing to compare
        figure = draw(runs)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axes in figure.axes:
            shown = [tick.label1 for axis, side in ((axes.xaxis, "labelbottom"), (axes.yaxis, "labelleft"))
                     for tick in axis._update_ticks() if axis.get_tick_params()[side]]  # those in view
            texts += [*shown, *axes.texts, axes._left_title]
        boxes = [(t.get_text(), Text.get_window_extent(t, renderer)) for t in texts if t.get_text() and t.get_visible()]
        for i, (text, box) in enumerate(boxes):
            page = figure.bbox
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, (name, text)
            assert not [other for other, other_box in boxes[:i] if box.overlaps(other_box)], (name, text)


# The command.


def test_the_same_records_give_the_same_files_from_any_process(sweep, tmp_path):
    folder = sweep(*({**r, "frequencies": latents(i, 50)} for i, r in enumerate(grid(hooks=("mlp.3", "residual.3")))))
    (folder / "thresholds.json").write_text(json.dumps(THRESHOLDS))
    first = draw_paper([folder], tmp_path / "first").files
    assert set(first) == set(FIGURES)
    code = (f"import sys; from analysis.paper.__main__ import main; main([{str(folder)!r}, '--output', "
            f"{str(tmp_path / 'second')!r}]); assert not {{'matplotlib.pyplot', 'torch', 'hydra'}} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "second" / f"fig_{name}.png") for name in FIGURES]
    for png, svg in first.values():
        assert png.read_bytes().startswith(b"\x89PNG") and b"<svg" in svg.read_bytes()
        assert b"<dc:date>" not in svg.read_bytes()
        for path in (png, svg):
            assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_figures_go_beside_the_records_by_default(sweep, capsys):
    folder = sweep(*grid(["topk"], seeds=(0,)))
    main([str(folder)])
    assert str(folder / "fig_fvu.png") in capsys.readouterr().out.splitlines() and (folder / "fig_fvu.svg").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "SWEEP"),
    (["{tmp}/nothing"], "is not a folder"),
    (["{tmp}"], "holds no record.json"),
    (["{tmp}/failed"], "no run has finished in"),
    (["{tmp}/mixed"], "d_sae differs"),
    (["{tmp}/mixed", "--colour"], "--colour"),
    (["{tmp}/fine", "--output", "{tmp}/fine/job000/record.json"], "record.json"),
])
def test_a_mistake_is_one_line_and_exit_2(sweep, tmp_path, capsys, arguments, message):
    name = arguments[0].rpartition("/")[2] if arguments else ""
    if name in ("failed", "mixed", "fine"):
        sweep(*{"failed": [record(status="failed", error="out of\nmemory")], "fine": [record()],
                "mixed": [record(), record("relu", d_sae=8)]}[name], name=name)
    with pytest.raises(SystemExit) as exit:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.startswith("analysis.paper: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
