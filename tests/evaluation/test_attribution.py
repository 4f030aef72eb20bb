import math

import torch

from sae_zoo.evaluation.attribution import gradients, uniformity
from sae_zoo.functional.sparse_code import SparseCode
from sae_zoo.lm.hooks import capture, lm_forward, resolve_hook, splice
from sae_zoo.lm.resume import FromLayer
from tests.evaluation.test_lm_loss import KEEP, MODEL, TOKENS

HOOK = resolve_hook(MODEL, "auto", 1, "residual")


def centred_logit(row, position, x):
    """L at one position of one row, with ``x`` as the activations of that row."""
    with torch.no_grad(), splice(MODEL, HOOK, lambda _: x[None]):
        logits = lm_forward(MODEL, row[None]).logits[0, position].double()
    return float(logits[int(row[position + 1])] - logits.mean())


def test_gradients_are_those_of_finite_differences_at_usable_positions():
    activations = capture(MODEL, [HOOK], TOKENS)[HOOK.name]
    found = list(gradients(FromLayer(MODEL, HOOK), HOOK, TOKENS, KEEP, n_positions=2, batch_size=2, seed=0))
    assert [len(x) for x, _ in found] == [2, 2, 2, 2, 1, 1]
    for x, gradient in found:
        for x_here, slope in zip(x, gradient, strict=True):
            ((row, position),) = (activations == x_here).all(-1).nonzero().tolist()
            assert KEEP[row, position] and KEEP[row, position + 1]
            for i in (0, 5, 17):
                moved = []
                for sign in (1, -1):
                    changed = activations[row].clone()
                    changed[position, i] += sign * 1e-2
                    moved.append(centred_logit(TOKENS[row], position, changed))
                assert math.isclose(slope[i].item(), (moved[0] - moved[1]) / 2e-2, rel_tol=2e-2, abs_tol=2e-3)


def test_positions_are_drawn_anew_with_the_seed_alone():
    def drawn(seed, batch_size):
        pairs = gradients(FromLayer(MODEL, HOOK), HOOK, TOKENS, KEEP, n_positions=1, batch_size=batch_size, seed=seed)
        return torch.cat([x for x, _ in pairs])

    torch.testing.assert_close(drawn(0, 2), drawn(0, 2))
    assert not torch.equal(drawn(0, 5), drawn(1, 5))


def test_uniformity_of_equal_single_and_hand_made_effects():
    W_dec = torch.eye(4)[[0, 1, 2, 3, 0]]  # [5, 4]
    latents = torch.tensor([[1.0, 1, 0, 0, 0], [3.0, 0, 0, 0, 0], [1.0, 2, 0, 0, 3], [0.0, 0, 1, 0, 0]])
    gradient = torch.tensor([[2.0, -2, 1, 0], [1.0, 1, 1, 1], [1.0, 1, 0, 0], [1.0, 1, 0, 1]])
    found = uniformity(SparseCode.from_dense(latents), W_dec, gradient)
    assert found[0].item() == 1 and found[1].item() == 1
    p = [1 / 6, 2 / 6, 3 / 6]
    assert math.isclose(found[2].item(), math.exp(-sum(q * math.log(q) for q in p)) / 3, rel_tol=1e-6)
    assert math.isnan(found[3].item()), "its one latent has no effect"


def test_uniformity_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(7, 30, generator=generator) * (torch.rand(7, 30, generator=generator) < 0.3)
    W_dec, gradient = torch.randn(30, 6, generator=generator), torch.randn(7, 6, generator=generator)
    for row, g, r in zip(latents, gradient, uniformity(SparseCode.from_dense(latents), W_dec, gradient), strict=True):
        y = [abs(f * sum(a * b for a, b in zip(w, g.tolist(), strict=True)))
             for f, w in zip(row.tolist(), W_dec.tolist(), strict=True) if f]
        p = [v / sum(y) for v in y]
        assert math.isclose(r.item(), math.exp(-sum(q * math.log(q) for q in p)) / len(p), rel_tol=1e-5)
