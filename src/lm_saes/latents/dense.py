"""The dense path, for activation functions that judge each entry by itself (ReLU, JumpReLU).

Five products of the size of the encoder's are unavoidable where most latents are active. Everything else is done on
blocks of latents that stay in the cache: bias, selection, counts and sums forward; the gradients of decoder and
sparsity losses, the thresholds' windows and the mask backward. A block's weight gradients are whole at once.

Letters: N tokens, D width, F latents, J latents of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_saes.latents.activations import ActivationFunction, threshold_gradient
from lm_saes.latents.codes import Code, DenseCode, EntryFunction, Identity
from lm_saes.latents.deferred import Deferred, Recipe
from lm_saes.latents.products import add_product, product, product_dtype

if TYPE_CHECKING:
    from lm_saes.latents.linear import LinearEncoder

BLOCK_BYTES = 4 << 20
"""Size of one block of latents of all tokens: a core's cache holds its share of a few of them."""


def encode_dense(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, activation: ActivationFunction, scale_F: Tensor | None,
    mask_N: Tensor | None,
) -> BlockwiseCode:  # fmt: skip
    """Encode `f = h where active, else 0`, `h = x W + b`, by an activation function that has `bounds`."""
    recipes, hidden_recipes = Deferred(), Deferred()
    f_NF, h_NF, counts_F, totals_F = _Encode.apply(
        x_ND, W_DF, b_F, activation.log_threshold, scale_F, activation, mask_N, recipes, hidden_recipes
    )  # type: ignore[misc]
    hidden = None if h_NF is None else Hidden(h_NF, hidden_recipes)
    return BlockwiseCode(f_NF, recipes, hidden, mask_N, counts_F, totals_F)


@dataclass(frozen=True, eq=False)
class Hidden:
    """Dense pre-activations `h`, whose consumers may defer their gradients."""

    values: Tensor
    """`[N, F]`, differentiable."""
    recipes: Deferred

    @classmethod
    def around(cls, h_NF: Tensor) -> Hidden:
        """Any differentiable `h`."""
        recipes = Deferred()
        return cls(_Receive.apply(h_NF, recipes), recipes)  # type: ignore[arg-type]

    @classmethod
    def of(cls, code: Code, x_ND: Tensor, encoder: LinearEncoder) -> Hidden:
        """The `h` that a code was selected from: kept by it, or made again."""
        if isinstance(code, BlockwiseCode) and code.hidden is not None:
            return code.hidden
        if not encoder.is_plain:
            return cls.around(encoder.pre_activations(x_ND))
        recipes = Deferred()
        return cls(_Hidden.apply(x_ND, encoder.W_DF, encoder.b_F, recipes), recipes)  # type: ignore[arg-type]

    def shortfall_sums(self, theta_F: Tensor, scale_F: Tensor | None, mask_N: Tensor | None) -> Tensor:
        """`sum over valid tokens of relu(theta - h scale)`: `[F]`, differentiable in `h`, `theta` and `scale`."""
        return _ShortfallSums.apply(self.values, theta_F, scale_F, mask_N, self.recipes)  # type: ignore[return-value]


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
        return _Decode.apply(self.values, W_FD.reshape(-1, W_FD.shape[-1]), self.recipes)  # type: ignore[return-value]

    def counts(self, mask_N: Tensor | None = None) -> Tensor:
        return self._counts_F if mask_N is self._mask_N else super().counts(mask_N)

    def totals(self, mask_N: Tensor | None = None) -> Tensor:
        return self._totals_F if mask_N is self._mask_N else super().totals(mask_N)

    def latent_sums(self, function: EntryFunction, v_F: Tensor, mask_N: Tensor | None) -> Tensor:
        return _LatentSums.apply(self.values, v_F, function, mask_N, self)  # type: ignore[return-value]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, W_DF, b_F, log_theta, scale_F, activation, mask_N, recipes, hidden_recipes):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        above_F, low_F, high_F = activation.bounds(b_F, scale_F)
        f_NF = b_F.new_empty(len(x_ND), len(b_F))
        h_NF = None if low_F is None else torch.empty_like(f_NF)
        counts_F, totals_F = torch.empty_like(b_F), torch.empty_like(b_F)
        valid_N, zero = _weights(mask_N, f_NF), b_F.new_zeros(())
        for columns, h_NJ in _pre_activations(x_ND, W_DF, b_F):
            if h_NF is not None:
                h_NF[:, columns] = h_NJ
            f_NJ = torch.where(h_NJ > above_F[columns], h_NJ, zero, out=h_NJ)
            f_NF[:, columns] = f_NJ
            torch.mv(f_NJ.T, valid_N, out=totals_F[columns])
            torch.mv(f_NJ.sign_().T, valid_N, out=counts_F[columns])
        ctx.save_for_backward(x_ND, W_DF, log_theta, scale_F, f_NF, h_NF, low_F, high_F)
        ctx.deferred, ctx.window = (recipes, hidden_recipes), activation.window
        ctx.mark_non_differentiable(counts_F, totals_F)
        return f_NF, h_NF, counts_F, totals_F

    @staticmethod
    def backward(ctx, df_NF, dh_NF, *_):  # type: ignore[override]
        x_ND, W_DF, log_theta, scale_F, f_NF, h_NF, low_F, high_F = ctx.saved_tensors
        recipes, hidden_recipes = (deferred.take() for deferred in ctx.deferred)
        window_F = f_NF.new_zeros(f_NF.shape[1]) if low_F is not None else None
        ones_N, zero = f_NF.new_ones(len(f_NF)), f_NF.new_zeros(())
        sums = _EncoderGradients(x_ND, W_DF, f_NF.dtype, ctx.needs_input_grad[0])
        for columns, g_NJ in _blocks(f_NF):
            _gather(g_NJ, columns, df_NF, recipes)
            if window_F is not None and h_NF is not None:
                h_NJ = h_NF[:, columns]
                within_NJ = (h_NJ > low_F[columns]) & (h_NJ < high_F[columns])
                torch.mv(torch.where(within_NJ, g_NJ, zero).T, ones_N, out=window_F[columns])
            torch.where(f_NF[:, columns] > 0, g_NJ, zero, out=g_NJ)
            sums.add(columns, _gather(g_NJ, columns, dh_NF, hidden_recipes, fresh=False))
        dtheta = None if window_F is None else threshold_gradient(window_F[None], log_theta, scale_F, ctx.window)
        return sums.dx_ND, sums.dW_FD.T, sums.db_F, dtheta, *[None] * 5


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, W_DF, b_F, recipes):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        h_NF = b_F.new_empty(len(x_ND), len(b_F))
        for columns, h_NJ in _pre_activations(x_ND, W_DF, b_F):
            h_NF[:, columns] = h_NJ
        ctx.save_for_backward(x_ND, W_DF)
        ctx.recipes, ctx.meta = recipes, h_NF.to("meta")
        return h_NF

    @staticmethod
    def backward(ctx, dh_NF):  # type: ignore[override]
        x_ND, W_DF = ctx.saved_tensors
        sums = _EncoderGradients(x_ND, W_DF, ctx.meta.dtype, ctx.needs_input_grad[0])
        recipes = ctx.recipes.take()
        for columns, g_NJ in _blocks(ctx.meta, device=x_ND.device):
            sums.add(columns, _gather(g_NJ, columns, dh_NF, recipes))
        return sums.dx_ND, sums.dW_FD.T, sums.db_F, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NF, recipes):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.recipes, ctx.meta, ctx.device = recipes, h_NF.to("meta"), h_NF.device
        return h_NF.view_as(h_NF)

    @staticmethod
    def backward(ctx, dh_NF):  # type: ignore[override]
        total_NF = torch.empty_like(ctx.meta, device=ctx.device)
        recipes = ctx.recipes.take()
        for columns, g_NJ in _blocks(total_NF):
            total_NF[:, columns] = _gather(g_NJ, columns, dh_NF, recipes)
        return total_NF, None


