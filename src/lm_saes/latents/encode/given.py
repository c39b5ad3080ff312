"""Selection from pre-activations that are there in full: from dense `h` to a code.

For dictionaries whose mathematics makes `h` and its gradient dense anyway (attention). What follows selection still
pays for active latents only, where those are few.

Letters: N tokens, F latents, E entries of the code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.activations.base import ActivationFunction, Chosen, Missed
from lm_saes.latents.activations.thresholds import scaled, threshold_gradient
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.offsets import offsets_of_rows, places_of_columns
from lm_saes.latents.selection.density import sparse_pays


def select(
    h_NF: Tensor,
    activation: ActivationFunction,
    scale_F: Tensor | None,
    mask_N: Tensor | None,
    dense: bool | None = None,
) -> Code:
    """Which of the pre-activations are active, as a code with one row per token; differentiable in `h`.

    Args:
        scale_F: decoder norms if selection is gated by them (no gradient flows through selection), else None.
        mask_N: valid tokens; only batch-wide selection looks at it.
        dense: force the dense (True) or sparse (False) code; None lets the density decide. Both give the same numbers.
    """
    h_NF = h_NF.contiguous()
    expected = activation.expected_entries(h_NF.shape[1])
    if dense is None and expected is not None:
        dense = not sparse_pays(expected, h_NF.shape[1])
    picked = None if dense else _pick(h_NF, activation, scale_F, mask_N, may_refuse=dense is None)
    if picked is None:
        return DenseCode(activation.dense(h_NF, scale_F, mask_N))
    flat_E, chosen = picked
    values_E = _Read.apply(h_NF, activation.log_threshold, scale_F, activation.window, flat_E, chosen)
    return SparseCode(values_E, chosen.pattern)  # type: ignore[arg-type]


@torch.no_grad()
def _pick(
    h_NF: Tensor, activation: ActivationFunction, scale_F: Tensor | None, mask_N: Tensor | None, may_refuse: bool
) -> tuple[Tensor, Chosen] | None:
    """Places of the entries in `h`, and the choice of them; None if they are too many to be sparse."""
    n_rows, n_latents = h_NF.shape
    s_NF = scaled(h_NF, scale_F)
    activation.begin(mask_N, n_rows)
    while True:
        candidates = activation.candidates(s_NF, slice(0, n_rows))
        unknown = candidates.dtype == torch.bool and activation.training and machine.waits_cost(h_NF.device)
        if may_refuse and unknown and not activation.density.sparse_paid(candidates.count_nonzero(), h_NF.numel()):
            return None
        flat_E = _flat(candidates, n_latents)
        if may_refuse and not sparse_pays(flat_E.numel(), h_NF.numel()):
            return None
        pattern = Pattern((flat_E % n_latents).to(torch.int32), offsets_of_rows(flat_E // n_latents, n_rows), n_latents)
        try:
            chosen = activation.choose(s_NF.view(-1).index_select(0, flat_E), pattern)
        except Missed:
            continue
        return chosen.of(flat_E), chosen


def _flat(candidates: Tensor, n_latents: int) -> Tensor:
    """Candidates (a mask, columns of each row, or places already) as places in the flattened `h`, row by row."""
    if candidates.dtype == torch.bool:
        return candidates.view(-1).nonzero().squeeze(1)
    if candidates.ndim == 1:
        return candidates
    return places_of_columns(candidates, n_latents)


class _Read(torch.autograd.Function):
    """The values of the picked entries; the gradient goes back to their places in `h`, and to the thresholds."""

    @staticmethod
    def forward(ctx, h_NF, log_theta, scale_F, window, flat_E, chosen):  # type: ignore[override]
        ctx.save_for_backward(log_theta, scale_F)
        ctx.shape, ctx.window, ctx.flat_E, ctx.chosen = h_NF.shape, window, flat_E, chosen
        return torch.where(chosen.kept_E, h_NF.view(-1).index_select(0, flat_E), 0.0)

    @staticmethod
    def backward(ctx, dvalues_E):  # type: ignore[override]
        log_theta, scale_F = ctx.saved_tensors
        chosen: Chosen = ctx.chosen
        dh_E = torch.where(chosen.kept_E, dvalues_E, 0.0)
        dh_NF = dh_E.new_zeros(ctx.shape.numel()).scatter_(0, ctx.flat_E, dh_E).view(ctx.shape)
        dtheta = None
        if chosen.in_window_E is not None and ctx.needs_input_grad[1]:
            window_F = chosen.pattern.latent_total(torch.where(chosen.in_window_E, dvalues_E, 0.0))
            dtheta = threshold_gradient(window_F[None], log_theta, scale_F, ctx.window)
        return dh_NF, dtheta, None, None, None, None
