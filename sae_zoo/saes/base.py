"""Base of every SAE: parameters, input scale, encode and decode, and the training loss on the active set.

One training step, the same for every variant: ``selection`` (which entries are active: one rule for the whole batch) ->
encoder GEMM -> ``latents`` (what value each takes) -> decode over the active set -> squared error + what the variant
adds -> backward over the active set. A variant gives ``selection``, ``latents``, ``sums`` and ``terms``: its equation
and nothing else. Whether a step runs on the active set or densely is decided from the density that the step before
measured; both give the same gradients, and neither holds the pre-activations of more than a chunk of tokens.

Training works in units where E||x||^2 = 1 (``input_scale`` divides raw activations); everything public takes and gives
raw activations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sae_zoo.functional import workspace
from sae_zoo.functional.auxk import auxk_error
from sae_zoo.functional.decoder import normalise_rows_, squared_error
from sae_zoo.functional.encoder import chunk_rows, dense_pre_acts, products, sparse_pre_acts
from sae_zoo.functional.kernels import has_kernels
from sae_zoo.functional.processes import mean_over_processes
from sae_zoo.functional.selection import LargestOfBatch, Selection
from sae_zoo.functional.sparse_code import ActiveSet, SparseCode, sparse_decode
from sae_zoo.saes.lightning import LightningSAE
from sae_zoo.training.recipe import Recipe
from sae_zoo.training.schedules import auxk_factor


@dataclass(frozen=True, eq=False)
class SAEOutput:
    """Attributes: ``x_hat`` [batch, d_in] raw reconstruction; ``latents`` [batch, d_sae]."""

    x_hat: Tensor
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts of what fired in a step, and its errors.

    Attributes:
        tokens_of: [d_sae] float32: on how many tokens each latent was above 0.
        excess_of: [d_sae] float32: :meth:`SAE.excess` of each latent, summed over these tokens.
        n_selected: number of pairs in the active set, which the sparse path pays for.
        squared_error, bounded_error: sums over the tokens of ||x_hat - x||^2 and of ||x_hat - x||, the latter of at
            most :attr:`Step.error_bound` for each, float64.
        n_tokens: tokens.
    """

    tokens_of: Tensor
    excess_of: Tensor
    n_selected: Tensor
    squared_error: Tensor
    bounded_error: Tensor
    n_tokens: int

    @property
    def n_fired(self) -> Tensor:
        """Number of (token, latent) pairs above 0, float64."""
        return self.tokens_of.sum(dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class SAELoss:
    """Attributes: ``total`` (what is minimised), ``terms`` (its parts by name), ``counts``, ``selection`` (of the
    step).
    """

    total: Tensor
    terms: dict[str, Tensor]
    counts: Counts
    selection: Selection


@dataclass(frozen=True, eq=False)
class Step:
    """The tensors of one training step, or of some of its tokens, in normalised units; elementwise ones are
    [tokens, d_sae] on the dense path and [n_active] on the sparse one, so that a variant's formulas serve both.

    Attributes:
        target: [tokens, d_in], x - b_dec: what the decoder has to make; a constant.
        pre_acts, latents: pre-activations and the latents made from them.
        active: the active set; None on the dense path.
        selection: the rule of the step, one for the whole batch.
        error_bound: [], the length of a token's error above which it pulls no harder.
    """

    target: Tensor
    pre_acts: Tensor
    latents: Tensor
    active: ActiveSet | None
    selection: Selection
    error_bound: Tensor

    @property
    def latent_ids(self) -> Tensor | None:
        """[n_active]: the latent of each entry; None on the dense path."""
        return None if self.active is None else self.active.latent_ids

    def of_latent(self, parameter: Tensor) -> Tensor:
        """A [d_sae] parameter, laid out as ``pre_acts`` is."""
        return at_latents(parameter, self.latent_ids)

    def squared_error(self, values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`sae_zoo.functional.decoder.squared_error` of a reconstruction from values laid out as ``pre_acts``."""
        return squared_error(values, W_dec, b_dec, self.target, self.active, self.error_bound)


def at_latents(parameter: Tensor, ids: Tensor | None) -> Tensor:
    """``parameter`` [d_sae], or its entries at ``ids``."""
    # Not parameter[ids]: its gradient is added up by several threads in no fixed order, and a run could not be repeated
    # or resumed to the bit.
    return parameter if ids is None else parameter.index_select(0, ids)


class SAE(LightningSAE, ABC):
    """A sparse autoencoder with one hidden layer.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        input_scale: C = sqrt(E||x||^2); raw activations are divided by it inside.
        subtract_b_dec: subtract ``b_dec`` before the encoder (in training; folded into the encoder's bias on export).
        recipe: how to train; None for an SAE that is only used.
        l0_target: L0 on held-out tokens to train towards.
        sparsity_coefficient: a fixed coefficient of the sparsity term; turns L0 control off.
        initial_coefficient: where L0 control starts.
        auxk_coefficient: weight of the AuxK loss (:mod:`sae_zoo.functional.auxk`), in which the d_in / 2 largest
            latents of those that are ``dead`` reconstruct what the others leave.
        seed: of the initial weights.

    Raises:
        ValueError: if a value is out of bounds, or neither a target nor a coefficient says how sparse to be.
    """

    variant: ClassVar[str]
    encoder_bias: ClassVar[str] = "b_enc"
    bias_is_threshold: ClassVar[bool] = False  # whether a latent is active as soon as its pre-activation is above 0
    # On which side of this share of active entries the dense path is faster (benchmarks measures it).
    sparse_below_density: ClassVar[float] = 0.15

    def __init__(self, *, d_in: int, d_sae: int, input_scale: float = 1.0, subtract_b_dec: bool = True,
                 recipe: Recipe | None = None, l0_target: float | None = None,
                 sparsity_coefficient: float | None = None, initial_coefficient: float = 1e-3,
                 auxk_coefficient: float = 0.0, seed: int = 0):
        super().__init__(d_sae=d_sae, recipe=recipe, l0_target=l0_target, sparsity_coefficient=sparsity_coefficient,
                         initial_coefficient=initial_coefficient)
        for name, value in (("d_in", d_in), ("d_sae", d_sae), ("input_scale", input_scale)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not auxk_coefficient >= 0:
            raise ValueError(f"sae.auxk_coefficient is {auxk_coefficient}; it must not be negative")
        self.d_in, self.subtract_b_dec, self.auxk_coefficient, self.seed = d_in, subtract_b_dec, auxk_coefficient, seed

        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.rand(d_sae, d_in, generator=generator) * 2 - 1
        normalise_rows_(W_dec)
        # W_enc is [d_in, d_sae] but column after column in memory: its gradient is born as rows of latents.
        self.W_enc = nn.Parameter(W_dec.clone().T)
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_parameter(self.encoder_bias, nn.Parameter(torch.zeros(d_sae)))
        self.register_buffer("input_scale", torch.tensor(float(input_scale)))
        self._compiled_piece: Callable[..., tuple[dict[str, Tensor], Counts, Tensor]] | None = None

    # What a variant says.

    @abstractmethod
    def selection(self, *, training: bool) -> Selection | LargestOfBatch:
        """The rule that picks active entries. In training it also picks entries that are zero but receive a gradient
        (those inside a threshold's window). Of a training step it is asked once, and what its ``of_batch`` makes of the
        whole batch is the rule of the step.
        """

    def observe(self, selection: Selection) -> None:
        """Keep of the ``selection`` of a training step what inference needs, in a buffer that all devices agree on."""

    @abstractmethod
    def latents(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        """Values of latents, elementwise on pre-activations: [tokens, d_sae] with ``ids`` None, or [n_active] with the
        latent of each entry.
        """

    def dense_latents(self, pre_acts: Tensor, selection: Selection) -> Tensor:
        """Values of all latents [tokens, d_sae]; not :meth:`latents` alone where a row's choice is not elementwise."""
        return self.latents(pre_acts, None)

    def sums(self, step: Step) -> dict[str, Tensor]:
        """Extra loss ingredients of this variant, by name, each summed over the tokens of ``step``; ``terms`` gets them
        divided by the batch size.
        """
        return {}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms, coefficients included, from :meth:`sums` over the batch divided by its tokens."""
        return {}

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1."""
        return True

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments of the variant that its inference depends on."""
        return {}

    @torch.no_grad()
    def start_at(self, quantiles: Tensor) -> None:
        """Start so that each latent is active where its pre-activation exceeds ``quantiles`` [d_sae]."""
        getattr(self, self.encoder_bias).sub_(quantiles)

    def excess(self, pre_acts: Tensor, ids: Tensor | None) -> Tensor:
        """Excess of pre-activations over what makes a latent active; laid out as :meth:`latents` takes them."""
        return pre_acts

    @torch.no_grad()
    def raise_thresholds(self, shift: Tensor) -> None:
        """Raise every threshold by ``shift`` [d_sae], normalised units; a negative shift lowers it."""
        getattr(self, self.encoder_bias).sub_(shift)

    # What is saved: weights that act on raw activations.

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Weights by the field's names, with the input scale C and the subtraction of ``b_dec`` folded in:
        b_enc' = C b_enc - C W_enc b_dec, b_dec' = C b_dec. A variant adds its own.
        """
        bias = getattr(self, self.encoder_bias)
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_dec": self.input_scale * self.b_dec,
                self.encoder_bias: self.input_scale * (bias - self.encoded_b_dec)}

    @property
    def encoded_b_dec(self) -> Tensor:
        """[d_sae]: what a bias on the encoder's output loses where ``b_dec`` is no longer subtracted."""
        return self.b_dec @ self.W_enc if self.subtract_b_dec else torch.zeros_like(getattr(self, self.encoder_bias))

    @torch.no_grad()
    def load_folded(self, weights: dict[str, Tensor]) -> None:
        """Take what :meth:`folded` gives, of an SAE with scale 1 that subtracts nothing."""
        for name in ("W_enc", "W_dec", "b_dec", self.encoder_bias):
            getattr(self, name).copy_(weights[name])

    # Raw activations in, raw reconstruction out.

    def _normalise(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"x has shape {list(x.shape)}; expected [batch, d_in = {self.d_in}]")
        return torch.div(x.to(self.W_dec.dtype), self.input_scale, out=out)

    def _centre(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.subtract_b_dec else x

    def _selection_of_rows(self) -> Selection:
        selection = self.selection(training=False)
        assert isinstance(selection, Selection)  # outside training no variant looks at the whole batch
        return selection

    def encode(self, x: Tensor) -> Tensor:
        """Latents [batch, d_sae], in raw units, of raw activations [batch, d_in]; differentiable."""
        pre_acts = torch.addmm(getattr(self, self.encoder_bias), self._centre(self._normalise(x)), self.W_enc)
        return self.dense_latents(pre_acts, self._selection_of_rows()) * self.input_scale

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """:meth:`encode` without the zeros, and without the memory that they would take."""
        pre_acts, active = sparse_pre_acts(
            self._centre(self._normalise(x)), self.W_enc, getattr(self, self.encoder_bias), None,
            self._selection_of_rows(),
        )
        return SparseCode(active, self.latents(pre_acts, active.latent_ids) * self.input_scale)

    def decode(self, latents: Tensor | SparseCode) -> Tensor:
        """Raw reconstruction [batch, d_in] of latents in raw units, dense or sparse."""
        decoded = sparse_decode(latents, self.W_dec) if isinstance(latents, SparseCode) else latents @ self.W_dec
        return decoded + self.b_dec * self.input_scale

    def forward(self, x: Tensor) -> SAEOutput:
        latents = self.encode(x)
        return SAEOutput(self.decode(latents), latents)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw reconstruction [batch, d_in] through the active set."""
        return self.decode(self.encode_sparse(x))

    # The training step.

    def run(self, target: Tensor, selection: Selection, *, sparse: bool, error_bound: Tensor) -> Step:
        """The encoder's half of a step, of normalised activations less ``b_dec``, [tokens, d_in]."""
        b_dec = self.b_dec if self.subtract_b_dec else None
        arguments = (self._encoder_input(target), self.W_enc, getattr(self, self.encoder_bias), b_dec)
        if sparse:
            pre_acts, active = sparse_pre_acts(*arguments, selection)
            return Step(target, pre_acts, self.latents(pre_acts, active.latent_ids), active, selection, error_bound)
        pre_acts = dense_pre_acts(*arguments)
        return Step(target, pre_acts, self.dense_latents(pre_acts, selection), None, selection, error_bound)

    def selection_of(self, target: Tensor) -> Selection:
        """The rule of a training step on normalised activations less ``b_dec``, [batch, d_in]."""
        bias = getattr(self, self.encoder_bias).detach()
        return self.selection(training=True).of_batch(
            lambda: products(self._encoder_input(target), self.W_enc), bias, len(target))

    def _encoder_input(self, target: Tensor) -> Tensor:
        return target if self.subtract_b_dec else target + self.b_dec.detach()

    @torch.no_grad()
    def _counts(self, step: Step, error_norms: Tensor) -> Counts:
        firing = step.latents > 0
        excess = self.excess(step.pre_acts, step.latent_ids) * firing
        if step.active is None:
            tokens_of, excess_of = firing.sum(0, dtype=torch.float32), excess.sum(0, dtype=torch.float32)
            n_selected = step.selection.mask(step.pre_acts).sum()
        else:
            tokens_of, excess_of = map(step.active.sum_by_latent, (firing.float(), excess.float()))
            n_selected = torch.tensor(len(firing), device=firing.device)
        return Counts(tokens_of, excess_of, n_selected, error_norms.square().sum(dtype=torch.float64),
                      error_norms.clamp_max(step.error_bound).sum(dtype=torch.float64), len(step.target))

    def _piece(self, target: Tensor, selection: Selection, sparse: bool, error_bound: Tensor
               ) -> tuple[dict[str, Tensor], Counts, Tensor]:
        step = self.run(target, selection, sparse=sparse, error_bound=error_bound)
        sums = self.sums(step)  # first: what they use up to a sum is free again for the reconstruction
        sums["reconstruction"], error, norms = step.squared_error(step.latents, self.W_dec, self.b_dec)
        return sums, self._counts(step, norms), error

    def _piece_on(self, device: torch.device, sparse: bool) -> Callable[..., tuple[dict[str, Tensor], Counts, Tensor]]:
        # On a CUDA device the dense path's elementwise passes over [tokens, d_sae] cost as much as its products, unless
        # they are compiled into few. The sparse path has kernels of its own, and sizes that change with every batch.
        if sparse or device.type != "cuda":
            return self._piece
        if self._compiled_piece is None:
            self._compiled_piece = torch.compile(self._piece, dynamic=False)
        return self._compiled_piece

    @property
    def auxk_weight(self) -> float:
        """Weight of the AuxK loss in this run."""
        return self.auxk_coefficient * auxk_factor(self._recipe.n_steps, self._recipe.auxk_full_steps)

    def _auxk(self, target: Tensor, errors: tuple[Tensor, ...], mean_error: Tensor) -> dict[str, Tensor]:
        if not self.auxk_coefficient or not len(dead := self.dead.nonzero().squeeze(1)):
            return {}
        # A latent whose bias is its threshold is dead because its pre-activation is never above 0: without the bias it
        # is.
        bias = None if self.bias_is_threshold else getattr(self, self.encoder_bias).index_select(0, dead)
        residual = -torch.cat(errors)
        residual *= (self.error_bound / torch.linalg.vector_norm(residual, dim=1, keepdim=True)).clamp_max(1)
        missed = auxk_error(self._encoder_input(target), residual, self.W_enc.index_select(1, dead), bias,
                            self.W_dec.index_select(0, dead), self.d_in // 2)
        # Over what there was to make, as in the authors' code.
        return mean_over_processes({"auxk": self.auxk_weight * missed / (len(target) * mean_error.clamp_min(1e-12))})

    def loss(self, x: Tensor, *, sparse: bool | None = None) -> SAELoss:
        """The training loss of raw activations [batch, d_in], in normalised units.

        Args:
            sparse: run on the active set or densely; None decides by the density measured last.
        """
        if sparse is None:
            sparse = has_kernels(x.device.type) and float(self.density) < self.sparse_below_density
        bound = self.error_bound.clone()  # it moves on before the backward pass computes chunks again
        piece_of = self._piece_on(x.device, sparse)
        with torch.no_grad():
            target = self._normalise(x, workspace.empty(*x.shape, like=self.b_dec)).sub_(self.b_dec)
            selection = self.selection_of(target)
        rows = len(x) if sparse else chunk_rows(x, self.d_sae)
        if rows >= len(x):
            pieces = [piece_of(target, selection, sparse, bound)]
        else:  # nothing of a chunk but its sums and error is kept for the backward pass, which computes it again
            pieces = [checkpoint(piece_of, piece, selection, sparse, bound, use_reentrant=False)
                      for piece in target.split(rows)]
        sums, counts, errors = zip(*pieces, strict=True)
        means = mean_over_processes({name: sum(piece[name] for piece in sums) / len(x) for name in sums[0]})
        reconstruction = means.pop("reconstruction")
        terms = {"reconstruction": reconstruction, **self.terms(means),
                 **self._auxk(target, errors, reconstruction.detach())}
        total = sum(terms.values())
        assert isinstance(total, Tensor)  # there are terms
        return SAELoss(total, terms, Counts(
            sum(c.tokens_of for c in counts), sum(c.excess_of for c in counts),
            sum(c.n_selected for c in counts), sum(c.squared_error for c in counts),
            sum(c.bounded_error for c in counts), len(x)), selection)
