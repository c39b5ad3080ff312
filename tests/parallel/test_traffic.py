"""What a step hands to collectives is what docs/design/007-many-processes.md says, to the byte."""

from __future__ import annotations

import pytest

from .conftest import Pools
from .work import CONTEXTS, LENGTH, Case, D

K, F, B = 3, 4 * D, 8
"""Latents kept of a token, latents in all, bytes of a number."""


H, N = 4, CONTEXTS * LENGTH
"""Heads of a crosscoder; tokens."""


@pytest.mark.parametrize("n", [2, 4])
def test_a_crosscoders_heads(n: int, pools: Pools) -> None:
    k = 1  # few enough for the sparse path
    sent = pools(n).run("traffic", Case("crosscoder", "topk", steps=2, sae={"top_k": k}), (1, 1, n))
    products, biases, values, gradient_norm = N * F * B, F * B, N * H * k * B, B
    norms, reconstruction = H // n * F * B, N * (H // n) * D * B
    assert sent["sites"].tolist() == [products + biases + values + gradient_norm, norms + reconstruction]
    assert sent["latents"].tolist() == sent["tokens"].tolist() == [0, 0]


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (1, 4), (4, 1), (2, 2)], ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
def test_a_topk_step(mesh: tuple[int, int], pools: Pools) -> None:
    data, model = mesh
    sent = pools(data * model).run("traffic", Case("sae", "topk", steps=2), mesh)
    n_tokens, n_latents = CONTEXTS * LENGTH // data, F // model
    reconstruction, candidates = n_tokens * D * B, n_tokens * K * B
    weights = (2 * n_latents * D + n_latents + D) * B
    width, gradient_norm = 8, B
    tokens, n_valid, loss, mean, fired = 8, 4, B, D * B, n_latents * 4
    assert sent["latents"].tolist() == ([reconstruction + width + gradient_norm, candidates] if model > 1 else [0, 0])
    assert sent["tokens"].tolist() == ([weights + tokens + n_valid + loss + mean + fired, 0] if data > 1 else [0, 0])
