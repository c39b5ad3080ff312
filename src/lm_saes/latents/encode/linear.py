"""Linear encoders with selection: from inputs to a sparse code without ever keeping the `[N, F]` pre-activations.

Pre-activations are made one block of rows at a time, so that a block stays in the cache while selection picks from it.
Only what is picked is kept; the backward pass works on the code's entries alone.

Encoders of one site, of several that share one product (a crosscoder's heads) and of several with a product each (a
cross-layer transcoder's layers) differ in how a block is made and in which rows their gradients read; selection is one.

Letters: N tokens, S sites, R = N * S rows of the code, B tokens of a block, D width, F latents, E entries of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.axes.axis import ALONE, Axis
from lm_saes.latents import kernels
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.encode.dense import encode_dense
from lm_saes.latents.encode.given import active_only
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.gradients.rows import RowGradients, chosen_rows, receiver
from lm_saes.latents.products import product, product_dtype, rows_at_once
from lm_saes.latents.selection.scores import BatchScores, Block, Scores
from lm_saes.latents.selection.search import Search, SearchByThreshold
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.strategies import find
from lm_saes.latents.selection.thresholds import threshold_gradient


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
        """Weights, bias, gate's weights, gate's bias."""
        return self.W_DF, self.b_F, self.gate_W_DF, self.gate_b_F

    @property
    def n_latents(self) -> int:
        """Latents of a site."""
        return len(self.b_F)

    @property
    def n_products(self) -> int:
        """How many products of weights of their own there are."""
        return 1

    @property
    def is_plain(self) -> bool:
        """Whether it is `x W + b` for a single site, all of it here, in a type that sums can be made in."""
        return self.gate_W_DF is None and self.n_sites == self.shared.size == 1 and self.b_F.dtype.itemsize >= 4

    def plain_scores(self, x_ND: Tensor, scale_SF: Tensor | None) -> Sequence[Scores]:
        """Those of its one site, if that is all there is to it; else none."""
        scale_F = None if scale_SF is None else scale_SF.view(-1)
        return [Scores(x_ND, self.W_DF, self.b_F, scale_F)] if self.is_plain else []

    def hidden(self, code: Code, x_ND: Tensor) -> Hidden:
        """The `h` that a code was selected from: kept by it, or made again."""
        if code.hidden is not None:
            return code.hidden
        if not self.is_plain:
            return Hidden.around(self.pre_activations(x_ND))
        return Hidden.of_product(x_ND, self.W_DF, self.b_F)

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
        """How many sites there are."""
        return len(self.b_SF)

    @property
    def n_products(self) -> int:
        """How many products of weights of their own there are."""
        return self.n_sites

    @property
    def n_latents(self) -> int:
        """Latents of a site."""
        return self.b_SF.shape[1]

    def parameters(self) -> tuple[Tensor, Tensor, None, None]:
        """Weights and bias; there is no gate."""
        return self.W_SDF, self.b_SF, None, None

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """Dense `h [R, F]`, differentiable."""
        x_NSD = x_ND.view(len(x_ND), self.n_sites, -1)
        h_SNF = torch.baddbmm(self.b_SF[:, None], x_NSD.transpose(0, 1), self.W_SDF).to(self.b_SF.dtype)
        return h_SNF.transpose(0, 1).reshape(-1, self.n_latents)

    def plain_scores(self, x_ND: Tensor, scale_SF: Tensor | None) -> Sequence[Scores]:
        """Those of each site."""
        scales = [None] * self.n_sites if scale_SF is None else scale_SF.unbind()
        x_NSD = x_ND.view(len(x_ND), self.n_sites, -1)
        sites = zip(x_NSD.unbind(1), self.W_SDF, self.b_SF, scales, strict=True)
        return [Scores(x_ND.contiguous(), W_DF, b_F, scale_F) for x_ND, W_DF, b_F, scale_F in sites]

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


class EncoderScores(BatchScores):
    """What an encoder makes of a batch, for selection: `s = (x W + b) * gate * scale`.

    Args:
        scale_SF: decoder norms, `[F]` or `[S, F]`, if selection is gated by them, else None.
    """

    def __init__(self, encoder: Encoder, x_ND: Tensor, scale_SF: Tensor | None) -> None:
        self.n_tokens, self.n_sites, self.n_latents = len(x_ND), encoder.n_sites, encoder.n_latents
        self.device, self.plain = x_ND.device, encoder.plain_scores(x_ND, scale_SF)
        self._encoder, self._x_ND, self._scale_SF = encoder, x_ND, scale_SF

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        n_sites, n_latents, scale_SF = self.n_sites, self.n_latents, self._scale_SF
        dtype = product_dtype(self._x_ND)
        encoder, x_ND = self._encoder.computing_in(dtype), self._x_ND.to(dtype)
        b = encoder.parameters()[1]
        size = min(len(x_ND), rows_at_once(x_ND.device, 4 * n_sites * n_latents))
        product_BSF = b.new_empty(size, encoder.n_products, n_latents)
        s_BSF = b.new_empty(size, n_sites, n_latents)
        shift_SF = b.view(-1, n_latents) if scale_SF is None else b.view(-1, n_latents) * scale_SF
        for start in range(0, len(x_ND), size):
            tokens = slice(start, min(start + size, len(x_ND)))
            n = tokens.stop - tokens.start
            xW = encoder.product(x_ND[tokens], product_BSF[:n])
            gate = encoder.gate(x_ND[tokens], xW)
            if scale_SF is None:
                s = torch.add(xW.expand_as(s_BSF[:n]), shift_SF, out=s_BSF[:n])
            else:
                s = torch.addcmul(shift_SF, xW.expand_as(s_BSF[:n]), scale_SF, out=s_BSF[:n])
            yield tokens, Block(s if gate is None else s.mul_(gate), xW, gate)

    def probe(self) -> Block:
        some_ND = self._x_ND[:: max(1, len(self._x_ND) // machine.DENSITY_PROBE_TOKENS)]
        return next(EncoderScores(self._encoder, some_ND, self._scale_SF).blocks())[1]


def encode(
    x_ND: Tensor,
    encoder: Encoder,
    selector: Selector,
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
    scores = EncoderScores(encoder, x_ND, scale_SF)
    search = selector.begin(scores, mask_N)
    if dense is None:
        dense = not selector.sparse_pays(search, scores, density_scale)
    if not dense:
        picks = _pick(scores, encoder, search)
        log_theta, window = search.threshold
        values_E = _Attach.apply(x_ND, *encoder.parameters(), log_theta, scale_SF, window, picks, encoder)
        return SparseCode(values_E, picks.pattern, encoder.n_sites, search.even_sites)  # type: ignore[arg-type]
    if isinstance(search, SearchByThreshold) and isinstance(encoder, LinearEncoder) and encoder.is_plain:
        return encode_dense(scores.plain[0], search.want, mask_N)
    return DenseCode(active_only(encoder.pre_activations(x_ND), scale_SF, search), encoder.n_sites)


@dataclass(frozen=True, eq=False)
class _Picks:
    """What selection found: where the entries are, and what the backward pass needs to know of each."""

    pattern: Pattern
    """Rows are (token, site); latents are numbered `site * F + latent`."""
    linear_E: Tensor
    """The linear part `x W + b` at the entries (equal to `h` without a gate)."""
    gate_E: Tensor | None
    """The gate's sigmoid at the entries."""
    active_E: Tensor
    in_window_E: Tensor | None
    """Entries, active or not, that move their latent's threshold."""

    @property
    def values_E(self) -> Tensor:
        h_E = self.linear_E if self.gate_E is None else self.linear_E * self.gate_E
        return torch.where(self.active_E, h_E, 0.0)


@torch.no_grad()
def _pick(scores: EncoderScores, encoder: Encoder, search: Search) -> _Picks:
    """Find candidates and decide which of them are active."""
    found, pattern = find(search, scores)
    bias = encoder.parameters()[1]
    linear_E = found.product_E + bias.view(-1).index_select(0, found.indices % bias.numel())
    chosen = search.choose(found.s_E, pattern)
    gate_E = None if found.gate_E is None else chosen.of(found.gate_E)
    return _Picks(chosen.pattern, chosen.of(linear_E), gate_E, chosen.active_E, chosen.in_window_E)


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
        dh_E = torch.where(picks.active_E, dvalues_E, 0.0)
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
