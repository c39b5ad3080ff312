"""The record of one forward pass: everything that losses and metrics are functions of.

Letters: N tokens (batch, or batch x seq flattened), G sites (1 for an autoencoder), D width, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.latents.codes import Code


@dataclass(frozen=True, eq=False)
class Record:
    """One batch as a dictionary saw it. All activations are normalised."""

    input: Tensor
    """`[G_in, N, D]`."""
    label: Tensor
    """What is to be reconstructed: `[G, N, D]`."""
    code: Code
    """The latents; rows are (token, code site), token-major: `N * code_sites` rows."""
    reconstruction: Tensor
    """`[G, N, D]`."""
    mask: Tensor | None
    """Which tokens count, bool `[N]`; None: all."""
    norm: Tensor
    """Decoder norms `[code_sites, F]`; differentiable."""
    code_sites: int = 1
    axes: Axes = field(default_factory=Axes)
    """What the batch, and its latents, are a part of."""

    @cached_property
    def n_tokens_here(self) -> Tensor:
        """How many tokens of this process's part of the batch count (0-d)."""
        if self.mask is None:
            return torch.full((), self.label.shape[1], dtype=torch.float32, device=self.label.device)
        return self.mask.sum().to(torch.float32)

    @cached_property
    def n_tokens(self) -> Tensor:
        """How many tokens of the whole batch count (0-d)."""
        return self.axes.tokens.total(self.n_tokens_here)

    @cached_property
    def row_mask(self) -> Tensor | None:
        """Which rows of the code count, bool `[N * code_sites]`; None: all."""
        if self.mask is None or self.code_sites == 1:
            return self.mask
        return self.mask.repeat_interleave(self.code_sites)

    @cached_property
    def squared_error(self) -> Tensor:
        """`||y_hat - y||^2` of each site and token, `[G, N]`; differentiable."""
        return squared_length(self.reconstruction - self.label)

    @cached_property
    def counts(self) -> Tensor:
        """On how many valid rows each latent is active: `[F]`."""
        return self.code.counts(self.row_mask)

    @cached_property
    def totals(self) -> Tensor:
        """Sum of each latent's values over the valid rows: `[F]`."""
        return self.code.totals(self.row_mask)

    def token_mean(self, per_token: Tensor) -> Tensor:
        """Mean over the valid tokens of the whole batch (and over sites, if `per_token` is `[G, N]`)."""
        per_token = accumulable(per_token)
        if self.mask is not None:
            per_token = per_token * self.mask
        sites = per_token.numel() // per_token.shape[-1]
        return self.axes.tokens.leave(per_token.sum()) / (self.n_tokens * sites)

    def row_mean(self, per_row: Tensor) -> Tensor:
        """Mean over the valid rows of the code: over tokens and code sites."""
        per_row = accumulable(per_row)
        if self.row_mask is not None:
            per_row = per_row * self.row_mask
        return self.row_mean_of_sum(per_row.sum())

    def row_mean_of_sum(self, total: Tensor) -> Tensor:
        """A sum over the valid rows of this process's part as the mean over those of the whole batch."""
        return self.axes.tokens.leave(total) / (self.n_tokens * self.code_sites)


def accumulable(x: Tensor) -> Tensor:
    """`x` in a type that sums can be made in: half precision becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squared_length(v: Tensor) -> Tensor:
    """`||v||^2` over the last dimension; differentiable once. In float32 at least, under autocast too."""
    return _SquaredLength.apply(accumulable(v))  # type: ignore[return-value]


class _SquaredLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):  # type: ignore[override]
        ctx.save_for_backward(v)
        return v.square().sum(-1)

    @staticmethod
    def backward(ctx, dlength):  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return v * (2 * dlength)[..., None]
