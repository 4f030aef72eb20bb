"""Look into a trained SAE, latent by latent: how often and how strongly each fires, in which text, and which tokens it
speaks for. Unlike the rest of analysis this reads activations and weights, since records do not hold them.

    from analysis.latents import contexts, open_runs, survey
    (run,) = open_runs(["outputs/runs/<sweep>/<job>"])
    found = survey(run.sae, run.source.activations)                 # every latent, one pass over the held-out rows
    contexts(run.sae, run.source.activations, found, [17])          # a second pass, for the text around
"""

from __future__ import annotations

from analysis.latents.contexts import KINDS, Context, contexts, highlighted, token_texts
from analysis.latents.logits import Effects, UnknownEffects, logit_effects
from analysis.latents.run import Run, open_runs
from analysis.latents.survey import Survey, nearest, stratified, survey

__all__ = ["KINDS", "Context", "Effects", "Run", "Survey", "UnknownEffects", "contexts", "highlighted", "logit_effects",
           "nearest", "open_runs", "stratified", "survey", "token_texts"]
