"""The decoder norm of least reconstruction loss on one batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from lm_saes.config import BaseConfig
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.initialization.encoder_bias import EncoderBiasSettings
from lm_saes.initialization.mlp import MLPSettings
from lm_saes.initialization.step import InitializationStep, Start, TieSettings

log = logging.getLogger("lm_saes.initializer")


class DecoderNormSettings(BaseConfig):
    """Settings of the search for a norm."""

    grid_search_init_norm: bool = False
    """Set decoder norms to the value with the least reconstruction loss on one batch."""


class DecoderNorm(DecoderNormSettings, EncoderBiasSettings, MLPSettings, TieSettings, InitializationStep):
    """The best of 50 norms up to 5, then of 20 around it; encoder tie and bias follow each of them."""

    name = "decoder-norm"
    order = 7
    coarse: ClassVar[list[float]] = [0.1 * i for i in range(1, 51)]
    fine: ClassVar[int] = 20

    def is_on(self) -> bool:
        return self.grid_search_init_norm

    def apply(self, start: Start) -> None:
        sae, batch = start.sae, start.batch
        running = {name: buffer.clone() for name, buffer in sae.named_buffers()}
        best = self._best(sae, batch, self.coarse)
        best = self._best(sae, batch, torch.linspace(best - 0.09, best + 0.1, self.fine).tolist())
        sae.load_state_dict(running, strict=False)  # running thresholds begin with training, not with the search
        log.info("best_norm_fine_grained=%.4g: the decoder norm of least reconstruction loss", best)
        if start.wandb_logger is not None:
            start.wandb_logger.log({"best_norm_fine_grained": best})
        self._set(sae, batch, best)

    def _best(self, sae: AbstractSparseAutoEncoder, batch: Mapping[str, Any], norms: Iterable[float]) -> float:
        losses: dict[float, float] = {}
        for norm in norms:
            self._set(sae, batch, norm)
            losses[norm] = float(sae.compute_loss(batch)["l_rec"])  # type: ignore[index]
        return min(losses, key=lambda norm: losses[norm])

    def _set(self, sae: AbstractSparseAutoEncoder, batch: Mapping[str, Any], norm: float) -> None:
        sae.set_decoder_to_fixed_norm(norm, force_exact=True)
        if not self.initialize_tc_with_mlp:
            self.tie(sae)
        if self.init_encoder_bias_with_mean_hidden_pre:
            sae.init_encoder_bias_with_mean_hidden_pre(batch)
