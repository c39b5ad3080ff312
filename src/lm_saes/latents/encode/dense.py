"""The dense path, for activation functions that judge each entry by itself (ReLU, JumpReLU).

Five products of the size of the encoder's are unavoidable where most latents are active. Everything else is done on
blocks of latents that stay in the cache: bias, selection, counts and sums forward; the gradients of decoder and
sparsity losses, the thresholds' windows and the mask backward. A block's weight gradients are whole at once.

Letters: N tokens, D width, F latents, J latents of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.latents.codes import DenseCode, EntryFunction, Identity
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.gradients.blocks import EncoderGradients, Scratch, blocks, gather, pre_activations, weights
from lm_saes.latents.gradients.deferred import Deferred
from lm_saes.latents.products import add_product, product, product_dtype
from lm_saes.latents.selection.scores import Scores
from lm_saes.latents.selection.thresholds import threshold_gradient
from lm_saes.latents.selection.wants import Above
from lm_saes.torch_private import zero_where_inactive_


def encode_dense(scores: Scores, want: Above, mask_N: Tensor | None) -> BlockwiseCode:
    """Encode `f = h where it exceeds its latent's threshold, else 0`, `h = x W + b`."""
    recipes, hidden_recipes = Deferred(), Deferred()
    f_NF, h_NF, counts_F, totals_F = _Encode.apply(
        scores.x_ND, scores.W_DF, scores.b_F, want.log_theta, scores.scale_F, want, mask_N, recipes, hidden_recipes
    )  # type: ignore[misc]
    hidden = None if h_NF is None else Hidden(h_NF, hidden_recipes)
    return BlockwiseCode(f_NF, recipes, hidden, mask_N, counts_F, totals_F)


class BlockwiseCode(DenseCode):
    """A dense code that knows its counts and sums, and whose consumers defer their gradients."""

    def __init__(
        self, values: Tensor, recipes: Deferred, hidden: Hidden | None, mask_N: Tensor | None, counts_F: Tensor,
        totals_F: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(values)
        self.recipes, self.hidden = recipes, hidden
        self._mask_N, self._counts_F, self._totals_F = mask_N, counts_F, totals_F

    def decode(self, W_FD: Tensor) -> Tensor:
        return _Decode.apply(self.values, self._by_rows(W_FD), self.recipes)  # type: ignore[return-value]

    def counts(self, mask_N: Tensor | None = None) -> Tensor:
        return self._counts_F if mask_N is self._mask_N else super().counts(mask_N)

    def totals(self, mask_N: Tensor | None = None) -> Tensor:
        return self._totals_F if mask_N is self._mask_N else super().totals(mask_N)

    def latent_sums(self, function: EntryFunction, v_F: Tensor, mask_N: Tensor | None) -> Tensor:
        return _LatentSums.apply(self.values, v_F, function, mask_N, self)  # type: ignore[return-value]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, W_DF, b_F, log_theta, scale_F, want, mask_N, recipes, hidden_recipes):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        above_F, low_F, high_F = want.bounds(b_F, scale_F)
        f_FN = b_F.new_empty(len(b_F), len(x_ND))
        h_FN = None if low_F is None else torch.empty_like(f_FN)
        counts_F, totals_F, valid_N = torch.empty_like(b_F), torch.empty_like(b_F), weights(mask_N, len(x_ND), b_F)
        scratch = Scratch(b_F)
        for some, h_JN in pre_activations(x_ND, W_DF, b_F, out_FN=f_FN if h_FN is None else h_FN):
            active_JN = torch.gt(h_JN, above_F[some, None], out=scratch.block(*h_JN.shape))
            torch.mv(active_JN, valid_N, out=counts_F[some])
            torch.mv(torch.mul(h_JN, active_JN, out=f_FN[some]), valid_N, out=totals_F[some])
        ctx.save_for_backward(x_ND, W_DF, log_theta, scale_F, f_FN, h_FN, low_F, high_F)
        ctx.deferred, ctx.window = (recipes, hidden_recipes), want.window
        ctx.mark_non_differentiable(counts_F, totals_F)
        return f_FN.T, None if h_FN is None else h_FN.T, counts_F, totals_F

    @staticmethod
    def backward(ctx, df_NF, dh_NF, *_):  # type: ignore[override]
        x_ND, W_DF, log_theta, scale_F, f_FN, h_FN, low_F, high_F = ctx.saved_tensors
        recipes, hidden_recipes = (deferred.take() for deferred in ctx.deferred)
        n_latents, n_tokens = f_FN.shape
        windowed = low_F is not None
        window_F = f_FN.new_empty(n_latents)
        ones_N, memory = f_FN.new_ones(n_tokens), [Scratch(f_FN) for _ in range(3)]
        sums = EncoderGradients(x_ND, W_DF, f_FN.dtype, ctx.needs_input_grad[0])
        for some in blocks(n_latents, n_tokens, f_FN.dtype):
            g_JN, one_JN, other_JN = (scratch.block(some.stop - some.start, n_tokens) for scratch in memory)
            gather(g_JN, some, df_NF, recipes)
            if windowed:
                h_JN, low_J1, high_J1 = h_FN[some], low_F[some, None], high_F[some, None]
                within_JN = torch.gt(h_JN, low_J1, out=one_JN).mul_(torch.lt(h_JN, high_J1, out=other_JN))
                torch.mv(within_JN.mul_(g_JN), ones_N, out=window_F[some])
            zero_where_inactive_(g_JN, f_FN[some])
            sums.add(some, gather(g_JN, some, dh_NF, hidden_recipes, fresh=False))
        dtheta = threshold_gradient(window_F[None], log_theta, scale_F, ctx.window) if windowed else None
        return sums.dx_ND, sums.dW_FD.T, sums.db_F, dtheta, *[None] * 5


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f_NF, W_FD, recipes):  # type: ignore[override]
        dtype = product_dtype(f_NF)
        ctx.save_for_backward(f_NF, W_FD)
        ctx.recipes, ctx.dtype = recipes, dtype
        return product(f_NF.to(dtype), W_FD.to(dtype), out=f_NF.new_empty(len(f_NF), W_FD.shape[1]))

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[override]
        f_NF, W_FD = ctx.saved_tensors
        dy_ND, W_low_FD = dy_ND.to(ctx.dtype), W_FD.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            ctx.recipes.add(lambda some, g_JN: add_product(W_low_FD[some], dy_ND.T, out=g_JN))
        dW_FD = None
        if ctx.needs_input_grad[1]:
            dW_FD = product(f_NF.to(ctx.dtype).T, dy_ND, out=torch.empty_like(W_FD))
        return None, dW_FD, None


class _LatentSums(torch.autograd.Function):
    """Sums of `v f`, or of `t = tanh(c v f)`, whose slope is `c (1 - t^2)`."""

    @staticmethod
    def forward(ctx, f_NF, v_F, function, mask_N, code):  # type: ignore[override]
        v_F, slopes_F = v_F.detach(), code.totals(mask_N)
        if isinstance(function, Identity):
            sums_F = slopes_F * v_F
        else:
            valid_N, scratch = weights(mask_N, len(f_NF), f_NF), Scratch(f_NF)
            sums_F, bent_F = torch.empty_like(v_F), torch.empty_like(v_F)
            for some in blocks(len(v_F), len(f_NF), f_NF.dtype):
                f_JN = f_NF.T[some]
                t_JN = torch.mul(f_JN, function.c * v_F[some, None], out=scratch.block(*f_JN.shape)).tanh_()
                torch.mv(t_JN, valid_N, out=sums_F[some])
                torch.mv(t_JN.square_().mul_(f_JN), valid_N, out=bent_F[some])
            slopes_F = function.c * (slopes_F - bent_F)
        ctx.save_for_backward(f_NF, v_F, slopes_F, mask_N)
        ctx.function, ctx.recipes = function, code.recipes
        return sums_F

    @staticmethod
    def backward(ctx, dsums_F):  # type: ignore[override]
        f_NF, v_F, slopes_F, mask_N = ctx.saved_tensors
        function, valid_N, pull_F = ctx.function, weights(mask_N, len(f_NF), f_NF), dsums_F * v_F
        scratch = Scratch(f_NF)

        def straight(some: slice, g_JN: Tensor) -> None:
            g_JN.add_(pull_F[some, None]) if mask_N is None else g_JN.addr_(pull_F[some], valid_N)

        def bent(some: slice, g_JN: Tensor) -> None:
            slope_J1, t_JN = function.c * pull_F[some, None], scratch.block(*g_JN.shape)
            torch.mul(f_NF.T[some], function.c * v_F[some, None], out=t_JN).tanh_().square_()
            if mask_N is None:
                g_JN.add_(slope_J1).addcmul_(t_JN, slope_J1, value=-1)
            else:
                g_JN.addcmul_(t_JN.sub_(1).mul_(valid_N), slope_J1, value=-1)

        ctx.recipes.add(straight if isinstance(function, Identity) else bent)
        return None, dsums_F * slopes_F, None, None, None
