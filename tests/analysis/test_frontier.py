"""The frontier command on records written by hand: table, files, what it refuses, and how its plot reads."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from analysis.frontier import main
from sae_zoo.frontier import plot
from sae_zoo.frontier.pareto import group_seeds
from sae_zoo.frontier.plot import draw_frontier
from sae_zoo.frontier.style import STYLES, readable_ticks, spread_apart, styles
from sae_zoo.records import write_record

LOSS = {"relu": 3.0, "gated": 2.0, "topk": 1.05, "jumprelu": 1.0}


def record(variant="topk", target=20, seed=0, **values):
    scale = LOSS.get(variant, 1.5) * (1 + 0.05 * seed)
    return {
        "status": "finished", "error": None, "variant": variant, "label": variant, "l0_target": target,
        "l0": target * (1.0 if variant == "topk" else 1.01), "l0_missed": False, "fvu": 2 * scale * target**-0.7,
        "mse": scale, "delta_lm_loss": 4 * scale / target, "loss_recovered": 1 - scale / target,
        "relative_reconstruction_bias": 0.98, "dead_fraction": 0.034, "d_in": 64, "d_sae": 4096, "n_tokens": 1_000_000,
        "n_steps": 1000, "batch_size": 1000, "seed": seed, "lm": "builtin", "hook": "residual.3", "data_id": "d1",
        "cache_id": "d1", "config_hash": "c", "seconds": 61.4, "versions": {"python": "3"}, **values,
    }


@pytest.fixture
def sweep(tmp_path):
    """Writes records into a sweep folder, one job each."""

    def write(*records, name="sweep"):
        for i, values in enumerate(records):
            write_record(tmp_path / name / f"job{i:02d}", values)
        return tmp_path / name

    return write


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are really drawn, for a look at their parts."""
    drawn, draw = [], plot._draw
    monkeypatch.setattr(plot, "_draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    return drawn


def grid(variants, targets=(20, 40, 80), seeds=(0,), **values):
    return [record(v, t, s, **values) for v in variants for t in targets for s in seeds]


def test_table_has_a_row_a_run_with_its_numbers(sweep):
    folder = sweep(*grid(["topk", "jumprelu"]))
    lines = draw_frontier(folder).text.splitlines()
    assert lines[0].split("  ")[0] == "variant"
    for name in ("target L0", "measured L0", "FVU", "delta LM loss", "loss recovered", "dead share", "seconds", "seed"):
        assert name in lines[0]
    rows = [line.split() for line in lines[2:] if line]
    assert [row[:3] for row in rows] == [
        ["jumprelu", "20", "20.2"], ["jumprelu", "40", "40.4"], ["jumprelu", "80", "80.8"],
        ["topk", "20", "20.0"], ["topk", "40", "40.0"], ["topk", "80", "80.0"],
    ]
    assert rows[3][3:] == [f"{2.1 * 20**-0.7:.4f}", "0.2100", "0.9475", "3.4%", "61", "0"]
    assert len({len(line) for line in lines if line}) == 1  # aligned


def test_seeds_become_one_row_with_spread(sweep):
    text = draw_frontier(sweep(*grid(["topk"], seeds=(0, 1)))).text
    assert text.count("2 seeds") == 3
    assert f"{(0.21 + 0.2205) / 2:.4f} ± {(0.2205 - 0.21) / math.sqrt(2):.4f}" in text


def test_files_and_csv(sweep, tmp_path):
    folder = sweep(*grid(["topk", "jumprelu"], seeds=(0, 1)), record("relu", 20, status="failed", error="loss is NaN"))
    result = draw_frontier(folder, tmp_path / "elsewhere" / "deep")
    assert result.png == tmp_path / "elsewhere" / "deep" / "frontier.png"
    assert result.png.read_bytes().startswith(b"\x89PNG") and b"<svg" in result.svg.read_bytes()
    assert not list(folder.glob("frontier.*"))
    table = pd.read_csv(result.csv)
    assert len(table) == 13 == len(result.runs)
    assert (table.status == "failed").sum() == 1
    row = table[(table.label == "jumprelu") & (table.l0_target == 40) & (table.seed == 1)].iloc[0]
    assert row.delta_lm_loss == pytest.approx(4 * 1.05 / 40) and row.run_dir.startswith(str(folder))
    assert draw_frontier(folder).png == folder / "frontier.png"  # by default beside the records


def test_several_folders_and_none_counted_twice(sweep):
    first, second = sweep(*grid(["topk"]), name="a"), sweep(*grid(["jumprelu"]), name="b")
    assert len(draw_frontier([first, second]).runs) == 6
    assert len(draw_frontier([first, first / "job00", first]).runs) == 3


def test_failed_runs_and_missed_targets_are_said(sweep):
    text = draw_frontier(sweep(
        record("topk", 20), record("jumprelu", 20, l0=33.3, l0_missed=True),
        record("gated", 20, status="failed", error="loss became NaN\n  at step 12", l0=None, fvu=None),
    )).text
    assert " 33.3*" in text and "* missed its target L0: sweep/job01 (L0 33.3 for 20)" in text
    assert text.endswith("failed (1):\n  sweep/job02: loss became NaN at step 12")
    assert " 20.0*" not in text


@pytest.mark.parametrize(("key", "other"), [("lm", "gemma2_2b"), ("hook", "mlp.3"), ("data_id", "d2"), ("d_in", 128),
                                            ("d_sae", 8192), ("n_tokens", 2_000_000), ("lm", None)])
def test_incompatible_runs_are_refused_with_the_reason(sweep, key, other):
    one = record()
    folder = sweep(one, record("jumprelu", **{key: other}), record("relu"))
    with pytest.raises(ValueError, match=f"{key} differs: ") as error:
        draw_frontier(folder)
    message = str(error.value)
    assert f"{key} differs: {one[key]} (sweep/job00, sweep/job02) against {other} (sweep/job01)" in message
    assert message.count("differs") == 1 and "\n" not in message
    assert not list(folder.glob("frontier.*"))


def test_a_failed_run_need_not_be_comparable(sweep):
    draw_frontier(sweep(record(), record("relu", status="failed", error="out of memory", d_sae=None, hook=None)))


def test_without_a_language_model_there_is_one_panel(sweep, figures):
    none = {"lm": None, "hook": None, "delta_lm_loss": None, "loss_recovered": None}
    result = draw_frontier(sweep(*grid(["topk", "jumprelu"], **none)))
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "FVU"
    assert "note" not in result.text  # absent is not left out
    assert "data d1" in {text.get_text() for text in figures[0].texts}
    assert result.text.splitlines()[2].split()[4:6] == ["-", "-"]


def test_what_a_log_axis_cannot_show_is_said_in_one_line(sweep, figures):
    folder = sweep(record("topk", 20), record("topk", 40), record("topk", 80, delta_lm_loss=-0.002))
    text = draw_frontier(folder).text
    (note,) = [line for line in text.splitlines() if line.startswith("note")]
    assert "delta_lm_loss" in note and "sweep/job02 (L0 80, -0.002)" in note
    loss, fvu = (markers_of(axes)["topk"] for axes in figures[0].axes)
    assert len(loss) == 2 and len(fvu) == 3


def test_a_panel_with_nothing_positive_is_dropped(sweep, figures):
    text = draw_frontier(sweep(record("topk", 20, delta_lm_loss=0.0), record("topk", 40, delta_lm_loss=-0.1))).text
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["FVU"]
    assert "sweep/job00 (L0 20, 0), sweep/job01 (L0 40, -0.1)" in text


def markers_of(axes):
    """label -> drawn (x, y) of its runs, found by the style alone."""
    by_marker = {style.marker: label for label, style in STYLES.items()}
    return {by_marker[line.get_marker()]: list(zip(*line.get_data(), strict=True)) for line in axes.lines
            if line.get_marker() in by_marker}


def test_every_run_is_a_marker_and_lines_go_through_means(sweep, figures):
    records = grid(LOSS, seeds=(0, 1, 2))
    draw_frontier(sweep(*records))
    for axes, key in zip(figures[0].axes, ("delta_lm_loss", "fvu"), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        drawn = markers_of(axes)
        for label, style in ((label, STYLES[label]) for label in LOSS):
            expected = {(r["l0"], r[key]) for r in records if r["label"] == label}
            assert set(drawn[label]) == expected
            (line,) = [line for line in axes.lines if line.get_color() == style.color and line.get_linestyle() == "-"]
            means = sorted((g.mean("l0"), g.mean(key)) for g in group_seeds(records) if g.label == label)
            assert np.allclose(np.transpose(line.get_data()), means)
        (band,) = [line for line in axes.lines if line.get_color() == plot.FRONT]
        _, y = band.get_data()
        assert min(y) == pytest.approx(min(g.mean(key) for g in group_seeds(records)))
    texts = " ".join(text.get_text() for text in figures[0].texts)
    for part in ("builtin", "residual.3", "d_sae 4,096", "1,000,000 training tokens"):
        assert part in texts


def test_runs_that_differ_in_more_than_their_seed_are_not_joined(sweep, figures):
    result = draw_frontier(sweep(record("topk", 20), record("topk", 20, fvu=0.5), record("topk", 40)))
    assert "no line joins the runs of topk" in result.text
    for axes in figures[0].axes:
        own = [line for line in axes.lines if line.get_color() == STYLES["topk"].color]
        assert [line.get_linestyle() for line in own] == ["None"]  # its markers alone


@pytest.mark.parametrize("records", [
    grid(LOSS, seeds=(0, 1)),
    grid(["topk", "jumprelu"]),
    grid(["topk"], targets=(20,)),
    grid(["jumprelu"], targets=(20,), delta_lm_loss=None),
    [record(f"variant_{i}", t, fvu=0.2 + 1e-4 * i, delta_lm_loss=0.1) for i in range(12) for t in (10, 30)],
    grid(LOSS, targets=(1, 10, 100, 1000)),
], ids=["four", "two", "one_run", "one_run_no_lm", "twelve_alike", "three_decades"])
def test_no_text_overlaps_or_is_cut(sweep, figures, records):
    draw_frontier(sweep(*records))
    (figure,) = figures
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        ticks = [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_majorticklabels()]
        assert len(axes.xaxis.get_majorticklabels()) >= 2 and len(axes.yaxis.get_majorticklabels()) >= 2
        titles = [axes.xaxis.label, axes._left_title]
        texts += [*ticks, *titles, *axes.texts]
        assert {text.get_text() for text in axes.texts} == {r["label"] for r in records}
        for tick in ticks:
            assert "^" not in tick.get_text() and "e" not in tick.get_text()
            float(tick.get_text())
    # Text's own extent, not Annotation's, which includes the leader line: lines may pass each other, words may not.
    renderer = canvas.get_renderer()
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts if text.get_text()]
    page = figure.bbox
    for i, (name, box) in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, f"{name} is cut"
        for other_name, other in boxes[:i]:
            assert not box.overlaps(other), f"{name!r} overlaps {other_name!r}"


def test_targets_of_the_default_sweep_are_ticks():
    assert readable_ticks(17, 95) == [20, 40, 80]
    assert readable_ticks(0.08, 0.9) == pytest.approx([0.1, 0.2, 0.5])
    assert readable_ticks(0.31, 0.345) == pytest.approx([0.31, 0.32, 0.33, 0.34])


@given(st.floats(1e-4, 1e4), st.floats(1.02, 1e5))
def test_ticks_are_few_and_inside(low, ratio):
    ticks = readable_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= low * ratio for tick in ticks) and ticks == sorted(set(ticks))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_labels_are_spread_in_order_and_only_as_far_as_needed(wanted, gap):
    placed = spread_apart(wanted, gap, 0.0, 1.0)
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    ranked = sorted(placed)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(ranked))
    pairs = list(zip(wanted, placed, strict=True))
    assert all(p < q for w, p in pairs for v, q in pairs if w < v)
    apart = sorted(wanted)
    if all(b - a >= gap for a, b in itertools.pairwise(apart)):
        assert placed == pytest.approx(wanted)


