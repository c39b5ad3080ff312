"""Lorsa against an unoptimised twin: forward, every loss term, every gradient, on contexts with masks.

The twin attends position by position and turns pairs as complex numbers. It never sees a masked token after attention:
it drops them there, which is what a mask means.

Letters: B contexts, S positions, N valid tokens, G query-key heads, E their width, D width, F heads (latents).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.dictionaries.lorsa import LorsaConfig, LowRankSparseAttention
from lm_saes.latents.codes import DenseCode, SparseCode

from .comparing import EXACT, SPARSITY, dead_mask, every_term, losses, same_losses, same_term
from .twin import (
    ACT_FNS,
    IN,
    OUT,
    THETA,
    Twin,
    assert_same,
    assert_same_gradients,
    gradients,
    randomized,
    valid,
)

DEAD = [2, 3, 7, 11, 20]
BASE: dict[str, Any] = {"d_model": 6, "expansion_factor": 4.0, "norm_activation": "inference", "n_ctx": 8,
                        "hook_point_in": IN, "hook_point_out": OUT, "n_qk_heads": 3, "d_qk_head": 6}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "adjacent": {"rotary_dim": 6, "rotary_base": 20.0},
    "halves": {"rotary_dim": 4, "rotary_base": 30.0, "rotary_adjacent_pairs": False, "use_decoder_bias": False,
               "use_post_qk_ln": True, "normalization_type": "RMS", "eps": 0.1},
    "none": {"positional_embedding_type": "none", "use_post_qk_ln": True, "normalization_type": "LN", "eps": 1e-2,
             "attn_scale": 0.7, "n_qk_heads": 24},
    "parts": {"rotary_dim": 8, "rotary_scale": 2, "use_NTK_by_parts_rope": True, "NTK_by_parts_factor": 4.0,
              "NTK_by_parts_low_freq_factor": 0.5, "NTK_by_parts_high_freq_factor": 3.0, "old_context_len": 20,
              "rotary_base": 100.0, "n_qk_heads": 1},
}  # fmt: skip


def lorsa_config(variant: str = "adjacent", **settings: Any) -> LorsaConfig:
    """A small config; the top-k family gets a k that is small beside its 24 latents."""
    small: dict[str, Any] = {"top_k": 3} if "topk" in settings.get("act_fn", "") else {}
    return LorsaConfig(**(BASE | VARIANTS[variant] | small | settings))


def random_lorsa(cfg: LorsaConfig, seed: int = 0) -> LowRankSparseAttention:
    return randomized(LowRankSparseAttention(cfg), seed, log_threshold=-2.0)


def contexts(cfg: LorsaConfig, masked: bool = False, seed: int = 1, scale: float = 1.0) -> dict[str, Any]:
    """Four contexts of 5; with a mask: BOS masked, two kinds of padding, and a hole."""
    draw = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {"tokens": torch.arange(1, 21).view(4, 5)}
    for hook in cfg.associated_hook_points:
        batch[hook] = (scale * torch.randn(4, 5, cfg.d_model, generator=draw, dtype=torch.float64)).to(cfg.dtype)
    if masked:
        batch["mask"] = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    return batch


class LorsaTwin(Twin):
    """The same mathematics over leaf copies of the parameters; `W_O` goes by the autoencoder's name, `W_D`."""

    def __init__(self, lorsa: LowRankSparseAttention) -> None:
        self.cfg: Any = lorsa.cfg
        named = {"W_D" if name == "W_O" else name: p for name, p in lorsa.named_parameters()}
        self.p = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
        self.norm_F = self.p["W_D"].square().sum(1).sqrt()

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return {"W_O" if name == "W_D" else name: g for name, g in super().gradients(loss).items()}

    def radians(self, pair: int) -> float:
        """By how much a pair is turned from one position to the next."""
        cfg = self.cfg
        frequency = cfg.rotary_base ** (-2 * pair / cfg.rotary_dim)
        if not cfg.use_NTK_by_parts_rope:
            return frequency
        length = 2 * math.pi / frequency
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        if length < cfg.old_context_len / high:
            return frequency
        if length > cfg.old_context_len / low:
            return frequency / cfg.NTK_by_parts_factor
        smooth = (cfg.old_context_len / length - low) / (high - low)
        return (1 - smooth) * frequency / cfg.NTK_by_parts_factor + smooth * frequency

    def turned(self, x_SE: Tensor) -> Tensor:
        cfg = self.cfg
        if cfg.positional_embedding_type == "none":
            return x_SE
        x_SE = torch.stack([x_SE] * cfg.rotary_scale, -1).flatten(-2)
        rows = []
        for position, x_E in enumerate(x_SE):
            row = list(x_E)
            for pair in range(cfg.rotary_dim // 2):
                i, j = (2 * pair, 2 * pair + 1) if cfg.rotary_adjacent_pairs else (pair, pair + cfg.rotary_dim // 2)
                turn = cmath.exp(1j * position * self.radians(pair))
                row[i], row[j] = (
                    x_E[i] * turn.real - x_E[j] * turn.imag,
                    x_E[j] * turn.real + x_E[i] * turn.imag,
                )
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def normed(self, x_SE: Tensor, w_E: Tensor) -> Tensor:
        if self.cfg.normalization_type == "LN":
            x_SE = x_SE - x_SE.sum(1, keepdim=True) / x_SE.shape[1]
        return x_SE / (x_SE.square().sum(1, keepdim=True) / x_SE.shape[1] + self.cfg.eps) ** 0.5 * w_E

    def pattern(self, x_SD: Tensor, g: int) -> Tensor:
        """How query-key head g attends within one context, `[S, S]`."""
        q, k = (x_SD @ self.p[f"W_{x}"][g] + self.p[f"b_{x}"][g] for x in "QK")
        if self.cfg.use_post_qk_ln:
            q, k = self.normed(q, self.p["ln_q.w"][g]), self.normed(k, self.p["ln_k.w"][g])
        q, k = self.turned(q), self.turned(k)
        scale = self.cfg.attn_scale or math.sqrt(self.cfg.d_qk_head)
        rows = []
        for s in range(len(x_SD)):
            weights = torch.softmax(k[: s + 1] @ q[s] / scale, 0)
            rows.append(torch.cat([weights, weights.new_zeros(len(x_SD) - s - 1)]))
        return torch.stack(rows)

    def hidden(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        group = self.cfg.d_sae // self.cfg.n_qk_heads
        found = []
        for x_SD in x_BSD:
            v_SF = x_SD @ self.p["W_V"].T + self.p["b_V"]
            patterns = [self.pattern(x_SD, g) for g in range(self.cfg.n_qk_heads)]
            found.append(torch.stack([patterns[i // group] @ v_SF[:, i] for i in range(self.cfg.d_sae)], 1))
        return torch.stack(found)

    def valid_hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Masked tokens are attended to, and dropped behind that."""
        return valid(self.hidden(batch[IN]), batch)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float64, False), (torch.float64, True), (torch.float32, True)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_forward_losses_and_gradients(
    path: str, act_fn: str, gated: bool, variant: str, masked: bool, dtype: torch.dtype
) -> None:
    cfg = lorsa_config(variant, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=dtype)
    lorsa, batch, tolerance = random_lorsa(cfg), contexts(cfg, masked), EXACT[dtype]
    twin = LorsaTwin(lorsa)
    result = losses(lorsa, batch, **every_term(act_fn), is_dead=dead_mask(lorsa, DEAD))
    assert isinstance(result.record.code, SparseCode if path == "sparse" else DenseCode)
    h = twin.hidden(batch[IN])
    h_NF = valid(h, batch)
    assert_same(result["hidden_pre"], h, tolerance, "hidden_pre")
    assert_same(valid(result["feature_acts"], batch), twin.latents(h_NF), tolerance, "feature_acts")
    assert 0 < int((valid(result["feature_acts"], batch) > 0).sum()) < h_NF.numel()
    assert_same(valid(result["reconstructed"], batch), twin.decode(twin.latents(h_NF)), tolerance, "reconstructed")
    assert result["reconstructed"].shape == batch[OUT].shape
    assert int(result["n_tokens"]) == len(h_NF)

    want = twin.losses(batch, dead=DEAD, k_aux=3)
    total = same_losses(result, want, tolerance)
    found = gradients(lorsa, result["loss"])  # type: ignore[arg-type]
    assert_same_gradients(found, twin.gradients(total), tolerance)
    # A key's bias shifts all scores of a query alike, unless a norm or an embedding stands between.
    assert all(float(g.abs().sum()) > 0 for g in found.values())


@pytest.mark.parametrize(("kind", "p"), SPARSITY)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_each_sparsity_loss(path: str, act_fn: str, gated: bool, kind: str, p: float) -> None:
    cfg = lorsa_config(act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    lorsa, batch = random_lorsa(cfg), contexts(cfg, masked=True)
    twin = LorsaTwin(lorsa)
    got = losses(lorsa, batch, sparsity_loss_type=kind, p=p, l1_coefficient=0.3)["l_s"]
    want = 0.3 * twin.losses(batch, sparsity=(kind, p))["l_s"]
    found = same_term(lorsa, twin, got, want, 1e-12)
    assert float(found["W_O"].abs().sum()) > 0  # gradients reach the norms


@pytest.mark.parametrize("gated", [False, True])
def test_pre_activation_loss(gated: bool) -> None:
    cfg = lorsa_config(act_fn="jumprelu", sparsity_include_decoder_norm=gated, dtype=torch.float64)
    lorsa, batch = random_lorsa(cfg), contexts(cfg, masked=True)
    twin = LorsaTwin(lorsa)
    got, want = losses(lorsa, batch, lp_coefficient=0.2)["l_p"], 0.2 * twin.losses(batch)["l_p"]
    found = same_term(lorsa, twin, got, want, 1e-12)
    assert all(float(found[name].abs().sum()) > 0 for name in ("W_Q", "W_V", "W_O", THETA))


@pytest.mark.parametrize("k_aux", [1, 4, 100])  # 100: more than there are dead heads
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_auxk_alone(act_fn: str, gated: bool, k_aux: int) -> None:
    cfg = lorsa_config(act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    lorsa, batch = random_lorsa(cfg), contexts(cfg, masked=True)
    twin = LorsaTwin(lorsa)
    got = losses(lorsa, batch, auxk_coefficient=0.5, k_aux=k_aux, is_dead=dead_mask(lorsa, DEAD))["l_aux"]
    want = 0.5 * twin.losses(batch, dead=DEAD, k_aux=k_aux)["l_aux"]
    found = same_term(lorsa, twin, got, want, 1e-12)
    for name in ("W_V", "b_V", "W_O"):
        touched = found[name].abs().reshape(24, -1).sum(1) > 0
        assert touched.any(), name  # the gradient reaches values and outputs
        assert not touched[~dead_mask(lorsa, DEAD)].any(), name  # of dead heads only: the error is detached
    assert float(found["W_Q"].abs().sum()) > 0
    assert float(found["b_D"].abs().sum()) == 0


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_what_later_tokens_and_masked_labels_hold_changes_nothing(path: str, act_fn: str) -> None:
    """Right padding is never attended to, and what it is to be reconstructed to counts nowhere."""
    cfg = lorsa_config(act_fn=act_fn, dtype=torch.float64)
    batch = contexts(cfg, masked=True)
    other = dict(batch)
    padding = batch["mask"].flip(1).cumsum(1).flip(1) == 0
    assert int(padding.sum()) == 6
    other[IN] = torch.where(padding[..., None], 50 * batch[IN] + 7, batch[IN])
    other[OUT] = torch.where(batch["mask"][..., None], batch[OUT], 50 * batch[OUT] + 7)
    found = []
    for given in (batch, other, other | {"mask": batch["mask"].long()}):  # a mask may hold 0 and 1
        lorsa = random_lorsa(cfg)
        settings = {"auxk_coefficient": 0.1, "lp_coefficient": 0.1 if act_fn == "jumprelu" else 0.0}
        dead = dead_mask(lorsa, DEAD)
        result = losses(lorsa, given, sparsity_loss_type="tanh-quad", is_dead=dead, **settings)
        grads = gradients(lorsa, result["loss"])  # type: ignore[arg-type]
        found.append((result["loss"], result.record.counts, grads, dict(lorsa.named_buffers())))
    for loss, counts, grads, buffers in found[1:]:
        assert_same(loss, found[0][0], 1e-12)
        assert torch.equal(counts, found[0][1])
        assert_same_gradients(grads, found[0][2], 1e-9)
        assert all(torch.equal(b, found[0][3][name]) for name, b in buffers.items() if b is not None)


def test_a_mask_never_changes_attention() -> None:
    """A masked BOS, or a masked token in the middle, is attended to as any other."""
    cfg = lorsa_config(dtype=torch.float64)
    lorsa, batch = random_lorsa(cfg), contexts(cfg, masked=True)
    masked = lorsa.record(batch).code.dense()
    del batch["mask"]
    assert torch.equal(lorsa.record(batch).code.dense(), masked)
    moved = batch | {IN: batch[IN].index_fill(1, torch.tensor([0]), 3.0)}
    assert not torch.equal(lorsa.record(moved).code.dense(), masked)


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_half_precision_and_autocast_change_rounding_only(path: str, act_fn: str, variant: str) -> None:
    cfg = lorsa_config(variant, act_fn=act_fn)
    batch = contexts(cfg)
    lorsa = random_lorsa(cfg)
    want = losses(lorsa, batch, sparsity_loss_type="power")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses(random_lorsa(cfg), batch, sparsity_loss_type="power")
    half_cfg = cfg.model_copy(update={"dtype": torch.bfloat16})
    half = losses(random_lorsa(half_cfg), contexts(half_cfg), sparsity_loss_type="power")
    for got in (cast, half):
        assert got["loss"].dtype == torch.float32
        assert_same(got["loss"], want["loss"], 0.1)
        got["loss"].backward()
