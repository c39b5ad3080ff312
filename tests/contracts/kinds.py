"""An example of every dictionary kind, for promises that all kinds keep.

A kind that `VARIANTS` does not name is enrolled with the settings that it cannot do without.

A dictionary here is random in every parameter, knows its dataset norms, and has seen one batch in training mode, so
that running thresholds are what they are after training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.molt import MixtureOfLinearTransform

from ..unit.dictionaries.twin import IN, OUT, THETA, random_batch
from . import toy  # noqa: F401 (a kind that registers itself)

_LORSA: dict[str, Any] = {"hook_point_in": IN, "hook_point_out": OUT, "n_qk_heads": 24, "d_qk_head": 4, "n_ctx": 5}
_RANKS = {1: 10, 3: 8, 9: 6}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "sae": {
        "autoencoder": {"hook_point_in": IN, "hook_point_out": IN},
        "transcoder": {"hook_point_in": IN, "hook_point_out": OUT},
        "ungated": {"hook_point_in": IN, "hook_point_out": OUT, "sparsity_include_decoder_norm": False},
        "glu": {"hook_point_in": IN, "hook_point_out": OUT, "use_glu_encoder": True, "use_decoder_bias": False},
    },
    "crosscoder": {
        "crosscoder": {"hook_points": [IN, OUT, "third"]},
        "ungated": {"hook_points": [IN, OUT], "sparsity_include_decoder_norm": False, "use_decoder_bias": False},
    },
    "clt": {
        "clt": {"hook_points_in": [IN, "in1", "in2"], "hook_points_out": [OUT, "out1", "out2"]},
        "ungated": {
            "hook_points_in": [IN, OUT],
            "hook_points_out": [OUT, "third"],
            "sparsity_include_decoder_norm": False,
            "use_decoder_bias": False,
        },
    },
    "lorsa": {  # each head with a query-key head of its own, so that heads may change places
        "lorsa": {**_LORSA, "rotary_dim": 4},
        "ungated": {
            **_LORSA,
            "positional_embedding_type": "none",
            "use_post_qk_ln": True,
            "normalization_type": "RMS",
            "sparsity_include_decoder_norm": False,
            "use_decoder_bias": False,
        },
    },
    "molt": {
        "molt": {"hook_point_in": IN, "hook_point_out": OUT, "rank_counts": _RANKS},
        "ungated": {
            "hook_point_in": IN,
            "hook_point_out": IN,
            "rank_counts": _RANKS,
            "sparsity_include_decoder_norm": False,
            "use_decoder_bias": False,
        },
    },
}
NORMS = ("token-wise", "batch-wise", "dataset-wise", "inference")


def enrol() -> None:
    """Give every registered kind that has no variants here one, from the hook points that its config requires."""
    BaseSAEConfig.kind("sae")  # imports all kinds
    for kind, config in BaseSAEConfig.registry.items():
        needed = {name for name, field in config.model_fields.items() if field.is_required()}
        hooks = {name: IN for name in needed - {"d_model", "expansion_factor", "sae_type"}}
        VARIANTS.setdefault(kind, {kind: hooks, "ungated": hooks | {"sparsity_include_decoder_norm": False}})


def variants() -> list[Any]:
    """Every kind in every variant with every activation function that it admits."""
    enrol()
    return [
        pytest.param(kind, name, act_fn, id=f"{kind}-{name}-{act_fn}")
        for kind in AbstractSparseAutoEncoder.kinds
        for name in VARIANTS[kind]
        for act_fn in sorted(BaseSAEConfig.registry[kind].activation_functions)
    ]


def own_latents(dictionary: AbstractSparseAutoEncoder, name: str) -> range:
    """The latents that a parameter belongs to: all, or those of one rank in a mixture of linear transforms."""
    if isinstance(dictionary, MixtureOfLinearTransform) and "_matrices." in name:
        rank = int(name.split(".")[1])
        first = sum(n for r, n in _RANKS.items() if r < rank)
        return range(first, first + _RANKS[rank])
    return range(dictionary.cfg.d_sae)


def new_order(dictionary: AbstractSparseAutoEncoder) -> torch.Tensor:
    """Latents in another order, in which they stay among those that they share a parameter with."""
    draw = torch.Generator().manual_seed(7)
    sizes = _RANKS.values() if isinstance(dictionary, MixtureOfLinearTransform) else [dictionary.cfg.d_sae]
    firsts = [sum(list(sizes)[:i]) for i in range(len(sizes))]
    return torch.cat([first + torch.randperm(n, generator=draw) for first, n in zip(firsts, sizes, strict=True)])


every_variant = pytest.mark.parametrize(("kind", "variant", "act_fn"), variants())


def example_config(kind: str, variant: str, act_fn: str, norm_activation: str = "inference") -> BaseSAEConfig:
    settings: dict[str, Any] = {"d_model": 6, "expansion_factor": 4.0, "act_fn": act_fn}
    if "topk" in act_fn:
        settings["top_k"] = 3
    settings |= {"norm_activation": norm_activation} | VARIANTS[kind][variant]
    return BaseSAEConfig.kind(kind)(**settings)


def example(
    kind: str, variant: str, act_fn: str, norm_activation: str = "inference"
) -> tuple[AbstractSparseAutoEncoder, dict[str, Any]]:
    """A dictionary in training mode, and a raw batch with a mask whose hook points differ in scale."""
    cfg = example_config(kind, variant, act_fn, norm_activation)
    dictionary = AbstractSparseAutoEncoder.from_config(cfg)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            value = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(0.4 * value - 1 if name == THETA else 0.5 * value)
    batch = random_batch(cfg, (4, 5), masked=True)  # type: ignore[arg-type]
    for i, hook in enumerate(cfg.associated_hook_points):
        batch[hook] = batch[hook] * (1.5 + 3 * i)
    dictionary.set_dataset_average_activation_norm(
        {hook: 3.0 + 8 * i for i, hook in enumerate(cfg.associated_hook_points)}
    )
    with torch.no_grad():
        dictionary.record(batch)
    return dictionary, batch
