"""``python -m benchmarks sound CACHE... | synthetic:KIND...``: does every arm train soundly wherever one looks?

On every place, every arm is trained to every L0 by the recipe as it stands, and scored on held-out rows. A run is sound
if its L0 is within 3 % of the target or within two of its standard errors, at most 5 % of its latents are dead, it did
not collapse, and its FVU is not above that of the same arm at a lower L0. What overrides are worth is seen by giving
them: ``recipe.error_bound=null``, say.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import align
from sae_zoo.config import compose_config
from sae_zoo.data.array_file import FileActivations
from sae_zoo.data.cache import open_cache
from sae_zoo.evaluation.suite import HeldOutRows, score_sae
from sae_zoo.process import prepare_process
from sae_zoo.running.fitting import fit
from sae_zoo.running.settings import TrainSettings
from sae_zoo.running.sources import Source

L0_WITHIN, MOST_DEAD = 0.03, 0.05
# FVU at a higher L0 may be above that at the next lower one by so much of it: rounding of the last digits shown.
_MONOTONE_WITHIN = 0.005
_N_ROWS = 60_000
_FEATURES_OF_DIMENSION, _ACTIVE = 4, 10
# Of synthetic data: distance of the mean from 0, in root mean squares of ||x - mean||; sigma of a lognormal factor a
# row.
SYNTHETIC = {"plain": (0.0, 0.0), "mean": (5.0, 0.0), "heavy": (1.0, 0.5), "outliers": (0.0, 0.0)}
_OUTLIER_EVERY, _OUTLIER_FACTOR = 1000, 100.0


def synthetic(kind: str, d_in: int, seed: int = 0) -> np.ndarray:
    """Rows float32 [60,000, d_in] of sparse features of Zipf frequencies, ten active ones a row on average.

    Args:
        kind: ``plain``; ``mean``: about a mean five times as long as the rest; ``heavy``: each row times a lognormal
            factor of sigma 0.5; ``outliers``: one row of a thousand, in the training part alone, a hundred times as
            long.
    """
    mean, sigma = SYNTHETIC[kind]
    rng = np.random.default_rng(seed)
    n_features = _FEATURES_OF_DIMENSION * d_in
    features = rng.standard_normal((n_features, d_in)).astype("f4")
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    frequency = 1 / np.arange(1, n_features + 1)
    frequency = np.minimum(0.5, _ACTIVE * frequency / frequency.sum())
    rows = np.empty((_N_ROWS, d_in), "f4")
    for part in np.array_split(np.arange(_N_ROWS), 20):
        active = rng.random((len(part), n_features), dtype="f4") < frequency
        values = active * (0.5 + rng.random((len(part), n_features), dtype="f4"))
        rows[part] = values @ features + 0.02 * rng.standard_normal((len(part), d_in), dtype="f4")
        rows[part] *= np.exp(sigma * rng.standard_normal((len(part), 1), dtype="f4"))
    rows -= rows.mean(0)
    if kind == "outliers":
        rows[: int(0.9 * _N_ROWS) : _OUTLIER_EVERY] *= _OUTLIER_FACTOR
    direction = rng.standard_normal(d_in).astype("f4")
    return rows + mean * math.sqrt((rows**2).sum(1).mean()) * direction / np.linalg.norm(direction)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    parser.add_argument("places", nargs="+", metavar="PLACE", help="folders of finished caches, or synthetic:KIND:D_IN "
                        f"with a kind of {', '.join(SYNTHETIC)}")
    parser.add_argument("--arms", default="jumprelu,topk,gated,gated_ri_l1,relu", metavar="NAME,NAME,...")
    parser.add_argument("--targets", type=numbers, default=[20, 80], metavar="L0,L0,...",
                        help="those above half of the dimensions of a place are left out there; 0 stands for half of "
                             "them")
    parser.add_argument("--d-sae", type=numbers, default=[1024], metavar="N,N,...")
    parser.add_argument("--steps", type=numbers, default=[500], metavar="N,N,...")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("validation", "test"), default="test",
                        help="tune on validation, report test")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of it that are scored, at most")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of sae_zoo.train")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark/sound.jsonl"), metavar="FILE",
                        help="a line for each finished run; what is there is not trained again")


def _places(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Source]]:
    for name in names:
        if name.startswith("synthetic:"):
            _, kind, d_in = (name + ":").split(":")[:3]
            if kind not in SYNTHETIC or not d_in.isdigit():
                raise ValueError(f"place {name!r} is unknown; give a cache, or synthetic:KIND:D_IN with a kind of "
                                 f"{', '.join(SYNTHETIC)}")
            path = folder / f"{kind}.npy"
            np.save(path, synthetic(kind, int(d_in)))
            yield name, Source(FileActivations(path), None, None)
        else:
            yield "-".join(Path(name).name.split("-")[:-1]), Source(open_cache(name), None, None)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows.

    Raises:
        ValueError: in one line, for whatever is wrong with the arguments or a cache.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prepare_process()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place, source in _places(args.places, Path(folder)):
            d_in = source.activations.d_in
            for d_sae in map(int, args.d_sae):
                for steps in map(int, args.steps):
                    for arm in args.arms.split(","):
                        for target in sorted({int(t or d_in // 2) for t in args.targets}):
                            if target > min(d_in, d_sae) // 2:
                                continue
                            key = {"place": place, "arm": arm, "d_sae": d_sae, "steps": steps, "batch": args.batch,
                                   "seed": args.seed, "target": target, "set": args.set, "split": args.split}
                            row = next((row for row in done if key.items() <= row.items()), None)
                            if row is None:
                                row = key | _train(source, key, args.rows, Path(folder))
                                with open(args.out, "a") as file:
                                    file.write(json.dumps(row) + "\n")
                            rows.append(row)
    add_verdicts(rows)
    print(format_table(rows))
    return {"rows": rows, "sound": sum(not row["wrong"] for row in rows), "runs": len(rows)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Whatever a run has to say stands in its row."""
    log = logging.getLogger("sae_zoo")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _train(source: Source, key: dict[str, Any], n_rows: int, folder: Path) -> dict[str, Any]:
    settings = TrainSettings.of(compose_config("train", [
        f"sae={key['arm']}", f"d_sae={key['d_sae']}", f"l0_target={key['target']}", f"recipe.n_steps={key['steps']}",
        f"recipe.batch_size={key['batch']}", f"seed={key['seed']}", "trainer.progress_bar=false", "data=file",
        "data.path=x", *key["set"]]))
    source.activations.leave_out(settings.source.max_norm)
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        start = time.perf_counter()
        with _quiet():
            sae, calibration = fit(settings, source, Path(run_dir))
        seconds = time.perf_counter() - start
    # Rows of many times the median are nobody's: left out of the score, whether they were left out of training or not.
    source.activations.leave_out(compose_config("train", [])["data"]["max_norm"])
    rows = HeldOutRows(source.activations, key["split"], n_rows, device=torch.device("cpu"), progress_bar=False)
    scores, _ = score_sae(sae, rows)
    row = {name: scores[name]
           for name in ("l0", "l0_standard_error", "fvu", "dead_fraction", "relative_reconstruction_bias")}
    row |= {**rows.left_out(), "notes": "; ".join(sae.notes) or None, "seconds": round(seconds, 1),
            "coefficient": sae.coefficient if sae.has_coefficient else None, "shifted": float(sae.shifted),
            "calibration_shift": None if calibration is None else calibration.shift,
            "l0_before_calibration": None if calibration is None else calibration.l0_before}
    return row


