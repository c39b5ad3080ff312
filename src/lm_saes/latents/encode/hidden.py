"""Dense pre-activations, for the penalty on those that stay below their thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_saes.latents.gradients.blocks import EncoderGradients, Scratch, blocks, gather, pre_activations, weights
from lm_saes.latents.gradients.deferred import Deferred


@dataclass(frozen=True, eq=False)
class Hidden:
    """Dense pre-activations `h`, whose consumers may defer their gradients."""

    values: Tensor
    """`[N, F]`, differentiable; best stored latent-major."""
    recipes: Deferred

    @classmethod
    def around(cls, h_NF: Tensor) -> Hidden:
        """Any differentiable `h`."""
        recipes = Deferred()
        return cls(_Receive.apply(h_NF, recipes), recipes)  # type: ignore[arg-type]

    @classmethod
    def of_product(cls, x_ND: Tensor, W_DF: Tensor, b_F: Tensor) -> Hidden:
        """`h = x W + b`."""
        recipes = Deferred()
        return cls(_Encode.apply(x_ND, W_DF, b_F, recipes), recipes)  # type: ignore[arg-type]

    def shortfall_sums(self, theta_F: Tensor, scale_F: Tensor | None, mask_N: Tensor | None) -> Tensor:
        """`sum over valid tokens of relu(theta - h scale)`: `[F]`, differentiable in `h`, `theta` and `scale`."""
        return _ShortfallSums.apply(self.values, theta_F, scale_F, mask_N, self.recipes)  # type: ignore[return-value]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, W_DF, b_F, recipes):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        h_FN = b_F.new_empty(len(b_F), len(x_ND))
        for _ in pre_activations(x_ND, W_DF, b_F, out_FN=h_FN):
            continue
        ctx.save_for_backward(x_ND, W_DF, b_F)
        ctx.recipes = recipes
        return h_FN.T

    @staticmethod
    def backward(ctx, dh_NF):  # type: ignore[override]
        x_ND, W_DF, b_F = ctx.saved_tensors
        sums = EncoderGradients(x_ND, W_DF, b_F.dtype, ctx.needs_input_grad[0])
        recipes, scratch = ctx.recipes.take(), Scratch(b_F)
        for some in blocks(len(b_F), len(x_ND), b_F.dtype):
            sums.add(some, gather(scratch.block(some.stop - some.start, len(x_ND)), some, dh_NF, recipes))
        return sums.dx_ND, sums.dW_FD.T, sums.db_F, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NF, recipes):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.recipes, ctx.shape, ctx.like = recipes, h_NF.shape, h_NF.new_empty(0)
        return h_NF.view_as(h_NF)

    @staticmethod
    def backward(ctx, dh_NF):  # type: ignore[override]
        n_tokens, n_latents = ctx.shape
        total_FN = ctx.like.new_empty(n_latents, n_tokens)
        recipes = ctx.recipes.take()
        for some in blocks(n_latents, n_tokens, total_FN.dtype):
            gather(total_FN[some], some, dh_NF, recipes)
        return total_FN.T, None


class _ShortfallSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NF, theta_F, scale_F, mask_N, recipes):  # type: ignore[override]
        theta_F = theta_F.detach().to(torch.promote_types(h_NF.dtype, torch.float32))
        slopes_F = -torch.ones_like(theta_F) if scale_F is None else -scale_F.detach().to(theta_F.dtype)
        sums_F, counts_F, valid_N = (
            torch.empty_like(theta_F), torch.empty_like(theta_F), weights(mask_N, len(h_NF), theta_F)
        )  # fmt: skip
        for some in blocks(len(theta_F), len(h_NF), theta_F.dtype):
            short_JN = _short(h_NF, theta_F, slopes_F, some)
            torch.mv(short_JN, valid_N, out=sums_F[some])
            torch.mv(short_JN.sign_(), valid_N, out=counts_F[some])
        ctx.save_for_backward(h_NF, theta_F, slopes_F, sums_F, counts_F, valid_N)
        ctx.recipes, ctx.gated, ctx.masked = recipes, scale_F is not None, mask_N is not None
        return sums_F

    @staticmethod
    def backward(ctx, dsums_F):  # type: ignore[override]
        h_NF, theta_F, slopes_F, sums_F, counts_F, valid_N = ctx.saved_tensors
        pull_F, masked = dsums_F * slopes_F, ctx.masked

        def recipe(some: slice, g_JN: Tensor) -> None:
            short_JN = _short(h_NF, theta_F, slopes_F, some).sign_()
            if masked:
                short_JN.mul_(valid_N)
            g_JN.add_(short_JN.mul_(pull_F[some, None]))

        ctx.recipes.add(recipe)
        dscale_F = None
        if ctx.gated:  # minus the sum of h over the entries that fall short, from their sum of theta - h scale
            dscale_F = dsums_F * torch.where(slopes_F < 0, (sums_F - theta_F * counts_F) / -slopes_F, 0.0)
        return None, dsums_F * counts_F, dscale_F, None, None


def _short(h_NF: Tensor, theta_F: Tensor, slopes_F: Tensor, some: slice) -> Tensor:
    """`relu(theta - h scale)` of some latents, `[J, N]`."""
    h_JN = h_NF.T[some].to(theta_F.dtype)
    return torch.addcmul(theta_F[some, None], h_JN, slopes_F[some, None]).relu_()
