"""Small random encoding problems, and both paths through them.

Letters: N tokens, D width, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lm_saes.latents.activations import ActivationFunction
from lm_saes.latents.codes import Code
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.selection.selector import Selector

from ..dictionaries.twin import sae_config


def activation(act_fn: str, d_sae: int, **settings: Any) -> ActivationFunction:
    """An activation function with random thresholds where it has any."""
    cfg = sae_config(d_model=1, expansion_factor=float(d_sae), act_fn=act_fn, **settings)
    made = ActivationFunction.registry[act_fn](cfg.selection_settings)
    if made.log_threshold is not None:
        with torch.no_grad():
            made.log_threshold.copy_(torch.linspace(-1.5, 0.5, d_sae))
    return made


@dataclass
class Problem:
    """Inputs and weights; every run has its own activation function (one keeps a running threshold)."""

    act_fn: str
    gated: bool = True
    glu: bool = False
    masked: bool = False
    n_tokens: int = 13
    d_sae: int = 24
    dtype: torch.dtype = torch.float64
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype).requires_grad_()

        self.x_ND, self.W_DF, self.b_F = normal(self.n_tokens, 5), normal(5, self.d_sae), normal(self.d_sae)
        self.gate_W_DF, self.gate_b_F = (normal(5, self.d_sae), normal(self.d_sae)) if self.glu else (None, None)
        self.W_FD, self.v_F = normal(self.d_sae, 5), normal(self.d_sae)
        self.scale_F = normal(self.d_sae).detach().abs() if self.gated else None
        self.mask_N = (torch.arange(self.n_tokens) % 3 != 1) if self.masked else None
        self.activation = activation(self.act_fn, self.d_sae, **self.settings)

    def encode(self, dense: bool | None) -> Code:
        encoder = LinearEncoder(self.W_DF, self.b_F, self.gate_W_DF, self.gate_b_F)
        return encode(self.x_ND, encoder, Selector(self.activation), self.scale_F, self.mask_N, dense=dense)

    def s(self) -> Tensor:
        """What selection looks at, `[N, F]`."""
        h_NF = LinearEncoder(self.W_DF, self.b_F, self.gate_W_DF, self.gate_b_F).pre_activations(self.x_ND).detach()
        return h_NF if self.scale_F is None else h_NF * self.scale_F

    def gradients(self, code: Code) -> dict[str, Tensor]:
        """Gradients of a loss that looks at the latents in every way that losses do, masked tokens left out."""
        y_ND = code.decode(self.W_FD)
        weighed = torch.tanh(code.values * code.at(self.v_F))
        per_token = y_ND.square().sum(1) + code.sum_rows(weighed).square()
        if self.mask_N is not None:
            per_token = per_token * self.mask_N
            weighed = weighed * code.of_row(self.mask_N.to(self.dtype))
        loss = per_token.sum() + code.sum_latents(weighed).square().sum()
        wanted = {name: getattr(self, name) for name in ("x_ND", "W_DF", "b_F", "gate_W_DF", "gate_b_F", "W_FD", "v_F")}
        wanted["log_theta"] = self.activation.log_threshold
        wanted = {name: p for name, p in wanted.items() if p is not None}
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