class _EncoderGradients:
    """Gradients of `x W + b`, block by block of latents; the weights' is made latent-major."""

    def __init__(self, x_ND: Tensor, W_DF: Tensor, dtype: torch.dtype, of_input: bool) -> None:
        self._dtype = product_dtype(x_ND)
        self._x_ND, self._W_DF = x_ND.to(self._dtype), W_DF
        self._ones_N = x_ND.new_ones(len(x_ND), dtype=dtype)
        self.dW_FD = x_ND.new_empty(W_DF.shape[::-1], dtype=dtype)
        self.db_F = x_ND.new_empty(W_DF.shape[1], dtype=dtype)
        self.dx_ND = torch.zeros_like(x_ND) if of_input else None

    def add(self, columns: slice, dh_NJ: Tensor) -> None:
        torch.mv(dh_NJ.T, self._ones_N, out=self.db_F[columns])
        dh_NJ = dh_NJ.to(self._dtype)
        product(dh_NJ.T, self._x_ND, out=self.dW_FD[columns])
        if self.dx_ND is not None:
            add_product(dh_NJ, self._W_DF[:, columns].T.to(self._dtype), out=self.dx_ND)


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
            ctx.recipes.add(lambda columns, g_NJ: add_product(dy_ND, W_low_FD[columns].T, out=g_NJ))
        dW_FD = None
        if ctx.needs_input_grad[1]:
            dW_FD = product(f_NF.to(ctx.dtype).T, dy_ND, out=torch.empty_like(W_FD))
        return None, dW_FD, None