def test_two_labels_at_one_place_move_by_half_a_gap_each():
    assert spread_apart([0.5, 0.5, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55, 0.9])
    assert spread_apart([0.0, 0.0], 0.1, 0.0, 1.0) == pytest.approx([0.0, 0.1])


def test_styles_are_one_a_variant_everywhere():
    alone, together = styles(["topk"]), styles(["zzz", "topk", "gated_ri_l1", "aaa"])
    assert alone["topk"] == together["topk"] == STYLES["topk"]
    looks = list(styles([*STYLES, *(f"other{i}" for i in range(20))]).values())
    assert len(set(looks)) == len(STYLES) + 20
    assert len({look.color for look in STYLES.values()}) == len(STYLES)
    assert len({look.marker for look in STYLES.values()}) == len(STYLES)


def test_command_prints_the_table_then_the_path(sweep, capsys):
    folder = sweep(*grid(["topk"]))
    main([str(folder)])
    out = capsys.readouterr().out
    assert out.startswith("variant") and out.splitlines()[-1] == str(folder / "frontier.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DIR"),
        (["{tmp}/nothing"], "is not a folder"),
        (["{tmp}"], "holds no record.json"),
        (["{tmp}/failed"], "no run has finished in"),
        (["{tmp}/mixed"], "d_sae differs"),
        (["{tmp}/mixed", "--colour"], "--colour"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(sweep, tmp_path, capsys, arguments, message):
    if arguments and "failed" in arguments[0]:
        sweep(record(status="failed", error="out of\nmemory"), name="failed")
    if arguments and "mixed" in arguments[0]:
        sweep(record(), record("relu", d_sae=8), name="mixed")
    with pytest.raises(SystemExit) as exit:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.startswith("analysis.frontier: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_as_a_module_without_pyplot_or_training_code(sweep):
    folder = sweep(*grid(["topk", "jumprelu"]))
    root = Path(__file__).resolve().parents[2]
    code = (f"import sys; from analysis.frontier import main; main([{str(folder)!r}]); "
            "assert not {'matplotlib.pyplot', 'torch', 'hydra', 'sae_zoo.saes'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "frontier.png")
