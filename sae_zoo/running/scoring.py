"""Scores of the trained SAE of a run on held-out rows, and notes that somebody who reads the result must know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_zoo.data.activations import TextActivations
from sae_zoo.evaluation.suite import HeldOutRows, score_attribution, score_in_lm, score_sae, within
from sae_zoo.files import replacing
from sae_zoo.running.settings import CacheSettings, TrainSettings
from sae_zoo.running.sources import Source
from sae_zoo.saes import SAE
from sae_zoo.saes.lightning import Calibration

# A run whose held-out L0 is further from its target than this share of it says so.
L0_TOLERANCE = 0.05
# So does one whose calibration raised thresholds by more than this share of their mean excess.
CALIBRATION_TOLERANCE = 0.02
_IN_LM = ("ce_clean", "ce_spliced", "ce_ablated", "delta_lm_loss", "loss_recovered", "kl", "n_lm_targets", "r_l0")


def evaluate_sae(settings: TrainSettings, sae: SAE, source: Source, run_dir: Path) -> dict[str, Any]:
    """Held-out metrics of ``sae``; writes ``latents.csv``. LM metrics are None where there is no language model."""
    device, show = settings.trainer.device, settings.trainer.progress_bar
    sae.to(device)
    rows = HeldOutRows(source.activations, "test", settings.evaluation.n_rows, device=device, progress_bar=show)
    metrics, counts = score_sae(sae, rows)
    metrics |= rows.left_out()
    with replacing(run_dir / "latents.csv") as temporary:
        counts.write_csv(temporary)
    if source.lm is None:
        return {**metrics, **dict.fromkeys(_IN_LM)}
    cache, data = source.activations, settings.source.data
    # What there is where there is a language model.
    assert isinstance(cache, TextActivations) and isinstance(data, CacheSettings) and source.hook is not None
    where = (source.lm, source.hook, cache.tokens("test"), cache.special_ids)
    how: dict[str, Any] = {"n_tokens": settings.evaluation.n_lm_tokens, "batch_size": data.lm.batch_size,
                           "progress_bar": show}
    bound = cache.norm_bound
    # A language model that is spread over devices has the hook point on any of them.
    in_lm = {**score_in_lm(within(lambda x: sae.reconstruct(x.to(device)), bound), *where, **how),
             "r_l0": score_attribution(sae, *where, norm_bound=bound, **how)}
    return {**metrics, **{key: in_lm[key] for key in _IN_LM}}


def l0_missed(settings: TrainSettings, l0: float) -> bool | None:
    """Whether a held-out L0 is too far from the target; None where nothing trains towards one."""
    target = settings.l0_target
    if target is None or settings.sae_arguments.get("sparsity_coefficient") is not None:
        return None
    return abs(l0 / target - 1) > L0_TOLERANCE


def notes_on(sae: SAE, calibration: Calibration | None, record: dict[str, Any]) -> list[str]:
    """Notes on the run of ``record``, in words."""
    # One that was said while it trained may be over: ReLU and JumpReLU recover from some.
    notes = [f"{note}; at the end {record['dead_fraction']:.1%} of the latents are silent, FVU is {record['fvu']:.3f}"
             for note in sae.notes]
    if calibration is not None and abs(calibration.shift) > CALIBRATION_TOLERANCE:
        notes.append(f"calibration moved thresholds by {calibration.shift:+.1%} of their mean excess (L0 "
                     f"{calibration.l0_before:.1f} to {calibration.l0_after:.1f}, FVU {calibration.fvu_before:.4f} to "
                     f"{calibration.fvu_after:.4f} on validation rows)")
    if record["l0_missed"]:
        notes.append(f"L0 target missed: {record['l0']:.1f} measured on held-out tokens, {record['l0_target']:g} asked "
                     "for")
    if record["fvu"] >= 1:
        notes.append(f"FVU is {record['fvu']:.3f}: the mean of the activations alone would leave 1")
    return notes
