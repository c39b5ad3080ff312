"""The linear encoder with selection: from inputs to a sparse code without ever keeping the `[N, F]` pre-activations.

Pre-activations are made one block of rows at a time, so that a block stays in the cache while the activation function
picks from it. Only what is picked is kept; the backward pass works on the code's entries alone.

Encoders of one site, of several that share one product (a crosscoder's heads) and of several with a product each (a
cross-layer transcoder's layers) differ in how a block is made and in which rows their gradients read; selection is one.

Letters: N tokens, S sites, R = N * S rows of the code, B tokens of a block, D width, F latents, E entries of the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import ALONE, Axis
from lm_saes.latents import kernels
from lm_saes.latents.activations.base import ActivationFunction, Missed
from lm_saes.latents.activations.thresholds import threshold_gradient
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.encode.dense import encode_dense
from lm_saes.latents.encode.products import product, product_dtype, rows_at_once
from lm_saes.latents.gradients.rows import RowGradients, chosen_rows, receiver
from lm_saes.latents.offsets import offsets_of_lengths, offsets_of_rows, places_of_columns
from lm_saes.latents.selection.density import sparse_pays
from lm_saes.latents.selection.strategies import Found, find_best, find_best_of_layers

PROBE_TOKENS = 64
"""So many tokens tell how dense a batch is."""


@dataclass(frozen=True, eq=False)
class LinearEncoder:
    """`h = x W + b`, or with a gate (GLU) `h = (x W + b) * sigmoid(x Wg + bg)`.

    Weights are `[D, F]`, best stored latent-major (`W.T` contiguous): then gradients are written where latents lie.
    With `n_sites` above 1 all sites share this `h`, and select on it by their own scales. Over the axis `shared`
    inputs and `W` are cut by width: its processes add their `x W` up, and `b` is that of all.
    """

    W_DF: Tensor
    b_F: Tensor
    gate_W_DF: Tensor | None = None
    gate_b_F: Tensor | None = None
    n_sites: int = 1
    W_of: Tensor | None = None
    """The parameter that `W_DF` is a view of, if it is not one itself."""
    shared: Axis = ALONE

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """Dense `h [R, F]` in the bias's type, differentiable."""
        if self.shared.size == 1:
            h_NF = torch.addmm(self.b_F, x_ND, self.W_DF).to(self.b_F.dtype)
        else:
            h_NF = self.shared.leave((x_ND @ self.W_DF).to(self.b_F.dtype)) + self.b_F
        if self.gate_W_DF is not None and self.gate_b_F is not None:
            h_NF = h_NF * torch.sigmoid(torch.addmm(self.gate_b_F, x_ND, self.gate_W_DF).to(self.b_F.dtype))
        return h_NF if self.n_sites == 1 else h_NF.repeat_interleave(self.n_sites, 0)

    def rows(self, latents: Tensor) -> LinearEncoder:
        """The encoder of some latents alone."""

        def some(p: Tensor, of: Tensor | None = None) -> Tensor:
            return chosen_rows(p if of is None else of, p.movedim(-1, 0), latents).movedim(0, -1)

        gate, gate_b = (None if p is None else some(p) for p in (self.gate_W_DF, self.gate_b_F))
        return LinearEncoder(some(self.W_DF, self.W_of), some(self.b_F), gate, gate_b, shared=self.shared)

    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.W_DF, self.b_F, self.gate_W_DF, self.gate_b_F

    @property
    def n_latents(self) -> int:
        return len(self.b_F)

    @property
    def is_plain(self) -> bool:
        """Whether it is `x W + b` for a single site, all of it here, in a type that sums can be made in."""
        return self.gate_W_DF is None and self.n_sites == self.shared.size == 1 and self.b_F.dtype.itemsize >= 4

    def product(self, x_BD: Tensor, out: Tensor) -> Tensor:
        """`x W` written to `out [B, 1, F]`."""
        product(x_BD, self.W_DF, out[:, 0])
        self.shared.add_up(out)()
        return out

    def gate(self, x_BD: Tensor, like: Tensor) -> Tensor | None:
        """The gate's sigmoid, `[B, 1, F]`; None without a gate."""
        if self.gate_W_DF is None or self.gate_b_F is None:
            return None
        gate = torch.empty_like(like)
        product(x_BD, self.gate_W_DF, gate[:, 0])
        return gate.add_(self.gate_b_F).sigmoid_()

    def computing_in(self, dtype: torch.dtype) -> LinearEncoder:
        """The same encoder with weights in the type that products are computed in; biases keep theirs."""
        gate = None if self.gate_W_DF is None else self.gate_W_DF.to(dtype)
        return LinearEncoder(self.W_DF.to(dtype), self.b_F, gate, self.gate_b_F, self.n_sites, shared=self.shared)

    def readers(self, x_ND: Tensor, pattern: Pattern) -> tuple[Pattern, Tensor]:
        """A pattern of the same entries by this encoder's latents, and the rows of inputs that it refers to."""
        if self.n_sites == 1:
            return pattern, x_ND
        indices = pattern.indices % self.n_latents
        return Pattern(indices, pattern.offsets[:: self.n_sites], self.n_latents), x_ND

    def receivers(self) -> list[RowGradients | None]:
        """Who takes the gradients of weights and gate's weights as rows."""
        of_W = receiver(self.W_DF if self.W_of is None else self.W_of, self.W_DF.T)
        return [of_W, None if self.gate_W_DF is None else receiver(self.gate_W_DF, self.gate_W_DF.T)]


