"""Rotary embedding against the models that define it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_turn
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_turn
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_turn

from lm_saes.latents.rotary import NTKByParts, Rotary

SAME = 1e-5
"""Float32 angles of up to some thousand radians, computed in the same way."""


def queries(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float = SAME) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


# -- by hand -------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Base 4 in 4 dimensions: inverse frequencies 4^0 = 1 and 4^(-1/2) = 0.5; the pair (1, 0) becomes (cos, sin)."""
    adjacent, halves = Rotary(4, 4.0), Rotary(4, 4.0, adjacent_pairs=False)
    assert adjacent.inverse_frequencies().tolist() == [1.0, 0.5]
    x = torch.tensor([1.0, 0, 1, 0, 7]).repeat(3, 1)  # the fifth coordinate passes
    for p, row in enumerate(adjacent.turn(x).tolist()):
        assert row == pytest.approx([math.cos(p), math.sin(p), math.cos(p / 2), math.sin(p / 2), 7])
    x = torch.tensor([1.0, 1, 0, 0, 7]).repeat(3, 1)
    for p, row in enumerate(halves.turn(x).tolist()):
        assert row == pytest.approx([math.cos(p), math.cos(p / 2), math.sin(p), math.sin(p / 2), 7])


# -- as the models do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 3000])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_llama(base: float, length: int) -> None:
    q, k = queries(2, 3, length, 16), queries(2, 3, length, 16, seed=1)
    config = LlamaConfig(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": base})
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(length)[None])
    rotary = Rotary(16, base, adjacent_pairs=False)
    for got, want in zip((rotary.turn(q), rotary.turn(k)), llama_turn(q, k, cos, sin), strict=True):
        close(got, want)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gpt_neox_turns_a_part_of_each_head(share: float) -> None:
    q, k = queries(2, 3, 40, 16), queries(2, 3, 40, 16, seed=1)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    config = GPTNeoXConfig(hidden_size=48, num_attention_heads=3, rope_parameters=rope)
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, torch.arange(40)[None])
    rotary = Rotary(int(16 * share), adjacent_pairs=False)
    for got, want in zip((rotary.turn(q), rotary.turn(k)), neox_turn(q, k, cos, sin), strict=True):
        close(got, want)
    assert torch.equal(rotary.turn(q)[..., rotary.dim :], q[..., rotary.dim :])


@pytest.mark.parametrize("dim", [4, 16])
def test_gpt_j_turns_adjacent_pairs(dim: int) -> None:
    q = queries(2, 40, 3, 16)
    config = GPTJConfig(rotary_dim=dim)
    sin, cos = create_sinusoidal_positions(40, config.rotary_dim)[None].chunk(2, dim=-1)
    want = torch.cat([gptj_turn(q[..., :dim], sin, cos), q[..., dim:]], dim=-1)
    close(Rotary(dim).turn(q.transpose(1, 2)).transpose(1, 2), want)


@pytest.mark.parametrize(
    ("factor", "low", "high", "old"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 512), (4.0, 2.0, 2.0, 64)]
)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_llama_3_slows_low_frequencies_down(dim: int, factor: float, low: float, high: float, old: int) -> None:
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": old,
    }
    reference = LlamaRotaryEmbedding(LlamaConfig(head_dim=dim, max_position_embeddings=10 * old, rope_parameters=rope))
    rotary = Rotary(dim, 500000.0, adjacent_pairs=False, by_parts=NTKByParts(factor, low, high, old))
    got = rotary.inverse_frequencies()
    torch.testing.assert_close(got, reference.inv_freq, rtol=1e-6, atol=0)
    plain = Rotary(dim, 500000.0).inverse_frequencies()
    assert bool((got < plain).any()) and got[0] == plain[0]
    q = queries(1, 2, 50, dim)
    cos, sin = reference(q, torch.arange(50)[None])
    close(rotary.turn(q), llama_turn(q, q, cos, sin)[0])


# -- what it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("scale", [1, 3])
def test_scores_depend_on_distances_alone(adjacent: bool, scale: int) -> None:
    rotary = Rotary(4 * scale, 100.0, adjacent, scale, NTKByParts(4.0, 1.0, 4.0, 16))
    q, k = queries(1, 6, dtype=torch.float64), queries(1, 6, dtype=torch.float64, seed=1)
    scores = rotary.turn(q.expand(12, -1)) @ rotary.turn(k.expand(12, -1)).T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        close(diagonal, diagonal[:1].expand_as(diagonal), 1e-12)
    assert float(scores.std()) > 0.1


def test_lengths_are_kept() -> None:
    x = queries(2, 3, 50, 8)
    close(Rotary(8).turn(x).norm(dim=-1), x.norm(dim=-1))


def test_scale_repeats_each_coordinate() -> None:
    x = queries(5, 3, dtype=torch.float64)
    repeated = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(Rotary(4, scale=2).turn(x), Rotary(4).turn(repeated))
    assert Rotary(4, scale=2).turn(x).shape == (5, 6)


def test_precision() -> None:
    """Half precision is turned by float32 angles; float64 by float64 ones."""
    x = queries(3000, 8, dtype=torch.float64)
    exact = Rotary(8).turn(x)
    assert exact.dtype == torch.float64
    positions = torch.arange(3000, dtype=torch.float64)[:, None]
    angles = positions * 10000 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    a, b = x[:, ::2], x[:, 1::2]
    close(exact[:, ::2], a * angles.cos() - b * angles.sin(), 1e-12)
    half = Rotary(8).turn(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    close(half.double(), exact, 0.05)


def test_gradients() -> None:
    x = queries(2, 5, 6, dtype=torch.float64).requires_grad_()
    for adjacent in (True, False):
        assert torch.autograd.gradcheck(Rotary(4, 10.0, adjacent, 2).turn, x)