class _LatentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f_NF, v_F, function, mask_N, code):  # type: ignore[override]
        v_F = v_F.detach()
        if isinstance(function, Identity):
            slopes_F = code.totals(mask_N)
            sums_F = slopes_F * v_F
        else:
            sums_F, slopes_F, valid_N = torch.empty_like(v_F), torch.empty_like(v_F), _weights(mask_N, f_NF)
            for columns, u_NJ in _blocks(f_NF):
                f_NJ = f_NF[:, columns]
                value_NJ = function.value_(torch.mul(f_NJ, v_F[columns], out=u_NJ))
                torch.mv(value_NJ.T, valid_N, out=sums_F[columns])
                torch.mv(function.slope_(value_NJ).mul_(f_NJ).T, valid_N, out=slopes_F[columns])
        ctx.save_for_backward(f_NF, v_F, slopes_F, mask_N)
        ctx.function, ctx.recipes = function, code.recipes
        return sums_F

    @staticmethod
    def backward(ctx, dsums_F):  # type: ignore[override]
        f_NF, v_F, slopes_F, mask_N = ctx.saved_tensors
        function, valid_N, pull_F = ctx.function, _weights(mask_N, f_NF), dsums_F * v_F

        def recipe(columns: slice, g_NJ: Tensor) -> None:
            if isinstance(function, Identity):
                g_NJ.add_(pull_F[columns]) if mask_N is None else g_NJ.addr_(valid_N, pull_F[columns])
                return
            slope_NJ = function.slope_(function.value_(f_NF[:, columns] * v_F[columns]))
            g_NJ.addcmul_(slope_NJ if mask_N is None else slope_NJ.mul_(valid_N[:, None]), pull_F[columns])

        ctx.recipes.add(recipe)
        return None, dsums_F * slopes_F, None, None, None


class _ShortfallSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NF, theta_F, scale_F, mask_N, recipes):  # type: ignore[override]
        theta_F = theta_F.detach().to(torch.promote_types(h_NF.dtype, torch.float32))
        slopes_F = -torch.ones_like(theta_F) if scale_F is None else -scale_F.detach().to(theta_F.dtype)
        sums_F, counts_F, valid_N = torch.empty_like(theta_F), torch.empty_like(theta_F), _weights(mask_N, h_NF)
        valid_N = valid_N.to(theta_F.dtype)
        for columns, _ in _blocks(h_NF):
            short_NJ = torch.addcmul(theta_F[columns], h_NF[:, columns].to(theta_F.dtype), slopes_F[columns]).relu_()
            torch.mv(short_NJ.T, valid_N, out=sums_F[columns])
            torch.mv(short_NJ.sign_().T, valid_N, out=counts_F[columns])
        ctx.save_for_backward(h_NF, theta_F, slopes_F, sums_F, counts_F, valid_N)
        ctx.recipes, ctx.gated = recipes, scale_F is not None
        return sums_F

    @staticmethod
    def backward(ctx, dsums_F):  # type: ignore[override]
        h_NF, theta_F, slopes_F, sums_F, counts_F, valid_N = ctx.saved_tensors
        pull_F = dsums_F * slopes_F

        def recipe(columns: slice, g_NJ: Tensor) -> None:
            short_NJ = torch.addcmul(theta_F[columns], h_NF[:, columns].to(theta_F.dtype), slopes_F[columns])
            g_NJ.add_(short_NJ.relu_().sign_().mul_(valid_N[:, None]).mul_(pull_F[columns]))

        ctx.recipes.add(recipe)
        dscale_F = None
        if ctx.gated:  # minus the sum of h over the entries that fall short, from their sum of theta - h scale
            dscale_F = dsums_F * torch.where(slopes_F < 0, (sums_F - theta_F * counts_F) / -slopes_F, 0.0)
        return None, dsums_F * counts_F, dscale_F, None, None


def _pre_activations(x_ND: Tensor, W_DF: Tensor, b_F: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`x W + b` in blocks of latents `[N, J]`, each overwritten by the next."""
    dtype = product_dtype(x_ND)
    x_ND = x_ND.to(dtype)
    for columns, h_NJ in _blocks(b_F.expand(len(x_ND), -1)):
        product(x_ND, W_DF[:, columns].to(dtype), out=h_NJ).add_(b_F[columns])
        yield columns, h_NJ


def _blocks(like_NF: Tensor, device: torch.device | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns of a tensor, each with the same scratch `[N, J]` (its contents are what they were)."""
    n_rows, n_latents = like_NF.shape
    width = min(n_latents, max(16, BLOCK_BYTES // (like_NF.element_size() * max(1, n_rows)) // 16 * 16))
    scratch = torch.empty(n_rows * width, dtype=like_NF.dtype, device=device or like_NF.device)
    for start in range(0, n_latents, width):
        columns = slice(start, min(start + width, n_latents))
        yield columns, scratch[: n_rows * (columns.stop - start)].view(n_rows, -1)


def _gather(
    g_NJ: Tensor, columns: slice, gradient_NF: Tensor | None, recipes: list[Recipe], fresh: bool = True
) -> Tensor:
    """A block of the gradient: what autograd brought and what the recipes add, in place of (or on top of) `g`."""
    if fresh:
        g_NJ.zero_() if gradient_NF is None else g_NJ.copy_(gradient_NF[:, columns])
    elif gradient_NF is not None:
        g_NJ += gradient_NF[:, columns]
    for recipe in recipes:
        recipe(columns, g_NJ)
    return g_NJ


def _weights(mask_N: Tensor | None, like_NF: Tensor) -> Tensor:
    """The mask as numbers, `[N]`."""
    return like_NF.new_ones(len(like_NF)) if mask_N is None else mask_N.to(like_NF.dtype)