def add_verdicts(rows: list[dict[str, Any]]) -> None:
    """Give every row ``wrong``, a list of what is not as it should be, and its FVU ``over_topk`` at the same target."""

    def like(row: dict[str, Any], **changed: Any) -> dict[str, Any] | None:
        keys = ("place", "d_sae", "steps", "batch", "seed", "set", "split", "arm", "target")
        wanted = {key: row[key] for key in keys} | changed
        return next((other for other in rows if wanted.items() <= other.items()), None)

    for row in rows:
        row["wrong"] = []
        if not abs(row["l0"] - row["target"]) <= max(L0_WITHIN * row["target"], 2 * row["l0_standard_error"]):
            row["wrong"].append("L0")
        if row["dead_fraction"] > MOST_DEAD:
            row["wrong"].append("dead")
        if row["notes"] or not row["fvu"] < 1:
            row["wrong"].append("collapsed")
        lower = [other for target in {r["target"] for r in rows} if target < row["target"]
                 and (other := like(row, target=target)) is not None]
        if any(row["fvu"] > other["fvu"] * (1 + _MONOTONE_WITHIN) for other in lower):
            row["wrong"].append("FVU rises")
        topk = like(row, arm="topk")
        row["over_topk"] = None if topk is None else row["fvu"] / topk["fvu"]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each run, and below it how many are sound."""
    table = [["place", "arm", "d_sae", "steps", "target", "L0", "FVU", "/ TopK", "dead", "calibration", "wrong"]]
    for row in rows:
        shift = row["calibration_shift"]
        table.append([row["place"], row["arm"], str(row["d_sae"]), str(row["steps"]), str(row["target"]),
                      f"{row['l0']:.2f}", f"{row['fvu']:.4f}",
                      "-" if row["over_topk"] is None else f"{row['over_topk']:.3f}", f"{row['dead_fraction']:.1%}",
                      "-" if shift is None else f"{shift:+.1%}", ", ".join(row["wrong"])])
    arms = sorted({row["arm"] for row in rows})
    sound = {arm: [not row["wrong"] for row in rows if row["arm"] == arm] for arm in arms}
    return "\n".join([align(table), *(f"{arm}: {sum(own)} of {len(own)} sound" for arm, own in sound.items())])
