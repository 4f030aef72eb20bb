"""What every SAE must do. The cases are the files of conf/sae: a new variant is tested by being there."""

import math

import pytest
import torch
import torch.nn.functional as F

from sae_zoo.config import CONFIG_DIR, compose_config
from sae_zoo.functional import encoder
from sae_zoo.functional.decoder import normalise_rows_
from sae_zoo.running.settings import TrainSettings
from sae_zoo.saes import variant_class, variants
from sae_zoo.saes.base import Step
from sae_zoo.saes.io import folded_weights, load_sae, save_sae

D_IN, D_SAE, BATCH, TARGET = 12, 60, 200, 5
CASES = {path.stem: () for path in sorted((CONFIG_DIR / "sae").glob("*.yaml"))}
CASES |= {
    "relu norm_weighted": ("sae.form=norm_weighted",),
    "jumprelu raw gaussian": ("sae.threshold_as=raw", "sae.kernel=gaussian", "sae.bandwidth=0.02"),
    "jumprelu ste": ("sae.ste_into_pre_acts=true", "sae.bandwidth=0.1"),
    "jumprelu target": ("sae.sparsity_loss=l0_target", "sae.sparsity_coefficient=0.1", "sae.bandwidth=0.1"),
    "jumprelu l1": ("sae.penalty=l1", "sae.bandwidth=0.1"),
    "relu l0": ("sae.penalty=l0", "sae.bandwidth=0.1"),
    "relu l0 gaussian": ("sae.penalty=l0", "sae.kernel=gaussian", "sae.bandwidth=0.02"),
    "topk approximate": ("sae.recall=0.5",),
    "jumprelu gemma scope 2": ("sae.sparsity_loss=l0_target_gemma_scope_2", "sae.sparsity_coefficient=0.1"),
}


def activations():
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(BATCH, D_IN, generator=generator) @ torch.randn(D_IN, D_IN, generator=generator) + 5


def config(name, *overrides):
    return compose_config("train", [f"sae={name}", f"d_sae={D_SAE}", f"l0_target={TARGET}", *overrides])


def build(config, **facts):
    return TrainSettings.of(config).sae(**facts)


@pytest.fixture(params=CASES)
def sae(request):
    x = activations()
    sae = build(config(request.param.split()[0], *CASES[request.param]), d_in=D_IN,
                    input_scale=float(x.square().sum(1).mean().sqrt()))
    sae.initialise(x)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from the start, where ties could hide a transposed or missing term
        for parameter in sae.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        if sae.unit_norm_decoder:
            normalise_rows_(sae.W_dec)
        sae.constrain()
        sae.tokens_since_fired[::4] = 10**9  # some dead latents, for losses about them
    return sae


def test_every_variant_has_a_config():
    assert {config(path.stem)["sae"]["variant"] for path in (CONFIG_DIR / "sae").glob("*.yaml")} == set(variants())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_widened_by_the_sae(sae, dtype):
    x = activations().to(dtype)
    assert sae.loss(x).total == sae.loss(x.float()).total


def latents_of_step(sae, raw):
    """Pre-activations and latents of a training step, in normalised units, from tensor operations on everything."""
    pre_acts = (raw / sae.input_scale - sae.b_dec) @ sae.W_enc + getattr(sae, sae.encoder_bias)
    return pre_acts, sae.dense_latents(pre_acts, selection_of_step(sae, pre_acts))


def selection_of_step(sae, pre_acts):
    return sae.selection(training=True).of_batch(lambda: [pre_acts.detach()], torch.zeros(D_SAE), len(pre_acts))