@dataclass(frozen=True, eq=False)
class LayeredEncoder:
    """Each site (layer) reads its own input: `h_l = x_l W_l + b_l`; `W [S, D, F]`, `b [S, F]`, inputs `[N, S * D]`."""

    W_SDF: Tensor
    b_SF: Tensor

    @property
    def n_sites(self) -> int:
        return len(self.b_SF)

    @property
    def n_latents(self) -> int:
        return self.b_SF.shape[1]

    def parameters(self) -> tuple[Tensor, Tensor, None, None]:
        return self.W_SDF, self.b_SF, None, None

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """Dense `h [R, F]`, differentiable."""
        x_NSD = x_ND.view(len(x_ND), self.n_sites, -1)
        h_SNF = torch.baddbmm(self.b_SF[:, None], x_NSD.transpose(0, 1), self.W_SDF).to(self.b_SF.dtype)
        return h_SNF.transpose(0, 1).reshape(-1, self.n_latents)

    def product(self, x_BD: Tensor, out: Tensor) -> Tensor:
        """`x_l W_l` written to `out [B, S, F]`."""
        for x_BD_l, W_DF, out_BF in zip(
            x_BD.view(len(x_BD), self.n_sites, -1).unbind(1), self.W_SDF, out.unbind(1), strict=True
        ):
            product(x_BD_l, W_DF, out_BF)
        return out

    def gate(self, x_BD: Tensor, like: Tensor) -> None:
        """There is none."""
        return None

    def computing_in(self, dtype: torch.dtype) -> LayeredEncoder:
        """The same encoder with weights in the type that products are computed in."""
        return LayeredEncoder(self.W_SDF.to(dtype), self.b_SF)

    def readers(self, x_ND: Tensor, pattern: Pattern) -> tuple[Pattern, Tensor]:
        """Entries are numbered by site and latent and read their own site's inputs: the code's pattern as it is."""
        return pattern, x_ND.view(len(x_ND) * self.n_sites, -1)

    def receivers(self) -> list[RowGradients | None]:
        """Who takes the gradient of the weights as rows."""
        return [receiver(self.W_SDF, self.W_SDF.mT)]


Encoder = LinearEncoder | LayeredEncoder


