import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from sae_zoo.evaluation import suite
from sae_zoo.lm.hooks import resolve_hook
from sae_zoo.lm.load import LoadedLM
from sae_zoo.saes import SAE, variant_class

N_ROWS, BATCH = 4, 2


@pytest.fixture
def forwards(monkeypatch):
    """The language model, a list that grows by one in each of its forward passes, and nothing remembered."""
    monkeypatch.setattr(suite, "_of_lm", {})
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8)).eval().requires_grad_(False)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    return LoadedLM(model, None, "tiny", "tiny", 2, torch.device("cpu")), seen


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    return variant_class("topk")(d_in=16, d_sae=32, l0_target=4).eval().requires_grad_(False)


def score(sae, lm, tokens, layer=0):
    where = (lm, resolve_hook(lm.model, "auto", layer, "residual"), tokens, (0, 1))
    how = {"n_tokens": tokens.numel(), "batch_size": BATCH, "progress_bar": False}
    r_l0 = suite.score_attribution(sae, *where, norm_bound=math.inf, **how)
    return {**suite.score_in_lm(sae.reconstruct, *where, **how), "r_l0": r_l0}


def text(seed=0):
    return torch.randint(2, 40, (N_ROWS, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def test_what_the_lm_alone_decides_is_measured_once_at_a_place(forwards, sae):
    lm, seen = forwards
    first = score(sae, lm, text())
    assert len(seen) == 4 * N_ROWS // BATCH  # clean, spliced, ablated, with gradients
    seen.clear()
    assert score(sae, lm, text()) == first
    assert len(seen) == 2 * N_ROWS // BATCH


@pytest.mark.parametrize("change", [{"layer": 1}, {"tokens": text(seed=1)}])
def test_another_place_is_measured_anew(forwards, sae, change):
    lm, _ = forwards
    alone = score(sae, lm, **{"tokens": text(), **change})
    suite._of_lm.clear()
    score(sae, lm, text())
    assert score(sae, lm, **{"tokens": text(), **change}) == alone
