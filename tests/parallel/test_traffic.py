"""What a step hands to collectives is what docs/design/007-many-processes.md says, to the byte."""

from __future__ import annotations

import pytest

from .conftest import Pools
from .work import CONTEXTS, LENGTH, Case, D

K, F, B = 3, 4 * D, 8
"""Latents kept of a token, latents in all, bytes of a number."""


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
