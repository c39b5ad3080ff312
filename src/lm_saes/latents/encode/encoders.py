"""Linear encoders: of one site, of several that share one product (a crosscoder's heads), or of several with a product
each (a cross-layer transcoder's layers).

They differ in how a block of pre-activations is made and in which rows their gradients read; selection is one.

Letters: N tokens, S sites, R = N * S rows of the code, B tokens of a block, D width, F latents, E entries of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.axes.axis import ALONE, Axis
from lm_saes.latents.codes import Code, Pattern
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.gradients.rows import RowGradients, chosen_rows, receiver
from lm_saes.latents.products import product, product_dtype, rows_at_once
from lm_saes.latents.selection.scores import BatchScores, Block, Scores

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
        self.device = x_ND.device
        self._encoder, self._x_ND, self._scale_SF = encoder, x_ND, scale_SF

    @property
    def plain(self) -> Sequence[Scores]:
        return self._encoder.plain_scores(self._x_ND, self._scale_SF)

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
        some_ND = self._x_ND[:: max(1, len(self._x_ND) // PROBE_TOKENS)]
        return next(EncoderScores(self._encoder, some_ND, self._scale_SF).blocks())[1]