@dataclass(frozen=True, eq=False)
class _Picks:
    """What selection found: where the entries are, and what the backward pass needs to know of each."""

    pattern: Pattern
    """Rows are (token, site); latents are numbered `site * F + latent`."""
    linear_E: Tensor
    """The linear part `x W + b` at the entries (equal to `h` without a gate)."""
    gate_E: Tensor | None
    """The gate's sigmoid at the entries."""
    kept_E: Tensor
    in_window_E: Tensor | None
    """Entries, kept or not, that move their latent's threshold."""

    @property
    def values_E(self) -> Tensor:
        h_E = self.linear_E if self.gate_E is None else self.linear_E * self.gate_E
        return torch.where(self.kept_E, h_E, 0.0)


def encode(
    x_ND: Tensor,
    encoder: Encoder,
    activation: ActivationFunction,
    scale_SF: Tensor | None,
    mask_N: Tensor | None,
    dense: bool | None = None,
    density_scale: float = 1.0,
) -> Code:
    """Encode and select: a code with one row per token and site.

    Args:
        x_ND: normalised inputs (of all sites side by side).
        scale_SF: decoder norms, `[F]` or `[S, F]`, if selection is gated by them (no gradient flows through selection),
            else None.
        mask_N: valid tokens; only batch-wide selection looks at it.
        dense: force the dense (True) or sparse (False) path; None lets the density decide. Both give the same numbers.
        density_scale: how many times the usual share of latents may be active before the dense path is taken.
    """
    n_sites, n_latents = encoder.n_sites, encoder.n_latents
    expected = activation.expected_entries(n_latents, n_sites)
    if dense is None and expected is not None:
        dense = not sparse_pays(expected, n_latents * density_scale)
    elif dense is None:
        dense = not _few_active(x_ND, encoder, activation, scale_SF, density_scale)
    if dense and isinstance(encoder, LinearEncoder) and encoder.is_plain and activation.judges_entries:
        scale_F = None if scale_SF is None else scale_SF.view(-1)
        return encode_dense(x_ND, encoder.W_DF, encoder.b_F, activation, scale_F, mask_N)
    if dense:
        return DenseCode(activation.dense(encoder.pre_activations(x_ND), scale_SF, mask_N, n_sites), n_sites)
    picks = _select(x_ND, encoder, activation, scale_SF, mask_N)
    values_E = _Attach.apply(
        x_ND, *encoder.parameters(), activation.log_threshold, scale_SF, activation.window, picks, encoder
    )
    return SparseCode(values_E, picks.pattern, n_sites, activation.even_sites)  # type: ignore[arg-type]


