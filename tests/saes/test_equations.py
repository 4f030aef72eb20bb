"""Each variant's loss, written out by hand from the papers on a case small enough to follow."""

import pytest
import torch

from sae_zoo.saes import variant_class
from sae_zoo.saes.io import load_sae
from sae_zoo.training.recipe import Recipe


def recipe(**changes):
    values = {
        "n_steps": 100, "batch_size": 8, "lr": 1e-3, "decoder_lr": 1e-3, "free_decoder_lr": 1e-3, "threshold_lr": 1e-3,
        "bias_lr": 1e-3, "lr_l0": None, "second_moment": "element", "beta1": 0.0, "beta2": 0.999, "adam_eps": 1e-8,
        "lr_warmup_steps": 0, "lr_start_factor": 1.0, "lr_decay_fraction": 0.0, "coefficient_warmup_steps": 0,
        "b_dec_start": "zero", "decoder_start": "random", "threshold_start": "fixed",
        "l0_control": True, "control_shift": 0.0, "control_proportional": 0.1, "control_integral": 0.01,
        "error_bound": None,
        "dead_after_tokens": 100, "auxk_full_steps": None,
    }
    return Recipe(**values | changes)


def make(variant, d_in=4, d_sae=6, seed=3, **options):
    options = {"l0_target": 2, "recipe": recipe()} | options
    sae = variant_class(variant)(d_in=d_in, d_sae=d_sae, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_dec.normal_(generator=generator).mul_(0.3)
        getattr(sae, sae.encoder_bias).normal_(generator=generator).mul_(0.2)
    return sae, torch.randn(8, d_in, generator=generator)


def pre_activations(sae, x):
    return (x - sae.b_dec) @ sae.W_enc + getattr(sae, sae.encoder_bias)


def sse(x, x_hat):
    return ((x - x_hat) ** 2).sum(1).mean()


def test_sum_over_dimensions_mean_over_batch():
    sae, x = make("relu", sparsity_coefficient=0.0)
    f = pre_activations(sae, x).clamp_min(0)
    assert sae.loss(x).total.item() == pytest.approx(sse(x, f @ sae.W_dec + sae.b_dec).item())


@pytest.mark.parametrize("d_sae, target, given, expected", [
    (16384, 20, None, 40960), (4096, 80, None, 20000), (65536, 5, None, 200000), (16384, 5, 7, 7)])
def test_a_latent_is_dead_after_so_many_tokens(d_sae, target, given, expected):
    sae, _ = make("topk", d_sae=d_sae, l0_target=target,
                  recipe=recipe(dead_after_tokens=given, n_steps=2000, batch_size=1000))
    assert sae.dead_after_tokens == expected
    sae.tokens_since_fired[:3] = expected
    assert int(sae.dead.sum()) == 3
    if given is None:
        sae.recipe = recipe(dead_after_tokens=None, n_steps=100, batch_size=1000)
        assert sae.dead_after_tokens == max(2500, min(10000, 50 * d_sae / target))


@pytest.mark.parametrize("variant, target, factor", [
    ("jumprelu", 5, 1.0), ("jumprelu", 20, 0.5), ("topk", 15, 1.0), ("topk", 20, 0.75), ("relu", 20, 1.0),
    ("gated", 20, 1.0)])
def test_rates_fall_above_an_l0(variant, target, factor):
    sae, _ = make(variant, d_in=20, d_sae=30, l0_target=target, recipe=recipe(lr_l0=10))
    assert sae.lr_factor(50) == pytest.approx(factor) and sae.schedule(50) == 1
    assert make(variant, d_in=20, d_sae=30, l0_target=target)[0].lr_factor(50) == 1


def test_relu_l1_and_decoder_norm_weighted():
    for form in ("l1", "norm_weighted"):
        sae, x = make("relu", sparsity_coefficient=0.7, form=form)
        with torch.no_grad():
            sae.W_dec.mul_(torch.arange(1.0, 7.0)[:, None])
        f = pre_activations(sae, x).clamp_min(0)
        norms = sae.W_dec.norm(dim=1) if form == "norm_weighted" else torch.ones(6)
        assert sae.loss(x).terms["sparsity"].item() == pytest.approx(0.7 * (f * norms).sum(1).mean().item())


def test_batchtopk_keeps_the_running_mean_of_the_smallest_value_that_a_batch_keeps():
    sae, x = make("batchtopk", l0_target=2)
    sae.threshold.fill_(0.2)
    selection = sae.loss(x).selection
    pre_acts = pre_activations(sae, x)
    kept = pre_acts[selection.mask(pre_acts)]
    assert len(kept) == 2 * len(x) and float(kept.min()) > 0
    sae.observe(selection)
    assert float(sae.threshold) == pytest.approx(0.2 + 0.01 * (float(kept.min()) - 0.2), rel=1e-4)


@pytest.mark.parametrize("sparse", [True, False])
def test_matryoshka_adds_the_error_of_every_prefix(sparse):
    sae, x = make("matryoshka", d_sae=8, l0_target=3, prefixes=[0.25, 0.5])
    pre = pre_activations(sae, x)
    f = pre.flatten().topk(3 * len(x)).values.min()
    f = torch.where(pre >= f, pre, 0).clamp_min(0)
    errors = [sse(x, f[:, :size] @ sae.W_dec[:size] + sae.b_dec) for size in (2, 4, 8)]
    loss = sae.loss(x, sparse=sparse)
    assert loss.total.item() == pytest.approx(sum(errors).item(), rel=1e-5)
    assert loss.terms["prefixes"].item() == pytest.approx((errors[0] + errors[1]).item(), rel=1e-5)


def test_one_latent_has_no_prefix():
    with pytest.raises(ValueError, match="d_sae is 1; matryoshka needs at least 2 latents"):
        make("matryoshka", d_sae=1, l0_target=1)


def test_topk_keeps_the_k_largest_and_cuts_negative_ones():
    sae, x = make("topk", l0_target=5)
    pre = pre_activations(sae, x)
    for row, latents in zip(pre, sae.encode(x), strict=True):
        kept = sorted(row.tolist(), reverse=True)[:5]
        assert sorted(latents[latents > 0].tolist()) == pytest.approx(sorted(v for v in kept if v > 0))
    assert (pre.sort(1, descending=True).values[:, 4] < 0).any(), "no row where the ReLU matters"


def test_auxk_reconstructs_the_residual_with_dead_latents_and_without_the_bias():
    sae, x = make("topk", auxk_coefficient=0.5)
    assert "auxk" not in sae.loss(x).terms
    sae.tokens_since_fired[[0, 3, 4]] = 100
    loss = sae.loss(x)
    pre = pre_activations(sae, x)
    residual = (x - sae(x).x_hat).detach()
    e_hat = torch.zeros_like(x)
    for b in range(len(x)):
        best = sorted([0, 3, 4], key=lambda i: -pre[b, i].item())[:2]  # k_aux = d_in / 2
        for i in best:
            e_hat[b] += max(pre[b, i].item(), 0) * sae.W_dec[i].detach()
    expected = 0.5 * ((residual - e_hat) ** 2).sum() / (residual**2).sum()
    assert loss.terms["auxk"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("form", ["original", "ri_l1"])
def test_gated(form):
    sae, x = make("gated", sparsity_coefficient=0.3, form=form)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        sae.b_mag.normal_(generator=generator)
        sae.r_mag.normal_(generator=generator)
        sae.W_dec.mul_(torch.arange(1.0, 7.0)[:, None])
    pi_gate = pre_activations(sae, x)
    W_mag = sae.W_enc * sae.r_mag.exp()  # the tie, row by row of W_gate
    f = (pi_gate > 0) * ((x - sae.b_dec) @ W_mag + sae.b_mag).clamp_min(0)
    gate = pi_gate.clamp_min(0)
    norms = sae.W_dec.norm(dim=1) if form == "ri_l1" else torch.ones(6)
    loss = sae.loss(x)
    assert loss.terms["reconstruction"].item() == pytest.approx(sse(x, f @ sae.W_dec + sae.b_dec).item(), rel=1e-5)
    assert loss.terms["sparsity"].item() == pytest.approx(0.3 * (gate * norms).sum(1).mean().item(), rel=1e-5)
    assert loss.terms["auxiliary"].item() == pytest.approx(sse(x, gate @ sae.W_dec + sae.b_dec).item(), rel=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("form, term", [("original", "auxiliary"), ("original", "sparsity"), ("ri_l1", "sparsity")])
def test_what_trains_gateds_gate_does_not_leak_into_the_decoder(sparse, form, term):
    sae, x = make("gated", sparsity_coefficient=0.3, form=form)
    gradients = torch.autograd.grad(sae.loss(x, sparse=sparse).terms[term], list(sae.parameters()), allow_unused=True)
    names = [name for name, _ in sae.named_parameters()]
    reached = {name for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}
    # b_dec only through the encoder's input: its part as the decoder's bias is frozen as W_dec is.
    assert reached == {"W_enc", "b_gate", "b_dec"}


def test_gated_encoder_is_a_jumprelu_encoder():
    """PAPER.md section 1: a JumpReLU with threshold b_mag - exp(r_mag) b_gate on the magnitude's pre-activations."""
    sae, x = make("gated")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        sae.r_mag.normal_(generator=generator)
        sae.b_gate.normal_(generator=generator).sub_(1)
        sae.b_mag.normal_(generator=generator).abs_()
    scale = sae.r_mag.exp()
    threshold = sae.b_mag - scale * sae.b_gate
    keep = threshold > 0
    pi = (x - sae.b_dec) @ (sae.W_enc * scale) + sae.b_mag
    torch.testing.assert_close(sae.encode(x)[:, keep], (pi * (pi > threshold))[:, keep])
    assert keep.sum() > 2


@pytest.mark.parametrize("loss_name, expected", [
    ("l0", lambda l0: l0), ("l0_target", lambda l0: (l0 / 2 - 1) ** 2),
    ("l0_target_gemma_scope_2", lambda l0: 2 / 2 * (l0 - 2) ** 2)])
def test_jumprelu(loss_name, expected):
    sae, x = make("jumprelu", sparsity_coefficient=0.3, initial_threshold=0.4, bandwidth=0.3, sparsity_loss=loss_name)
    pre = pre_activations(sae, x)
    active = pre > 0.4
    assert 0 < active.sum() < active.numel()
    torch.testing.assert_close(sae.encode(x), pre * active)
    l0 = active.float().sum(1).mean()
    assert sae.loss(x).terms["sparsity"].item() == pytest.approx(0.3 * expected(l0).item(), rel=1e-5)


def test_jumprelu_sparsity_trains_only_thresholds():
    sae, x = make("jumprelu", sparsity_coefficient=0.3, initial_threshold=0.4, bandwidth=0.3)
    gradients = torch.autograd.grad(sae.loss(x).terms["sparsity"], list(sae.parameters()), allow_unused=True)
    names = [name for name, _ in sae.named_parameters()]
    reached = {name for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}
    assert reached == {"threshold_parameter"}


def weight_gradients(sae, x, d_pre_acts):
    """Gradients of W_enc and the encoder's bias, from those of pre-activations, means over the batch included."""
    return [(x - sae.b_dec).T @ d_pre_acts / len(x), d_pre_acts.sum(0) / len(x)]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kernel, window", [
    ("rectangle", lambda u: (u.abs() < 0.5) / 0.4),
    ("epanechnikov", lambda u: (0.75 * (1 - u * u)).clamp_min(0) / 0.4)])
def test_relu_with_an_l0_penalty(sparse, kernel, window):
    sae, x = make("relu", penalty="l0", sparsity_coefficient=0.3, kernel=kernel, bandwidth=0.4)
    pre = pre_activations(sae, x).detach()
    term = sae.loss(x, sparse=sparse).terms["sparsity"]
    assert term.item() == pytest.approx(0.3 * (pre > 0).sum(1).double().mean().item(), rel=1e-6)
    inside = (pre.abs() < 0.2) & (pre < 0)
    assert inside.any(), "nothing in the lower half of the window, which is in the active set for this penalty alone"
    found = torch.autograd.grad(term, [sae.W_enc, sae.b_enc])
    for a, b in zip(found, weight_gradients(sae, x, 0.3 * window(pre / 0.4)), strict=True):
        torch.testing.assert_close(a, b)
    # The reconstruction has ReLU's own derivative.
    reconstruction = sae.loss(x, sparse=sparse).terms["reconstruction"]
    plain = sse(x, pre_activations(sae, x).clamp_min(0) @ sae.W_dec + sae.b_dec)
    gradients = (torch.autograd.grad(loss, [sae.W_enc, sae.b_enc]) for loss in (reconstruction, plain))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sparse", [True, False])
def test_jumprelu_with_an_l1_penalty(sparse):
    sae, x = make("jumprelu", penalty="l1", sparsity_coefficient=0.3, initial_threshold=0.4, bandwidth=0.3)
    pre = pre_activations(sae, x).detach()
    loss = sae.loss(x, sparse=sparse)
    assert loss.terms["sparsity"].item() == pytest.approx(0.3 * (pre * (pre > 0.4)).sum(1).mean().item(), rel=1e-5)
    parameters = [sae.W_enc, sae.b_enc, sae.threshold_parameter]
    *found, threshold = torch.autograd.grad(loss.terms["sparsity"], parameters, allow_unused=True)
    assert threshold is None or not threshold.any()
    for a, b in zip(found, weight_gradients(sae, x, 0.3 * (pre > 0.4)), strict=True):
        torch.testing.assert_close(a, b)
    threshold = torch.autograd.grad(sae.loss(x, sparse=sparse).terms["reconstruction"], [sae.threshold_parameter])[0]
    latent_gradients = 2 * (sae(x).x_hat - x).detach() @ sae.W_dec.T / len(x)
    window = ((pre - 0.4).abs() < 0.15) / 0.3
    torch.testing.assert_close(threshold, (-0.4 * latent_gradients * 0.4 * window).sum(0))  # twice 0.4: its logarithm


@pytest.mark.parametrize("variant, options, message", [
    ("relu", {"penalty": "l2"}, "sae.penalty is 'l2'; choose from l1, l0"),
    ("relu", {"penalty": "l0", "form": "norm_weighted"}, "sae.form=norm_weighted weights the L1 penalty"),
    ("relu", {"kernel": "banana"}, "kernel is 'banana'"),
    ("jumprelu", {"penalty": "l2"}, "sae.penalty is 'l2'; choose from l0, l1"),
    ("jumprelu", {"penalty": "l1", "sparsity_loss": "l0_target", "sparsity_coefficient": 1.0},
     "sae.sparsity_loss=l0_target is a loss of L0"),
    ("topk", {"recall": 0.0}, "sae.recall is 0.0; it must be above 0 and at most 1"),
    ("topk", {"recall": 1.1}, "sae.recall is 1.1"),
])
def test_options_that_make_no_sense_are_one_line(variant, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(variant, **options)
    assert "\n" not in str(error.value)


def test_approximate_topk_is_of_training_alone():
    sae, x = make("topk", d_in=8, d_sae=64, l0_target=8, recall=0.7)
    trained = sae.dense_latents(pre_activations(sae, x), sae.selection(training=True))
    exact = sae.encode(x)
    assert (trained > 0).sum() == (exact > 0).sum() == 64 and not torch.equal(trained > 0, exact > 0)
    torch.testing.assert_close(exact, sae.encode_sparse(x).to_dense())
    assert sae.loss(x).terms["reconstruction"].item() == pytest.approx(sse(x, trained @ sae.W_dec + sae.b_dec).item())


def test_published_target_losses_need_a_coefficient():
    with pytest.raises(ValueError, match=r"l0_target needs both l0_target and sae\.sparsity_coefficient"):
        make("jumprelu", sparsity_loss="l0_target")


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"holds no sae\.safetensors; give the folder of a finished run"):
        load_sae(tmp_path)