def auxk(sae, x, x_hat):
    dead, residual = sae.dead, (x - x_hat).detach()
    whole = residual.square().sum() if sae.error_bound.isinf() else huber(residual, sae.error_bound)
    residual = residual * (sae.error_bound / residual.norm(dim=1, keepdim=True)).clamp_max(1)
    bias = 0 if sae.bias_is_threshold else getattr(sae, sae.encoder_bias)
    pre_acts = ((x - sae.b_dec).detach() @ sae.W_enc + bias).masked_fill(~dead, -torch.inf)
    largest = pre_acts >= pre_acts.topk(D_IN // 2, dim=1).values[:, -1:]
    e_hat = torch.where(largest, pre_acts.clamp_min(0), 0) @ sae.W_dec
    return sae.auxk_weight * (residual - e_hat).square().sum() / whole


def huber(error, bound):
    norms = error.norm(dim=1)
    return torch.where(norms <= bound, norms.square(), 2 * bound * norms - bound.square()).sum()


@pytest.mark.parametrize("bounded", [False, True])
def test_sparse_and_dense_steps_equal_plain_automatic_differentiation(sae, bounded, monkeypatch):
    monkeypatch.setitem(encoder._CHUNK_ELEMENTS, "cpu", 1)
    raw = activations()
    x = raw / sae.input_scale
    if bounded:  # half of the tokens beyond it, so that none of its terms can be missing
        with torch.no_grad():
            sae.error_bound.copy_((sae(raw).x_hat / sae.input_scale - x).norm(dim=1).median())

    # The oracle: nothing but tensor operations on everything.
    pre_acts, latents = latents_of_step(sae, raw)
    x_hat = latents @ sae.W_dec + sae.b_dec
    step = Step((x - sae.b_dec).detach(), pre_acts, latents, None, selection_of_step(sae, pre_acts), sae.error_bound)
    sums = sae.sums(step)
    terms = sae.terms({name: value / len(x) for name, value in sums.items()})
    error = huber(x - x_hat, sae.error_bound) if bounded else (x - x_hat).square().sum()
    oracle = error / len(x) + sum(terms.values()) + auxk(sae, x, x_hat)
    oracle.backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in expected.values())

    for sparse, rows in ((True, 256), (False, 256), (True, 64), (False, 64)):
        monkeypatch.setattr(encoder, "_CHUNK_ROWS", rows)  # 64: four chunks
        sae.zero_grad()
        loss = sae.loss(raw, sparse=sparse)
        loss.total.backward()
        assert loss.total.item() == pytest.approx(oracle.item(), rel=1e-5)
        for name, p in sae.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item(),
                                       msg=lambda m, name=name, case=(sparse, rows): f"{name}, {case}: {m}")


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIG_DIR / "sae").glob("*.yaml"))])
@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_are_the_same_to_the_bit_with_several_threads(name, sparse):
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))  # large enough for torch to use its threads
    sae = build(config(name, "d_sae=1024", "l0_target=40"), d_in=64, input_scale=8.0)
    sae.initialise(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [torch.autograd.grad(sae.loss(x, sparse=sparse).total, list(sae.parameters())) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    for gradients in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, runs[0], strict=True))


