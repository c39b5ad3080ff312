"""Dictionaries whose results can be told beforehand."""

import torch
from torch import Tensor

from lm_saes import SAEConfig, SparseAutoEncoder
from lm_saes.config import build

HOOK = "blocks.0.hook_resid_post"


def dictionary(
    W_E: Tensor, W_D: Tensor, hook_out: str = HOOK, b_E: float = 0.0, b_D: Tensor | None = None
) -> SparseAutoEncoder:
    """A ReLU dictionary without normalisation and with the given weights."""
    d_model, d_sae = W_E.shape
    settings = {
        "hook_point_in": HOOK,
        "hook_point_out": hook_out,
        "d_model": d_model,
        "expansion_factor": d_sae / d_model,
        "act_fn": "relu",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
    }
    sae = SparseAutoEncoder(build(SAEConfig, settings))
    with torch.no_grad():
        sae.W_E.copy_(W_E)
        sae.W_D.copy_(W_D)
        sae.b_E.fill_(b_E)
        sae.get_parameter("b_D").copy_(torch.zeros(d_model) if b_D is None else b_D)
    return sae


def identity(d: int, hook_out: str = HOOK) -> SparseAutoEncoder:
    """relu(x) - relu(-x) = x, exactly."""
    both = torch.cat([torch.eye(d), -torch.eye(d)], dim=1)
    return dictionary(both, both.T, hook_out)
