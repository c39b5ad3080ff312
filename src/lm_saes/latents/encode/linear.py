"""Encoding with selection: from inputs to a sparse code without ever keeping the `[N, F]` pre-activations.

Pre-activations are made one block of rows at a time, so that a block stays in the cache while selection picks from it.
Only what is picked is kept; the backward pass works on the code's entries alone.

Letters: N tokens, S sites, D width, F latents, E entries of the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.latents import kernels
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.encode.dense import encode_dense
from lm_saes.latents.encode.encoders import Encoder, EncoderScores, LinearEncoder
from lm_saes.latents.encode.given import active_only
from lm_saes.latents.selection.search import Search, SearchByThreshold
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.strategies import find
from lm_saes.latents.selection.thresholds import threshold_gradient


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
    if dense is None:
        dense = not selector.sparse_pays(scores, density_scale)
    search = selector.begin(scores, mask_N)
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
    found = find(search, scores)
    bias = encoder.parameters()[1]
    linear_E = found.product_E + bias.view(-1).index_select(0, found.indices % bias.numel())
    chosen = search.choose(found.s_E, found.pattern(scores.n_sites * scores.n_latents))
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
