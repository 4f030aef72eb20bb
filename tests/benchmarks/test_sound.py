"""The benchmark that looks for places where an arm does not train soundly, at a size at which only its rows are
tested."""

import json

import numpy as np
import pytest

from benchmarks import sound
from benchmarks.__main__ import main


def row(arm, target, **values):
    like = {"place": "p", "d_sae": 64, "steps": 10, "batch": 8, "seed": 0, "set": [], "split": "test",
            "l0_standard_error": 0.1}
    return like | {"arm": arm, "target": target, "l0": target, "fvu": 8 / target, "dead_fraction": 0.0,
                   "notes": None} | values


def test_verdicts():
    rows = [row("topk", 20), row("topk", 40),
            row("jumprelu", 20, l0=20.7), row("jumprelu", 40, fvu=0.41, dead_fraction=0.06),
            row("gated", 20, l0=20.7, l0_standard_error=0.4),
            row("relu", 20, notes="collapsed at step 9"), row("relu", 40, fvu=1.0)]
    sound.add_verdicts(rows)
    assert [r["wrong"] for r in rows] == [
        [], [], ["L0"], ["dead", "FVU rises"], [], ["collapsed"], ["collapsed", "FVU rises"]]
    assert rows[2]["over_topk"] == 1 and rows[3]["over_topk"] == pytest.approx(0.41 / 0.2)


@pytest.mark.parametrize("kind", sound.SYNTHETIC)
def test_synthetic_rows(kind, monkeypatch):
    monkeypatch.setattr(sound, "_N_ROWS", 4000)
    x = sound.synthetic(kind, 16)
    assert x.shape == (4000, 16) and np.isfinite(x).all() and np.array_equal(x, sound.synthetic(kind, 16))
    norms = np.linalg.norm(x - x.mean(0), axis=1)
    assert (norms.max() > 30 * np.median(norms)) == (kind == "outliers")
    distance = np.linalg.norm(x.mean(0)) / np.sqrt((norms**2).mean())
    assert distance == pytest.approx(sound.SYNTHETIC[kind][0], abs=0.1)


def test_a_run_is_kept_and_not_trained_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sound, "_N_ROWS", 4000)
    command = ["sound", "synthetic:mean:16", "--arms", "topk,jumprelu", "--targets", "4,0", "--d-sae", "64",
               "--steps", "12", "--batch", "64", "--out", str(tmp_path / "rows.jsonl"), "--json"]
    main(command)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["arm"], r["target"]) for r in first["rows"]] == [
        ("topk", 4), ("topk", 8), ("jumprelu", 4), ("jumprelu", 8)]
    monkeypatch.setattr(sound, "_train", None)
    main(command)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == first["rows"]
    with pytest.raises(SystemExit) as stopped:
        main(["sound", "synthetic:odd:16", "--out", str(tmp_path / "other")])
    assert stopped.value.code == 2 and "place 'synthetic:odd:16' is unknown; give" in capsys.readouterr().err
