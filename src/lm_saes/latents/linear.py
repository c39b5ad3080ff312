"""The linear encoder with selection: from inputs to a sparse code without ever keeping the `[N, F]` pre-activations.

Pre-activations are made one block of rows at a time, so that a block stays in the cache while the activation function
picks from it. Only what is picked is kept; the backward pass works on the code's entries alone.

Letters: N tokens, B rows of a block, D width, F latents, E entries of the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.latents import kernels
from lm_saes.latents.activations import ActivationFunction, Missed, threshold_gradient
from lm_saes.latents.codes import Code, DenseCode, Pattern, SparseCode
from lm_saes.latents.density import sparse_pays

BLOCK_BYTES = 20 << 20
"""Size of one block of pre-activations: small enough for the cache, large enough for an efficient product."""


@dataclass(frozen=True, eq=False)
class LinearEncoder:
    """`h = x W + b`, or with a gate (GLU) `h = (x W + b) * sigmoid(x Wg + bg)`.

    Weights are `[D, F]`, best stored latent-major (`W.T` contiguous): then gradients are written where latents lie.
    """

    W_DF: Tensor
    b_F: Tensor
    gate_W_DF: Tensor | None = None
    gate_b_F: Tensor | None = None

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """Dense `h [N, F]` in the bias's type, differentiable."""
        h_NF = torch.addmm(self.b_F, x_ND, self.W_DF).to(self.b_F.dtype)
        if self.gate_W_DF is None or self.gate_b_F is None:
            return h_NF
        return h_NF * torch.sigmoid(torch.addmm(self.gate_b_F, x_ND, self.gate_W_DF).to(self.b_F.dtype))

    def rows(self, latents: Tensor) -> LinearEncoder:
        """The encoder of some latents alone."""
        chosen = [None if p is None else p.index_select(p.ndim - 1, latents) for p in self.parameters()]
        return LinearEncoder(*chosen)  # type: ignore[arg-type]

    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.W_DF, self.b_F, self.gate_W_DF, self.gate_b_F


@dataclass(frozen=True, eq=False)
class _Picks:
    """What selection found: where the entries are, and what the backward pass needs to know of each."""

    pattern: Pattern
    linear_E: Tensor
    """The linear part `x W^T + b` at the entries (equal to `h` without a gate)."""
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
    encoder: LinearEncoder,
    activation: ActivationFunction,
    scale_F: Tensor | None,
    mask_N: Tensor | None,
    dense: bool | None = None,
) -> Code:
    """Encode and select: a code with one row per token.

    Args:
        x_ND: normalised inputs.
        scale_F: decoder norms if selection is gated by them (no gradient flows through selection), else None.
        mask_N: valid tokens; only batch-wide selection looks at it.
        dense: force the dense (True) or sparse (False) path; None lets the density decide. Both give the same numbers.
    """
    n_latents = len(encoder.b_F)
    expected = activation.expected_entries(n_latents)
    if dense is None and expected is not None:
        dense = not sparse_pays(expected, n_latents)
    picks = None if dense else _select(x_ND, encoder, activation, scale_F, mask_N, may_refuse=dense is None)
    if picks is None:
        return DenseCode(activation.dense(encoder.pre_activations(x_ND), scale_F, mask_N))
    values_E = _Attach.apply(x_ND, *encoder.parameters(), activation.log_threshold, scale_F, activation.window, picks)
    return SparseCode(values_E, picks.pattern)  # type: ignore[arg-type]


@torch.no_grad()
def _select(
    x_ND: Tensor,
    encoder: LinearEncoder,
    activation: ActivationFunction,
    scale_F: Tensor | None,
    mask_N: Tensor | None,
    may_refuse: bool,
) -> _Picks | None:
    """Look at all blocks and keep what the activation function picks; None if the first block is too dense to go on."""
    activation.begin(mask_N, len(x_ND))
    while True:
        found: list[_Found] = []
        for rows, block in _blocks(x_ND, encoder, scale_F):
            found.append(_look(block, activation.candidates(block.s_BF, rows)))
            if may_refuse and rows.start == 0 and not sparse_pays(found[0].s_E.numel(), block.s_BF.numel()):
                return None
        try:
            return _assemble(found, activation, encoder.b_F)
        except Missed:
            continue


@dataclass(frozen=True, eq=False)
class _Block:
    """One block of rows before selection: `s`, and what `h` is made of (the product without its bias, the gate)."""

    s_BF: Tensor
    product_BF: Tensor
    gate_BF: Tensor | None


