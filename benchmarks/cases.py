"""The configurations that `step.py` times, and how their dictionaries are brought into the state that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_saes import SAEConfig, SparseAutoEncoder
from lm_saes.config import build

HOOK = "activations"


@dataclass(frozen=True)
class Case:
    """One configuration, at d=576 unless scaled down. A bar is the largest value that it is to have."""

    name: str
    bar: float | None = None
    """Of a step, in floors."""
    act_fn: str = "topk"
    d_sae: int = 9216
    n_tokens: int = 2048
    k: int = 32
    density: float | None = None
    """Share of latents that is active on a token, brought about before the first step; None: as it comes."""
    further: float | None = None
    """Share of further entries in JumpReLU's window, which is narrowed until they are so few; None: default window."""
    auxk_bar: float | None = None
    """Time every other step with 10% of the latents dead, and so with AuxK: the bar of what that adds, in floors."""
    memory_bar: int | None = None
    """In MB, beyond weights, gradients and optimizer state."""
    trainer: Mapping[str, object] = field(default_factory=dict, hash=False)

    def scaled_down(self) -> Case:
        """The same at a size for a smoke test, d=64."""
        smaller = {"d_sae": self.d_sae // 36, "n_tokens": self.n_tokens // 16, "k": 8}
        return Case(**{**vars(self), **smaller})


BF16 = {"amp_dtype": "bfloat16"}
L1 = {"sparsity_loss_type": "power", "l1_coefficient_warmup_steps": 0}
TANH = {"sparsity_loss_type": "tanh-quad", "l1_coefficient_warmup_steps": 0}
PRE_ACT = {"lp_coefficient": 3e-6}
STILL = {"lr": 1e-7}
"""Rates at which a density, or dead latents, stay what they are during the run."""
AUXK = {"auxk_coefficient": 1 / 32}

CASES = [
    Case("TopK k=32", 1.4),
    Case("TopK k=32", 1.3, d_sae=36864, memory_bar=150),
    Case("TopK k=32, bfloat16", 0.9, trainer=BF16),
    Case("BatchTopK k=32", 1.6, act_fn="batchtopk"),
    Case("TopK k=32, AuxK, 10% dead", auxk_bar=0.55, trainer=AUXK | STILL),
    Case("ReLU + L1, at start", 6.0, act_fn="relu", trainer=L1 | STILL),
    Case("ReLU + L1, 2%", 2.2, act_fn="relu", density=0.02, trainer=L1 | STILL),
    Case("JumpReLU + tanh-quad, at start", 6.0, act_fn="jumprelu", trainer=TANH | STILL),
    Case("JumpReLU + pre-act loss, at start", 6.0, act_fn="jumprelu", trainer=TANH | PRE_ACT | STILL),
    Case("JumpReLU, 2%", 2.2, act_fn="jumprelu", density=0.02, further=0.009, trainer=TANH | STILL),
    Case("JumpReLU, 2%, wide window", 6.0, act_fn="jumprelu", density=0.02, trainer=TANH | STILL),
    Case("JumpReLU, 2%, pre-act loss", 6.0, act_fn="jumprelu", density=0.02, further=0.009,
         trainer=TANH | PRE_ACT | STILL),
    Case("TopK k=32", d_sae=4608),
    Case("TopK k=32", d_sae=18432),
    Case("TopK k=32", n_tokens=1024),
    Case("TopK k=32", n_tokens=4096),
]  # fmt: skip


def as_batch(x_ND: Tensor) -> dict[str, Tensor]:
    """What the trainer reads."""
    return {HOOK: x_ND, "tokens": torch.zeros(len(x_ND), dtype=torch.int64)}


@torch.no_grad()
def dictionary(case: Case, batches: list[Tensor]) -> SparseAutoEncoder:
    """A fresh autoencoder, brought to the case's density on these batches."""
    d_model = batches[0].shape[1]
    k = {"top_k": case.k} if "topk" in case.act_fn else {}
    cfg = build(SAEConfig, {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": d_model, "act_fn": case.act_fn,
                            "expansion_factor": case.d_sae / d_model, **k})  # fmt: skip
    sae = SparseAutoEncoder(cfg)
    bound, threshold = 1 / d_model**0.5, -1.0 if case.act_fn == "jumprelu" else None
    sae.init_parameters(
        encoder_uniform_bound=bound, decoder_uniform_bound=bound, init_log_jumprelu_threshold_value=threshold
    )
    sae.set_dataset_average_activation_norm({HOOK: float(batches[0].norm(dim=1).mean())})
    if case.density is not None:
        _sparsify(sae, batches, case.density, case.further)
    return sae


def _sparsify(sae: SparseAutoEncoder, batches: list[Tensor], density: float, further: float | None) -> None:
    """Set each latent's bias so that it is active on `density` of the tokens, and the window so that it holds more."""
    x_ND = torch.cat([sae.normalize_activations(as_batch(x))[HOOK] for x in batches])
    theta_F, norm_F = _thresholds(sae), sae.decoder_norm()
    below = round(len(x_ND) * (1 - density))
    gaps = []
    for some in torch.arange(sae.cfg.d_sae).split(512):
        h_XN = sae.W_E[:, some].T @ x_ND.T
        cut_X = h_XN.kthvalue(below).values
        sae.b_E[some] = theta_F[some] / norm_F[some] - cut_X
        if further is not None:
            low_X = h_XN.kthvalue(below - round(len(x_ND) * further)).values
            gaps.append((cut_X - low_X) * norm_F[some])
    if further is not None:
        sae.activation_function.window = 2 * float(torch.cat(gaps).mean())


def _thresholds(sae: SparseAutoEncoder) -> Tensor:
    log_theta = sae.activation_function.log_threshold
    return torch.zeros(sae.cfg.d_sae) if log_theta is None else log_theta.exp()


@torch.no_grad()
def densities(sae: SparseAutoEncoder, batches: list[Tensor]) -> tuple[float, float]:
    """Shares of entries that are active, and that are not active but in JumpReLU's window."""
    theta_F, half = _thresholds(sae), getattr(sae.activation_function, "window", 0.0) / 2
    active = further = n = 0
    for x in batches:
        h_NF = sae.hidden_pre(sae.normalize_activations(as_batch(x))[HOOK])
        s_NF = h_NF * sae.decoder_norm()
        active += int((s_NF > theta_F).sum())
        further += int(((s_NF > (theta_F - half).clamp(min=0)) & (s_NF <= theta_F)).sum())
        n += s_NF.numel()
    return active / n, further / n


@torch.no_grad()
def shrink_some(sae: SparseAutoEncoder, share: float) -> Tensor:
    """Make some latents' encoder rows so small that they are never among the k largest; which, bool `[F]`.

    Half of their pre-activations stay positive: AuxK, which uses positive ones alone, has as much to do as it can get.
    """
    shrunk_F = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    shrunk_F[torch.randperm(sae.cfg.d_sae)[: round(share * sae.cfg.d_sae)]] = True
    sae.W_E[:, shrunk_F] *= 0.1
    return shrunk_F
