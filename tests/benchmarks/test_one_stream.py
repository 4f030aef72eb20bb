"""The benchmark of one stream, on a shape so small that only its bookkeeping is tested, never a time."""

import json

import numpy as np
import pytest

from benchmarks import one_stream
from benchmarks.__main__ import main
from sae_zoo.saes import variants


def test_one_stream(capsys, tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(2000, 16)).astype("float32"))
    opened, honest = [], one_stream.open_source
    monkeypatch.setattr(one_stream, "open_source", lambda *a, **k: opened.append(1) or honest(*a, **k))
    monkeypatch.setattr(one_stream, "TARGETS", (4, 8))
    main(["one_stream", "data=file", f"data.path={tmp_path / 'rows.npy'}", "d_sae=64", "recipe.batch_size=64",
          "trainer.accelerator=cpu", "--saes", "1,3", "--steps", "5", "--rounds", "1", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["saes"] for row in result["rows"]] == [1, 3] and result["steps"] == 5
    assert len(opened) == 1 + (1 + 1) + (3 + 1)  # to warm up, then apart as often as there are SAEs, and once together
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["together_seconds"] / row["apart_seconds"])
        assert 0 < row["together_opening_seconds"] < row["together_seconds"]
        assert row["training_ratio"] == pytest.approx(
            (row["together_seconds"] - row["together_opening_seconds"])
            / (row["apart_seconds"] - row["apart_opening_seconds"]))


MOST = len(one_stream.TARGETS) * len(variants())


@pytest.mark.parametrize("saes", ["0", str(MOST + 1), "a", "1,,2"])
def test_bad_numbers(saes, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["one_stream", "--saes", saes])
    assert stopped.value.code == 2 and f"is no list of numbers from 1 to {MOST}" in capsys.readouterr().err