def _blocks(x_ND: Tensor, encoder: LinearEncoder, scale_F: Tensor | None) -> Iterator[tuple[slice, _Block]]:
    """Blocks of rows, each overwritten by the next: `s = (x W + b) * gate * scale`."""
    W_DF, b_F, gate_W_DF, gate_b_F = encoder.parameters()
    compute = _product_dtype(x_ND)
    x_ND, W_DF = x_ND.to(compute), W_DF.to(compute)
    gate_W_DF = None if gate_W_DF is None else gate_W_DF.to(compute)
    n_latents = len(b_F)
    size = min(len(x_ND), max(1, BLOCK_BYTES // (4 * n_latents)))
    product_BF, s_BF = b_F.new_empty(size, n_latents), b_F.new_empty(size, n_latents)
    shift_F = b_F if scale_F is None else b_F * scale_F
    for start in range(0, len(x_ND), size):
        rows = slice(start, min(start + size, len(x_ND)))
        n = rows.stop - start
        _product(x_ND[rows], W_DF, product_BF[:n])
        gate = None
        if gate_W_DF is not None and gate_b_F is not None:
            gate = _product(x_ND[rows], gate_W_DF, torch.empty_like(s_BF[:n])).add_(gate_b_F).sigmoid_()
        if scale_F is None:
            s = torch.add(product_BF[:n], shift_F, out=s_BF[:n])
        else:
            s = torch.addcmul(shift_F, product_BF[:n], scale_F, out=s_BF[:n])
        yield rows, _Block(s if gate is None else s.mul_(gate), product_BF[:n], gate)


def _product_dtype(x_ND: Tensor) -> torch.dtype:
    kind = x_ND.device.type
    mixed = torch.is_autocast_enabled(kind) and x_ND.dtype == torch.float32
    return torch.get_autocast_dtype(kind) if mixed else x_ND.dtype


def _product(x_BD: Tensor, W_DF: Tensor, out_BF: Tensor) -> Tensor:
    """`x W` written to `out`; a product in half precision is brought to the type of `out`."""
    if x_BD.dtype == out_BF.dtype:
        with torch.autocast(x_BD.device.type, enabled=False):
            return torch.mm(x_BD, W_DF, out=out_BF)
    return out_BF.copy_(torch.mm(x_BD, W_DF))


@dataclass(frozen=True, eq=False)
class _Found:
    lengths: Tensor
    indices: Tensor
    s_E: Tensor
    product_E: Tensor
    gate_E: Tensor | None


def _look(block: _Block, candidates: Tensor) -> _Found:
    """Read one block at its candidates."""
    n_rows, n_latents = block.s_BF.shape
    if candidates.dtype == torch.bool:
        flat = candidates.view(-1).nonzero().squeeze(1)
        lengths, indices = candidates.sum(1), flat % n_latents
    else:
        first = torch.arange(0, block.s_BF.numel(), n_latents, device=candidates.device)
        flat, indices = (candidates + first[:, None]).view(-1), candidates.reshape(-1)
        lengths = torch.full((n_rows,), candidates.shape[1], device=candidates.device)
    read = [
        None if v is None else v.view(-1).index_select(0, flat) for v in (block.s_BF, block.product_BF, block.gate_BF)
    ]
    return _Found(lengths, indices.to(torch.int32), *read)  # type: ignore[arg-type]


def _assemble(found: list[_Found], activation: ActivationFunction, b_F: Tensor) -> _Picks:
    """Join the blocks and decide which entries are active."""
    s_E = torch.cat([f.s_E for f in found])
    lengths = torch.cat([f.lengths for f in found])
    indices = torch.cat([f.indices for f in found])
    linear_E = torch.cat([f.product_E for f in found]) + b_F.index_select(0, indices)
    gates = [f.gate_E for f in found if f.gate_E is not None]
    gate_E = torch.cat(gates) if gates else None
    kept_E, in_window_E = activation.settle(s_E), None
    if activation.loose:
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=s_E.device), lengths, output_size=len(s_E))[
            kept_E
        ]
        lengths = torch.zeros_like(lengths).index_add_(0, rows, torch.ones_like(rows))
        s_E, indices, linear_E = s_E[kept_E], indices[kept_E], linear_E[kept_E]
        gate_E = None if gate_E is None else gate_E[kept_E]
        kept_E = torch.ones_like(indices, dtype=torch.bool)
    if activation.log_threshold is not None:
        theta_E = activation.log_threshold.exp().to(s_E.dtype).index_select(0, indices)
        kept_E = kept_E & (s_E > theta_E)
        in_window_E = ((s_E - theta_E).abs() < activation.window / 2) & (s_E > 0)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=s_E.device)
    offsets[1:] = lengths.cumsum(0)
    return _Picks(Pattern(indices, offsets, len(b_F)), linear_E, gate_E, kept_E, in_window_E)


class _Attach(torch.autograd.Function):
    """The values of the picked entries, with the encoder's gradients attached."""

    @staticmethod
    def forward(ctx, x_ND, W_DF, b_F, gate_W_DF, gate_b_F, log_theta_F, scale_F, window, picks):  # type: ignore[override]
        ctx.save_for_backward(x_ND, W_DF, gate_W_DF, log_theta_F, scale_F)
        ctx.window, ctx.picks = window, picks
        return picks.values_E

    @staticmethod
    def backward(ctx, dvalues_E):  # type: ignore[override]
        x_ND, W_DF, gate_W_DF, log_theta_F, scale_F = ctx.saved_tensors
        picks: _Picks = ctx.picks
        pattern = picks.pattern
        dh_E = torch.where(picks.kept_E, dvalues_E, 0.0)
        dtheta_F = None
        if picks.in_window_E is not None and ctx.needs_input_grad[5]:
            window_F = pattern.latent_total(torch.where(picks.in_window_E, dvalues_E, 0.0))
            dtheta_F = threshold_gradient(window_F, log_theta_F, scale_F, ctx.window)
        if picks.gate_E is None:
            parts = [(dh_E, W_DF)]
        else:
            dgate_E = dh_E * picks.linear_E * picks.gate_E * (1 - picks.gate_E)
            parts = [(dh_E * picks.gate_E, W_DF), (dgate_E, gate_W_DF)]
        grads: list[Tensor | None] = []
        for d_E, _ in parts:
            grads += [pattern.latent_sum(d_E, x_ND).T, pattern.latent_total(d_E)]
        grads += [None] * (4 - len(grads))
        dx_ND = None
        if ctx.needs_input_grad[0]:
            dx_ND = torch.zeros_like(x_ND)
            for d_E, weights_DF in parts:
                dx_ND += kernels.gather_sum(d_E, pattern.indices, pattern.offsets, weights_DF.T)
        return dx_ND, *grads, dtheta_F, None, None, None
