"""Selection from pre-activations that are there in full: from dense `h` to a code.

For dictionaries whose mathematics makes `h` and its gradient dense anyway (attention). What follows selection still
pays for active latents only, where those are few.

Letters: N tokens, F latents, E entries of the code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.latents.activations import ActivationFunction, Missed, scaled, threshold_gradient
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.density import sparse_pays


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
    flat_E, kept_E, in_window_E, pattern = picked
    values_E = _Read.apply(
        h_NF, activation.log_threshold, scale_F, activation.window, flat_E, kept_E, in_window_E, pattern
    )
    return SparseCode(values_E, pattern)  # type: ignore[arg-type]


@torch.no_grad()
def _pick(
    h_NF: Tensor, activation: ActivationFunction, scale_F: Tensor | None, mask_N: Tensor | None, may_refuse: bool
) -> tuple[Tensor, Tensor, Tensor | None, Pattern] | None:
    """Places of the entries in `h`, which are kept, which move a threshold; None if they are too many to be sparse."""
    n_rows, n_latents = h_NF.shape
    s_NF = scaled(h_NF, scale_F)
    activation.begin(mask_N, n_rows)
    while True:
        flat_E = _flat(activation.candidates(s_NF, slice(0, n_rows)), n_latents)
        if may_refuse and not sparse_pays(flat_E.numel(), h_NF.numel()):
            return None
        s_E = s_NF.view(-1).index_select(0, flat_E)
        try:
            kept_E = activation.settle(s_E, torch.zeros_like(flat_E))
            break
        except Missed:
            continue
    in_window_E = None
    if activation.loose:
        flat_E, s_E = flat_E[kept_E], s_E[kept_E]
        kept_E = torch.ones_like(flat_E, dtype=torch.bool)
    if activation.log_threshold is not None:
        theta_E = activation.log_threshold.exp().to(s_E.dtype).index_select(0, flat_E % n_latents)
        kept_E = kept_E & (s_E > theta_E)
        in_window_E = ((s_E - theta_E).abs() < activation.window / 2) & (s_E > 0)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int32, device=h_NF.device)
    offsets[1:] = torch.bincount(flat_E // n_latents, minlength=n_rows).cumsum(0)
    return flat_E, kept_E, in_window_E, Pattern((flat_E % n_latents).to(torch.int32), offsets, n_latents)


def _flat(candidates: Tensor, n_latents: int) -> Tensor:
    """Candidates (a mask, or columns of each row) as places in the flattened `h`, row by row."""
    if candidates.dtype == torch.bool:
        return candidates.view(-1).nonzero().squeeze(1)
    first = torch.arange(0, len(candidates) * n_latents, n_latents, device=candidates.device)
    return (candidates + first[:, None]).view(-1)


class _Read(torch.autograd.Function):
    """The values of the picked entries; the gradient goes back to their places in `h`, and to the thresholds."""

    @staticmethod
    def forward(ctx, h_NF, log_theta, scale_F, window, flat_E, kept_E, in_window_E, pattern):  # type: ignore[override]
        ctx.save_for_backward(log_theta, scale_F)
        ctx.shape, ctx.window, ctx.picked = h_NF.shape, window, (flat_E, kept_E, in_window_E, pattern)
        return torch.where(kept_E, h_NF.view(-1).index_select(0, flat_E), 0.0)

    @staticmethod
    def backward(ctx, dvalues_E):  # type: ignore[override]
        log_theta, scale_F = ctx.saved_tensors
        flat_E, kept_E, in_window_E, pattern = ctx.picked
        dh_E = torch.where(kept_E, dvalues_E, 0.0)
        dh_NF = dh_E.new_zeros(ctx.shape.numel()).scatter_(0, flat_E, dh_E).view(ctx.shape)
        dtheta = None
        if in_window_E is not None and ctx.needs_input_grad[1]:
            window_F = pattern.latent_total(torch.where(in_window_E, dvalues_E, 0.0))
            dtheta = threshold_gradient(window_F[None], log_theta, scale_F, ctx.window)
        return dh_NF, dtheta, None, None, None, None, None, None