@pytest.mark.parametrize("sparse", [True, False])
def test_mixed_precision_is_near_and_keeps_weights_in_float32(sae, sparse):
    raw = activations()
    exact = torch.autograd.grad(sae.loss(raw, sparse=sparse).total, list(sae.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sae.loss(raw, sparse=sparse)
    assert loss.total.dtype is torch.float32
    rough = torch.autograd.grad(loss.total, list(sae.parameters()))
    for (name, _), a, b in zip(sae.named_parameters(), rough, exact, strict=True):
        assert a.dtype is torch.float32
        if name == "threshold_parameter":  # a few entries are in the window: which, rounding decides
            continue
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98, name
        assert 0.9 < a.norm() / b.norm() < 1.1, name
    assert not all(torch.equal(a, b) for a, b in zip(rough, exact, strict=True)), "nothing was rounded"


def test_the_dense_path_can_be_compiled(sae):
    """As on a CUDA device, by the part of torch's compiler that needs none."""
    raw = activations()
    plain = torch.autograd.grad(sae.loss(raw, sparse=False).total, list(sae.parameters()))
    sae._compiled_piece = torch.compile(sae._piece, backend="aot_eager", dynamic=False)
    sae._piece_on = lambda device, sparse: sae._compiled_piece
    for a, b in zip(torch.autograd.grad(sae.loss(raw, sparse=False).total, list(sae.parameters())), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_latent_that_never_fires_can_learn(sae):
    """AuxK reaches what is below its threshold everywhere; without it such a latent would stay as it is for ever."""
    raw = activations()
    sae.tokens_since_fired.zero_()[3] = 10**9
    if "threshold_parameter" in dict(sae.named_parameters()):
        edge, value = "threshold_parameter", 5.0
    else:
        edge, value = sae.encoder_bias, -50.0 if sae.bias_is_threshold else -0.2
    with torch.no_grad():
        getattr(sae, edge)[3] = value
    assert not (sae.encode(raw)[:, 3] > 0).any()
    gradient = torch.autograd.grad(sae.loss(raw).total, sae.W_enc)[0][:, 3]
    assert gradient.norm() > 0


def test_dense_and_sparse_encoders_agree(sae):
    x = activations()
    torch.testing.assert_close(sae.encode_sparse(x).to_dense(), sae.encode(x))
    torch.testing.assert_close(sae.reconstruct(x), sae(x).x_hat)
    assert (sae.encode(x) >= 0).all()


def test_counts_of_both_paths(sae):
    raw = activations()
    sparse, dense = (sae.loss(raw, sparse=sparse).counts for sparse in (True, False))
    fires = latents_of_step(sae, raw)[1] > 0
    assert torch.equal(sparse.tokens_of, fires.sum(0).float()) and torch.equal(dense.tokens_of, fires.sum(0).float())
    assert int(sparse.n_fired) == int(dense.n_fired) == int(fires.sum())
    pre_acts = latents_of_step(sae, raw)[0]
    excess = ((pre_acts - getattr(sae, "threshold", 0)) * fires).sum(0)
    x_hat = latents_of_step(sae, raw)[1] @ sae.W_dec + sae.b_dec
    error = (x_hat - raw / sae.input_scale).norm(dim=1).double()
    for counts in (sparse, dense):
        torch.testing.assert_close(counts.excess_of, excess, rtol=1e-4, atol=1e-4)
        assert float(counts.squared_error) == pytest.approx(float(error.square().sum()), rel=1e-4)
        assert float(counts.bounded_error) == pytest.approx(float(error.sum()), rel=1e-4)
    assert int(sparse.n_selected) == int(dense.n_selected) >= int(fires.sum())


def test_counters(sae):
    raw = activations()
    sae.tokens_since_fired.fill_(7)
    counts = sae.loss(raw).counts
    l0, error = sae._count(counts)
    assert error == pytest.approx(float(counts.squared_error) / BATCH)
    assert float(sae.error_bound) == pytest.approx(sae.recipe.error_bound * float(counts.bounded_error) / BATCH)
    dense = latents_of_step(sae, raw)[1]
    assert l0 == pytest.approx((dense > 0).sum().item() / BATCH)
    assert float(sae.density) == pytest.approx(int(counts.n_selected) / (BATCH * D_SAE))
    assert torch.equal(sae.tokens_since_fired, torch.where((dense > 0).any(0), 0, 7 + BATCH))


def test_saved_and_loaded_it_means_the_same_on_raw_activations(sae, tmp_path):
    x = activations()
    save_sae(sae, tmp_path, about={"lm": "none"})
    loaded = load_sae(tmp_path)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)
    assert loaded.input_scale == 1 and not loaded.subtract_b_dec and not loaded.training
    again = folded_weights(loaded)  # folding what is folded changes nothing
    for name, weight in folded_weights(sae).items():
        torch.testing.assert_close(again[name], weight)


def test_start_is_near_its_l0(sae):
    fresh = build(config(sae.variant), d_in=D_IN, input_scale=float(sae.input_scale))
    fresh.initialise(activations())
    l0 = (fresh.encode(activations()) > 0).sum().item() / BATCH
    assert l0 == pytest.approx(TARGET, rel=0.3)


def test_directions_start_near_rows_and_no_two_alike(sae):
    x = activations()[: D_SAE // 2]  # fewer rows than latents
    x[0] = x[1:].mean(0)  # this one stands at the mean: it has no direction
    starts = []
    for seed in (0, 0, 1):
        fresh = build(config(sae.variant, f"seed={seed}"), d_in=D_IN, input_scale=1.0)
        fresh.initialise(x)
        starts.append(fresh.W_dec.detach())
        assert torch.allclose(F.normalize(fresh.W_enc.T), fresh.W_dec, atol=1e-5)
    cosines = F.normalize(x - x.mean(0))[1:] @ starts[0].T
    assert (cosines.amax(0) > 0.6).sum() >= D_SAE - 2  # of 12 dimensions; a random direction's largest is about 0.6
    assert float(cosines.amax(1).min()) > 0.75  # every row is somebody's
    assert float((starts[0] @ starts[0].T - 2 * torch.eye(D_SAE)).max()) < 0.9999
    assert torch.equal(starts[0], starts[1]) and not torch.allclose(starts[0], starts[2], atol=0.1)


def test_calibration_meets_the_target_or_comes_as_near_as_half_an_excess_allows(sae):
    x = activations()

    def l0():
        return (sae.encode(x) > 0).sum().item() / BATCH

    def fvu():
        return float((sae(x).x_hat - x).square().sum() / (x - x.mean(0)).square().sum())

    sae._count(sae.loss(x).counts)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.l0_target = l0() if sae.calibrated else sae.l0_target
    sae.raise_thresholds(0.05 * sae.mean_excess)
    off, worse = l0(), fvu()
    found = sae.calibrate(x)
    if sae.calibrated:
        assert off < sae.l0_target and -0.06 < found.shift < -0.03
        assert l0() == pytest.approx(sae.l0_target, abs=2 / BATCH)
        assert (found.l0_before, found.l0_after) == (pytest.approx(off), pytest.approx(l0()))
        assert (found.fvu_before, found.fvu_after) == (pytest.approx(worse, rel=1e-4), pytest.approx(fvu(), rel=1e-4))
    else:
        assert found is None
    sae.load_state_dict(before)
    sae.l0_target = D_SAE - 1
    found = sae.calibrate(x)
    if sae.calibrated:
        assert found.shift == pytest.approx(-0.5, abs=1e-3) and found.l0_before < found.l0_after == pytest.approx(l0())
    else:
        assert found is None and all(torch.equal(value, before[name]) for name, value in sae.named_parameters())


def test_raising_every_threshold_by_its_mean_excess_divides_l0_by_about_e(sae):
    """What the gain of L0 control is chosen by, whatever the variant, if it has thresholds."""
    x = activations()
    for _ in range(20):
        sae._count(sae.loss(x).counts)
    before = (sae.encode(x) > 0).sum().item()
    sae.raise_thresholds(0.2 * sae.mean_excess)
    after = (sae.encode(x) > 0).sum().item()
    assert after == before if not sae.has_threshold else 0.1 < math.log(before / after) < 0.4


@pytest.mark.parametrize("off", [0.8, 1.25])
@pytest.mark.parametrize("end", [False, True])
def test_control_moves_thresholds_towards_the_target(sae, off, end, monkeypatch):
    """Those that are trained as such in every step; biases, whose L0 the coefficient holds, while the rates fall."""
    step = sae.recipe.n_steps - 1 if end else sae.recipe.n_steps // 2 + 1
    monkeypatch.setattr(type(sae), "global_step", step)
    sae._control(off * TARGET)
    moves = sae.controlled and (end or not sae.bias_is_threshold)
    assert (sae._shift != 0) == moves
    if moves:
        left = 0 if end else 0.1  # to the coefficient
        assert sae._shift == pytest.approx(sae.recipe.control_shift * math.copysign(abs(math.log(off)) - left, off - 1))
    sae._shift = 0.0
    sae._control(1.05 * TARGET)
    assert (sae._shift != 0) == (sae.controlled and end)


def test_shifts_keep_thresholds_positive(sae):
    sae.raise_thresholds(torch.full((D_SAE,), -1e3))
    if hasattr(sae, "threshold"):
        assert (sae.threshold > 0).all() and torch.isfinite(sae.threshold).all()
        before = sae.threshold.clone()
        sae.raise_thresholds(torch.full((D_SAE,), 0.25))
        torch.testing.assert_close(sae.threshold, before + 0.25)


def test_nothing_of_a_data_dependent_start_depends_on_where_the_origin_is(sae):
    x, far = activations(), torch.linspace(-40, 90, D_IN)
    starts = []
    for shift in (0, far):
        fresh = build(config(sae.variant), d_in=D_IN, input_scale=1.0)
        fresh.initialise(x + shift)
        starts.append((fresh, x + shift))
    (one, at_one), (other, at_other) = starts
    torch.testing.assert_close(one.input_scale, other.input_scale, rtol=1e-4, atol=0)
    a, b = one.encode(at_one), other.encode(at_other)
    # A latent's own quantile stands at its threshold to the bit, where rounding decides.
    assert ((a - b).abs() <= 2e-3 * (1 + a)).float().mean() > 0.99


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIG_DIR / "sae").glob("*.yaml"))])
def test_the_papers_recipe_has_fixed_coefficients_and_nothing_that_the_paper_has_not(name):
    arguments = {"d_in": D_IN, "input_scale": 1.0}
    if variant_class(config(name)["sae"]["variant"]).has_coefficient:
        said = r"recipe\.l0_control is false, and sae\.sparsity_coefficient is null; give"
        with pytest.raises(ValueError, match=said):
            build(config(name, "recipe=paper"), **arguments)
        sae = build(config(name, "recipe=paper", "sae.sparsity_coefficient=0.1"), **arguments)
        assert build(config(name, "recipe=paper", "recipe.l0_control=true"), **arguments).controlled
    else:
        sae = build(config(name, "recipe=paper"), **arguments)
    x = activations()
    start = {key: value.clone() for key, value in sae.named_parameters()}
    sae.initialise(x)
    assert not sae.controlled and sae.calibrate(x) is None
    assert all(torch.equal(value, start[key]) for key, value in sae.named_parameters())
    sae._count(sae.loss(x).counts)
    assert sae.error_bound.isinf() and config(name, "recipe=paper")["data"]["max_norm"] is None


def test_weights_are_a_function_of_the_seed(sae):
    built = [build(config(sae.variant, f"seed={s}"), d_in=D_IN, input_scale=1.0).W_enc for s in (0, 0, 1)]
    assert torch.equal(built[0], built[1]) and not torch.equal(built[0], built[2])


def test_wrong_width_is_one_clear_error(sae):
    with pytest.raises(ValueError, match=rf"x has shape \[3, {D_IN + 1}\]; expected \[batch, d_in = {D_IN}\]"):
        sae(torch.zeros(3, D_IN + 1))


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIG_DIR / "sae").glob("*.yaml"))])
@pytest.mark.parametrize("target", [0, -3, D_SAE + 1])
def test_bad_targets(name, target):
    with pytest.raises(ValueError, match=f"l0_target is {target}.*{D_SAE}"):
        build(config(name, f"l0_target={target}"), d_in=D_IN, input_scale=1.0)
