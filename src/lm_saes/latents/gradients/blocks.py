"""Blocks of latents of all tokens, `[J, N]`, worked on while they lie in the cache.

Dense latents `[N, F]` are stored latent-major, so that the block of some latents is contiguous. Letters: N tokens,
D width, F latents, J latents of one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm_saes import machine
from lm_saes.latents.gradients.deferred import Recipe
from lm_saes.latents.products import add_product, product, product_dtype


def blocks(n_latents: int, n_tokens: int, dtype: torch.dtype) -> Iterator[slice]:
    """The latents, a block at a time."""
    size = max(16, machine.GRADIENT_BLOCK_BYTES // (dtype.itemsize * max(1, n_tokens)) // 16 * 16)
    for start in range(0, n_latents, size):
        yield slice(start, min(start + size, n_latents))


class Scratch:
    """Memory for one block, taken once."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._memory = like, like.new_empty(0)

    def block(self, n_latents: int, n_tokens: int) -> Tensor:
        """A block `[J, N]`; its contents are what they were."""
        size = n_latents * n_tokens
        if self._memory.numel() < size:
            self._memory = self._like.new_empty(size)
        return self._memory[:size].view(n_latents, n_tokens)


def pre_activations(
    x_ND: Tensor, W_DF: Tensor, b_F: Tensor, out_FN: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """`x W + b` in blocks `[J, N]`: of `out`, or each overwritten by the next."""
    dtype = product_dtype(x_ND)
    x_DN, scratch = x_ND.to(dtype).T, Scratch(b_F)
    for some in blocks(len(b_F), len(x_ND), b_F.dtype):
        h_JN = scratch.block(some.stop - some.start, len(x_ND)) if out_FN is None else out_FN[some]
        yield some, product(W_DF[:, some].T.to(dtype), x_DN, out=h_JN).add_(b_F[some, None])


def gather(g_JN: Tensor, some: slice, gradient_NF: Tensor | None, recipes: list[Recipe], fresh: bool = True) -> Tensor:
    """A block of the gradient: what autograd brought and what the recipes add, in place of (or on top of) `g`."""
    if fresh:
        g_JN.zero_() if gradient_NF is None else g_JN.copy_(gradient_NF.T[some])
    elif gradient_NF is not None:
        g_JN += gradient_NF.T[some]
    for recipe in recipes:
        recipe(some, g_JN)
    return g_JN


def weights(mask_N: Tensor | None, n_tokens: int, like: Tensor) -> Tensor:
    """The mask as numbers, `[N]`."""
    return like.new_ones(n_tokens) if mask_N is None else mask_N.to(like.dtype)


class EncoderGradients:
    """Gradients of `x W + b`, block by block; the weights' is made latent-major."""

    def __init__(self, x_ND: Tensor, W_DF: Tensor, dtype: torch.dtype, of_input: bool) -> None:
        self._dtype = product_dtype(x_ND)
        self._x_ND, self._W_DF = x_ND.to(self._dtype), W_DF
        self._ones_N = x_ND.new_ones(len(x_ND), dtype=dtype)
        self.dW_FD = x_ND.new_empty(W_DF.shape[::-1], dtype=dtype)
        self.db_F = x_ND.new_empty(W_DF.shape[1], dtype=dtype)
        self.dx_ND = torch.zeros_like(x_ND) if of_input else None

    def add(self, some: slice, dh_JN: Tensor) -> None:
        """Take in the gradient of a block of pre-activations."""
        torch.mv(dh_JN, self._ones_N, out=self.db_F[some])
        dh_JN = dh_JN.to(self._dtype)
        product(dh_JN, self._x_ND, out=self.dW_FD[some])
        if self.dx_ND is not None:
            add_product(dh_JN.T, self._W_DF[:, some].T.to(self._dtype), out=self.dx_ND)