@torch.no_grad()
def _few_active(
    x_ND: Tensor, encoder: Encoder, activation: ActivationFunction, scale_SF: Tensor | None, density_scale: float
) -> bool:
    """Whether so few entries of some of the tokens are candidates that the sparse path is faster."""
    some_ND = x_ND[:: max(1, len(x_ND) // PROBE_TOKENS)]
    activation.begin(None, len(some_ND) * activation.rows_per_token(encoder.n_sites))
    _, block = next(_blocks(some_ND, encoder, scale_SF))
    s_BF = block.s_BSF.view(len(block.s_BSF) * activation.rows_per_token(encoder.n_sites), -1)
    active = activation.candidates(s_BF, slice(0, len(s_BF))).count_nonzero()
    if activation.training and machine.waits_cost(active.device):
        return activation.density.sparse_paid(active, s_BF.numel() * density_scale)
    return sparse_pays(float(active), s_BF.numel() * density_scale)


@torch.no_grad()
def _select(
    x_ND: Tensor, encoder: Encoder, activation: ActivationFunction, scale_SF: Tensor | None, mask_N: Tensor | None
) -> _Picks:
    """Look at all blocks and keep what the activation function picks."""
    n_sites = encoder.n_sites
    if (best := _find_best(x_ND, encoder, activation, scale_SF, mask_N)) is not None:
        return _assemble([best], activation, encoder)
    activation.begin(activation.mask_rows(mask_N, n_sites), len(x_ND) * activation.rows_per_token(n_sites))
    while True:
        found = [_look(block, activation, tokens) for tokens, block in _blocks(x_ND, encoder, scale_SF)]
        try:
            return _assemble(found, activation, encoder)
        except Missed:
            continue


def _find_best(
    x_ND: Tensor, encoder: Encoder, activation: ActivationFunction, scale_SF: Tensor | None, mask_N: Tensor | None
) -> Found | None:
    if isinstance(encoder, LayeredEncoder):
        x_NSD = x_ND.view(len(x_ND), encoder.n_sites, -1)
        return find_best_of_layers(x_NSD, encoder.W_SDF, encoder.b_SF, activation, scale_SF)
    return find_best(x_ND, encoder.W_DF, encoder.b_F, activation, scale_SF, mask_N) if encoder.is_plain else None


@dataclass(frozen=True, eq=False)
class _Block:
    """One block of tokens before selection: `s`, and what `h` is made of (the product without its bias, the gate).

    Sites that share a product have it as `[B, 1, F]`.
    """

    s_BSF: Tensor
    product_BSF: Tensor
    gate_BSF: Tensor | None


def _blocks(x_ND: Tensor, encoder: Encoder, scale_SF: Tensor | None) -> Iterator[tuple[slice, _Block]]:
    """Blocks of tokens, each overwritten by the next: `s = (x W + b) * gate * scale`."""
    n_sites, n_latents = encoder.n_sites, encoder.n_latents
    encoder, x_ND = encoder.computing_in(product_dtype(x_ND)), x_ND.to(product_dtype(x_ND))
    b = encoder.parameters()[1]
    size = min(len(x_ND), rows_at_once(x_ND.device, 4 * n_sites * n_latents))
    products = 1 if isinstance(encoder, LinearEncoder) else n_sites
    product_BSF, s_BSF = b.new_empty(size, products, n_latents), b.new_empty(size, n_sites, n_latents)
    shift_SF = b.view(-1, n_latents) if scale_SF is None else b.view(-1, n_latents) * scale_SF
    for start in range(0, len(x_ND), size):
        tokens = slice(start, min(start + size, len(x_ND)))
        n = tokens.stop - start
        xW = encoder.product(x_ND[tokens], product_BSF[:n])
        gate = encoder.gate(x_ND[tokens], xW)
        if scale_SF is None:
            s = torch.add(xW.expand_as(s_BSF[:n]), shift_SF, out=s_BSF[:n])
        else:
            s = torch.addcmul(shift_SF, xW.expand_as(s_BSF[:n]), scale_SF, out=s_BSF[:n])
        yield tokens, _Block(s if gate is None else s.mul_(gate), xW, gate)


def _look(block: _Block, activation: ActivationFunction, tokens: slice) -> Found:
    """Read one block at the activation function's candidates."""
    n_tokens, n_sites, n_latents = block.s_BSF.shape
    per_token = activation.rows_per_token(n_sites)
    rows, width = slice(tokens.start * per_token, tokens.stop * per_token), n_sites * n_latents // per_token
    candidates = activation.candidates(block.s_BSF.view(n_tokens * per_token, -1), rows)
    if candidates.dtype == torch.bool:
        flat = candidates.view(-1).nonzero().squeeze(1)
        lengths = candidates.view(-1, n_latents).sum(1)
    elif candidates.ndim == 1 or per_token < n_sites:
        flat = candidates if candidates.ndim == 1 else places_of_columns(candidates.sort(1).values, width)
        offsets = offsets_of_rows(flat // n_latents, n_tokens * n_sites)
        lengths = offsets[1:] - offsets[:-1]
    else:
        flat = places_of_columns(candidates, width)
        lengths = torch.full((n_tokens * n_sites,), candidates.shape[1], device=candidates.device)
    indices = flat % (n_sites * n_latents)
    shared = block.product_BSF.shape[1] < n_sites
    source = flat // (n_sites * n_latents) * n_latents + flat % n_latents if shared else flat
    product_E = block.product_BSF.reshape(-1).index_select(0, source)
    gate_E = None if block.gate_BSF is None else block.gate_BSF.reshape(-1).index_select(0, source)
    return Found(lengths, indices.to(torch.int32), block.s_BSF.view(-1).index_select(0, flat), product_E, gate_E)


def _assemble(found: list[Found], activation: ActivationFunction, encoder: Encoder) -> _Picks:
    """Join the blocks and decide which entries are active."""
    s_E = torch.cat([f.s_E for f in found])
    indices = torch.cat([f.indices for f in found])
    offsets = offsets_of_lengths(torch.cat([f.lengths for f in found]))
    bias = encoder.parameters()[1]
    linear_E = torch.cat([f.product_E for f in found]) + bias.view(-1).index_select(0, indices % bias.numel())
    gates = [f.gate_E for f in found if f.gate_E is not None]
    chosen = activation.choose(s_E, Pattern(indices, offsets, encoder.n_sites * encoder.n_latents))
    gate_E = chosen.of(torch.cat(gates)) if gates else None
    return _Picks(chosen.pattern, chosen.of(linear_E), gate_E, chosen.kept_E, chosen.in_window_E)


class _Attach(torch.autograd.Function):
    """The values of the picked entries, with the encoder's gradients attached."""

    @staticmethod
    def forward(ctx, x_ND, W, b, gate_W_DF, gate_b_F, log_theta, scale_SF, window, picks, encoder):  # type: ignore[override]
        ctx.save_for_backward(x_ND, W, gate_W_DF, log_theta, scale_SF)
        ctx.window, ctx.picks, ctx.encoder, ctx.receivers = window, picks, encoder, encoder.receivers()
        return picks.values_E

    @staticmethod
    def backward(ctx, dvalues_E):  # type: ignore[override]
        x_ND, W, gate_W_DF, log_theta, scale_SF = ctx.saved_tensors
        picks: _Picks = ctx.picks
        encoder: Encoder = ctx.encoder
        dh_E = torch.where(picks.kept_E, dvalues_E, 0.0)
        dtheta = None
        if picks.in_window_E is not None and ctx.needs_input_grad[5]:
            window_SF = picks.pattern.latent_total(torch.where(picks.in_window_E, dvalues_E, 0.0))
            dtheta = threshold_gradient(window_SF.view(-1, encoder.n_latents), log_theta, scale_SF, ctx.window)
        if picks.gate_E is None:
            parts = [(dh_E, W, ctx.receivers[0])]
        else:
            dgate_E = dh_E * picks.linear_E * picks.gate_E * (1 - picks.gate_E)
            parts = [(dh_E * picks.gate_E, W, ctx.receivers[0]), (dgate_E, gate_W_DF, ctx.receivers[1])]
        pattern, inputs_XD = encoder.readers(x_ND, picks.pattern)
        grads: list[Tensor | None] = []
        dinputs_XD = torch.zeros_like(inputs_XD) if ctx.needs_input_grad[0] else None
        for d_E, weights, taken_by in parts:
            rows_first = weights.transpose(-1, -2)  # latent-major, as gradients are written
            dW = pattern.weight_gradient(d_E, inputs_XD, taken_by)
            grads.append(None if dW is None else dW.view(rows_first.shape).transpose(-1, -2))
            grads.append(pattern.latent_total(d_E).view(weights.shape[:-2] + weights.shape[-1:]))
            if dinputs_XD is not None:
                table = rows_first.reshape(-1, rows_first.shape[-1])
                dinputs_XD += kernels.gather_sum(d_E, pattern.indices, pattern.offsets, table)
        grads += [None] * (4 - len(grads))
        dx_ND = None if dinputs_XD is None else dinputs_XD.view(x_ND.shape)
        return dx_ND, *grads, dtheta, None, None, None, None
