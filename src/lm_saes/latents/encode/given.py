"""Selection from pre-activations that are there in full: from dense `h` to a code.

For dictionaries whose mathematics makes `h` and its gradient dense anyway (attention). What follows selection still
pays for active latents only, where those are few.

Letters: N tokens, R rows of all sites, S sites, F latents, E entries of the code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm_saes.latents.codes import Code, DenseCode, SparseCode
from lm_saes.latents.selection.scores import BatchScores, Block
from lm_saes.latents.selection.search import Chosen, Search
from lm_saes.latents.selection.selector import Selector
from lm_saes.latents.selection.strategies import find
from lm_saes.latents.selection.thresholds import DenseJumpReLU, scaled, threshold_gradient


def select(
    h_NF: Tensor, selector: Selector, scale_F: Tensor | None, mask_N: Tensor | None, dense: bool | None = None
) -> Code:
    """Which of the pre-activations are active, as a code with one row per token; differentiable in `h`.

    Args:
        scale_F: decoder norms if selection is gated by them (no gradient flows through selection), else None.
        mask_N: valid tokens; only batch-wide selection looks at it.
        dense: force the dense (True) or sparse (False) code; None lets the density decide. Both give the same numbers.
    """
    h_NF = h_NF.contiguous()
    scores = _GivenScores(h_NF, scale_F)
    search = selector.begin(scores, mask_N)
    if dense is None:
        dense = not selector.sparse_pays(search, scores)
    if dense:
        return DenseCode(active_only(h_NF, scale_F, search))
    flat_E, chosen = _pick(scores, search)
    values_E = _Read.apply(h_NF, *search.threshold, scale_F, flat_E, chosen)
    return SparseCode(values_E, chosen.pattern)  # type: ignore[arg-type]


def active_only(h_RF: Tensor, scale_SF: Tensor | None, search: Search) -> Tensor:
    """Dense `h` of all sites where it is active, else 0; differentiable in `h` and in learnt thresholds."""
    log_theta, window = search.threshold
    if log_theta is not None:
        return DenseJumpReLU.apply(h_RF, log_theta, scale_SF, window, search.rows.n_sites)  # type: ignore[return-value]
    with torch.no_grad():
        active = search.active(scaled(h_RF, scale_SF).view(search.rows.n, -1))
    return torch.where(active.view_as(h_RF), h_RF, 0.0)


class _GivenScores(BatchScores):
    """One block: `s = h * scale`."""

    def __init__(self, h_NF: Tensor, scale_F: Tensor | None) -> None:
        (self.n_tokens, self.n_latents), self.n_sites, self.device = h_NF.shape, 1, h_NF.device
        h_N1F, s_NF = h_NF.detach()[:, None], scaled(h_NF.detach(), scale_F)
        self._block = Block(s_NF[:, None], h_N1F, None)

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        yield slice(0, self.n_tokens), self._block

    def probe(self) -> Block:
        return self._block


@torch.no_grad()
def _pick(scores: _GivenScores, search: Search) -> tuple[Tensor, Chosen]:
    """Places of the entries in `h`, and the choice of them."""
    found, pattern = find(search, scores)
    chosen = search.choose(found.s_E, pattern)
    return chosen.pattern.rows.long() * scores.n_latents + chosen.pattern.indices, chosen


class _Read(torch.autograd.Function):
    """The values of the picked entries; the gradient goes back to their places in `h`, and to the thresholds."""

    @staticmethod
    def forward(ctx, h_NF, log_theta, window, scale_F, flat_E, chosen):  # type: ignore[override]
        ctx.save_for_backward(log_theta, scale_F)
        ctx.shape, ctx.window, ctx.flat_E, ctx.chosen = h_NF.shape, window, flat_E, chosen
        return torch.where(chosen.active_E, h_NF.view(-1).index_select(0, flat_E), 0.0)

    @staticmethod
    def backward(ctx, dvalues_E):  # type: ignore[override]
        log_theta, scale_F = ctx.saved_tensors
        chosen: Chosen = ctx.chosen
        dh_E = torch.where(chosen.active_E, dvalues_E, 0.0)
        dh_NF = dh_E.new_zeros(ctx.shape.numel()).scatter_(0, ctx.flat_E, dh_E).view(ctx.shape)
        dtheta = None
        if chosen.in_window_E is not None and ctx.needs_input_grad[1]:
            window_F = chosen.pattern.latent_total(torch.where(chosen.in_window_E, dvalues_E, 0.0))
            dtheta = threshold_gradient(window_F[None], log_theta, scale_F, ctx.window)
        return dh_NF, dtheta, None, None, None, None
