"""Initialisation: fresh weights, dataset norms, and what one batch of activations can tell before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, model_serializer, model_validator
from torch import Tensor

from lm_saes.config import BaseConfig
from lm_saes.data.batch import Batch, check_batch
from lm_saes.data.peek import peekable
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.normalization import NORM_BATCHES, average_norms
from lm_saes.errors import ConfigError, DataError
from lm_saes.models.attention_weights import AttentionWeights, attention_weights

if TYPE_CHECKING:
    from lm_saes.models.base import LanguageModel

log = logging.getLogger(__name__)

COARSE_NORMS = [0.1 * i for i in range(1, 51)]
FINE_STEPS = 20
OPTIONAL = {
    "init_encoder_with_decoder_transpose_factor": (
        "has no encoder of its decoder's shape", "init_encoder_with_decoder_transpose"
    ),
    "bias_init_method": ("has no one decoder bias", "init_decoder_bias_with_geometric_median"),
    "initialize_W_D_with_active_subspace": (
        "has no one decoder matrix", "init_W_D_with_active_subspace", "init_W_V_with_active_subspace_per_head"
    ),
    "init_encoder_bias_with_mean_hidden_pre": ("has no encoder bias", "init_encoder_bias_with_mean_hidden_pre"),
}  # fmt: skip
"""Settings that need a method of the dictionary: what a kind without one lacks, and the methods, any of which does."""


class InitializerConfig(BaseConfig):
    """How to initialise a dictionary."""

    bias_init_method: Literal["all_zero", "geometric_median"] = "all_zero"
    """Decoder bias: zero, or the geometric median of the labels of one batch."""
    decoder_uniform_bound: float = Field(default=1.0, gt=0)
    """Decoder weights are drawn uniformly within plus and minus this."""
    encoder_uniform_bound: float = Field(default=1.0, gt=0)
    """Encoder weights are drawn uniformly within plus and minus this."""
    init_encoder_with_decoder_transpose: bool = True
    """Tie the fresh encoder to the decoder: `W_E = factor x W_D^T`. Kinds whose encoder has another shape never do, and
    refuse this if it is set."""
    init_encoder_with_decoder_transpose_factor: float = 1.0
    """That factor."""
    init_log_jumprelu_threshold_value: float | None = None
    """Logarithm of the JumpReLU thresholds at the start (needed for `act_fn="jumprelu"`)."""
    grid_search_init_norm: bool = False
    """Set decoder norms to the value with the least reconstruction loss on one batch."""
    initialize_W_D_with_active_subspace: bool = False
    """Draw decoder directions within the directions of most variance of the labels."""
    d_active_subspace: int | None = Field(default=None, gt=0)
    """How many directions those are."""
    initialize_lorsa_with_mhsa: bool | None = None
    """Lorsa only: start from the model's own attention weights."""
    initialize_tc_with_mlp: bool | None = None
    """Transcoder only: start decoder directions from what the model's own MLP makes of the encoder's."""
    model_layer: int | None = Field(default=None, ge=0)
    """Layer of the model that those weights come from."""
    init_encoder_bias_with_mean_hidden_pre: bool = False
    """Set the encoder bias to minus the mean pre-activation of one batch."""

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> InitializerConfig:
        if not self.initialize_W_D_with_active_subspace:
            self.refuse_without_effect(["d_active_subspace"], "initialize_W_D_with_active_subspace is off", info)
        if not self.init_encoder_with_decoder_transpose:
            factor = ["init_encoder_with_decoder_transpose_factor"]
            self.refuse_without_effect(factor, "init_encoder_with_decoder_transpose is off", info)
        if not (
            self.initialize_lorsa_with_mhsa or self.initialize_tc_with_mlp or self.initialize_W_D_with_active_subspace
        ):
            self.refuse_without_effect(["model_layer"], "nothing is initialised from the model", info)
        if self.initialize_tc_with_mlp:
            if self.model_layer is None:
                raise ValueError("model_layer=None: initialize_tc_with_mlp needs the layer of the MLP to start from")
            if self.initialize_W_D_with_active_subspace:
                raise ValueError(
                    "initialize_W_D_with_active_subspace=True: would overwrite the decoder that initialize_tc_with_mlp "
                    "sets; remove one of them"
                )
            factor = ["init_encoder_with_decoder_transpose_factor"]
            self.refuse_without_effect(factor, "initialize_tc_with_mlp brings encoder norms to 1", info)
        return self

    @model_serializer(mode="wrap")
    def _without_an_unset_tie(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A tie that nobody set is not saved, so that a kind which refuses one can be trained again as it was."""
        name = "init_encoder_with_decoder_transpose"
        return {key: value for key, value in handler(self).items() if key != name or name in self.model_fields_set}


class Initializer:
    """Makes dictionaries ready for training."""

    def __init__(self, cfg: InitializerConfig) -> None:
        self.cfg = cfg

    @torch.no_grad()
    def initialize_parameters(self, sae: AbstractSparseAutoEncoder) -> AbstractSparseAutoEncoder:
        """Draw fresh weights from torch's global generator, and tie the encoder if configured."""
        sae.init_parameters(
            encoder_uniform_bound=self.cfg.encoder_uniform_bound,
            decoder_uniform_bound=self.cfg.decoder_uniform_bound,
            init_log_jumprelu_threshold_value=self.cfg.init_log_jumprelu_threshold_value,
        )
        self._tie(sae)
        return sae

    @torch.no_grad()
    def initialize_sae_from_config(
        self,
        cfg: BaseSAEConfig,
        activation_stream: Iterable[Batch] | None = None,
        activation_norm: Mapping[str, float] | None = None,
        device_mesh: Any = None,
        wandb_logger: Any = None,
        model: LanguageModel | None = None,
    ) -> AbstractSparseAutoEncoder:
        """Build and initialise a dictionary, in the order of section 9 of the specification.

        Batches are only looked at: a stream, or a generator, still gives them to the trainer afterwards.

        Args:
            activation_stream: batches of activations; needed for dataset-wise norms that are not given and for
                everything that looks at a batch.
            activation_norm: mean norm of each hook point's activations.
            model: the language model that gives its MLP (`initialize_tc_with_mlp`) or attention (Lorsa).

        Raises:
            ConfigError: a setting that does not fit this dictionary, or needs something that was not given.
        """
        self.check(cfg)
        mlp = self._mlp(cfg, model) if self.cfg.initialize_tc_with_mlp else None
        mhsa = self._attention(cfg, model)
        sae = AbstractSparseAutoEncoder.from_config(cfg, device_mesh=device_mesh)
        axes = sae.axes
        sae.attach(axes.of_whole_batches())
        self.initialize_parameters(sae)
        wanted = NORM_BATCHES if cfg.norm_activation == "dataset-wise" and activation_norm is None else 1
        batches = [] if activation_stream is None else peekable(activation_stream).peek(wanted)
        batches = [
            {name: axes.tokens.join(v) if isinstance(v, Tensor) else v for name, v in batch.items()}
            for batch in batches
        ]
        for batch in batches:
            check_batch(batch, cfg.widths)
        if cfg.norm_activation == "dataset-wise":
            if activation_norm is None and not batches:
                raise ConfigError(
                    "norm_activation='dataset-wise': give activation_norm, or an activation_stream to measure it"
                )
            measured = (
                average_norms(batches, cfg.associated_hook_points) if activation_norm is None else activation_norm
            )
            sae.set_dataset_average_activation_norm(measured)
        if self.cfg.initialize_lorsa_with_mhsa:
            assert mhsa is not None
            sae.init_lorsa_with_mhsa(mhsa)
        if self._looks_at_a_batch():
            if not batches:
                raise DataError("activation_stream: initialisation looks at a batch, and there is none; give a stream")
            first = {k: v.to(cfg.device) if isinstance(v, torch.Tensor) else v for k, v in batches[0].items()}
            if mlp is not None:
                sae.init_tc_with_mlp(first, mlp)
            if self._starts_per_head(sae):
                assert mhsa is not None
                sae.init_W_V_with_active_subspace_per_head(sae.normalize_activations(first), mhsa)
            elif self.cfg.initialize_W_D_with_active_subspace:
                assert self.cfg.d_active_subspace is not None
                sae.init_W_D_with_active_subspace(sae.normalize_activations(first), self.cfg.d_active_subspace)
                self._tie(sae)
            self.initialization_search(sae, first, wandb_logger)
        sae.attach(axes)
        return sae

    @torch.no_grad()
    def initialization_search(
        self, sae: AbstractSparseAutoEncoder, activation_batch: Mapping[str, Any], wandb_logger: Any = None
    ) -> AbstractSparseAutoEncoder:
        """Set decoder bias, decoder norm and encoder bias by what fits one (raw) batch, as configured."""
        batch = sae.normalize_activations(activation_batch)
        if self.cfg.bias_init_method == "geometric_median":
            sae.init_decoder_bias_with_geometric_median(batch)
        if self.cfg.grid_search_init_norm:
            running = {name: buffer.clone() for name, buffer in sae.named_buffers()}
            best = self._search_norm(sae, batch, COARSE_NORMS)
            fine = torch.linspace(best - 0.09, best + 0.1, FINE_STEPS).tolist()
            best = self._search_norm(sae, batch, fine)
            sae.load_state_dict(running, strict=False)  # running thresholds begin with training, not with the search
            log.info("best_norm_fine_grained=%.4g: the decoder norm of least reconstruction loss", best)
            if wandb_logger is not None:
                wandb_logger.log({"best_norm_fine_grained": best})
            self._set_norm(sae, batch, best)
        elif self.cfg.init_encoder_bias_with_mean_hidden_pre:
            sae.init_encoder_bias_with_mean_hidden_pre(batch)
        return sae

    def _search_norm(self, sae: AbstractSparseAutoEncoder, batch: Mapping[str, Any], norms: list[float]) -> float:
        losses = {}
        for norm in norms:
            self._set_norm(sae, batch, norm)
            result = sae.compute_loss(batch)
            losses[norm] = float(result["l_rec"])  # type: ignore[index]
        return min(losses, key=lambda norm: losses[norm])

    def _set_norm(self, sae: AbstractSparseAutoEncoder, batch: Mapping[str, Any], norm: float) -> None:
        sae.set_decoder_to_fixed_norm(norm, force_exact=True)
        if not self.cfg.initialize_tc_with_mlp:
            self._tie(sae)
        if self.cfg.init_encoder_bias_with_mean_hidden_pre:
            sae.init_encoder_bias_with_mean_hidden_pre(batch)

    def _tie(self, sae: AbstractSparseAutoEncoder) -> None:
        if self.cfg.init_encoder_with_decoder_transpose and sae.offers("init_encoder_with_decoder_transpose"):
            sae.init_encoder_with_decoder_transpose(self.cfg.init_encoder_with_decoder_transpose_factor)

    def _looks_at_a_batch(self) -> bool:
        cfg = self.cfg
        return (
            cfg.bias_init_method != "all_zero"
            or cfg.grid_search_init_norm
            or cfg.initialize_W_D_with_active_subspace
            or bool(cfg.initialize_tc_with_mlp)
            or cfg.init_encoder_bias_with_mean_hidden_pre
        )

    def check(self, cfg: BaseSAEConfig) -> None:
        """Refuse settings that this dictionary has no use for; no activations and no model are looked at.

        Raises:
            ConfigError: with the setting and the reason.
        """
        kind, this = AbstractSparseAutoEncoder.kind_of(cfg), f"a dictionary of sae_type={cfg.sae_type!r}"
        tied = (
            self.cfg.init_encoder_with_decoder_transpose
            and "init_encoder_with_decoder_transpose" in self.cfg.model_fields_set
        )
        if tied and not kind.offers("init_encoder_with_decoder_transpose"):
            raise ConfigError(
                f"init_encoder_with_decoder_transpose=True: {this} has no encoder of its decoder's shape; remove it"
            )
        for name, (lack, *methods) in OPTIONAL.items():
            if not any(map(kind.offers, methods)):
                self.cfg.refuse_without_effect([name], f"{this} {lack}")
        if not kind.reads_uniform_bounds:
            bounds = ["encoder_uniform_bound", "decoder_uniform_bound"]
            self.cfg.refuse_without_effect(bounds, f"{this} draws its fresh weights by a rule of its own")
        if self.cfg.init_log_jumprelu_threshold_value is not None and cfg.act_fn != "jumprelu":
            value = self.cfg.init_log_jumprelu_threshold_value
            raise ConfigError(
                f"init_log_jumprelu_threshold_value={value}: act_fn={cfg.act_fn!r} has no thresholds; remove it"
            )
        if self.cfg.bias_init_method != "all_zero" and not cfg.use_decoder_bias:
            raise ConfigError(
                f"bias_init_method={self.cfg.bias_init_method!r}: use_decoder_bias is off; there is no bias to set"
            )
        if self.cfg.initialize_W_D_with_active_subspace:
            per_head, m = self._starts_per_head(kind), self.cfg.d_active_subspace
            if per_head and m is not None:
                raise ConfigError(
                    f"d_active_subspace={m} has no effect: a Lorsa takes d_qk_head of each head; remove it"
                )
            if not per_head and m is None:
                raise ConfigError(
                    "d_active_subspace=None: initialize_W_D_with_active_subspace needs a number of directions"
                )
            if not (per_head or self.cfg.initialize_tc_with_mlp) and self.cfg.model_layer is not None:
                raise ConfigError(
                    f"model_layer={self.cfg.model_layer} has no effect: nothing is taken from the model; remove it"
                )
        if self.cfg.initialize_lorsa_with_mhsa and not kind.offers("init_lorsa_with_mhsa"):
            raise ConfigError(
                f"initialize_lorsa_with_mhsa=True: needs sae_type='lorsa', not {cfg.sae_type!r}; remove it"
            )
        transcoder = kind.offers("init_tc_with_mlp") and cfg.hook_points_read != cfg.hook_points_written
        if self.cfg.initialize_tc_with_mlp and not transcoder:
            raise ConfigError(
                "initialize_tc_with_mlp=True: needs a transcoder (sae_type='sae', hook_point_out behind the MLP that "
                "hook_point_in stands in front of); remove it"
            )

    def _starts_per_head(self, kind: AbstractSparseAutoEncoder | type[AbstractSparseAutoEncoder]) -> bool:
        """Whether the active subspaces are those of the heads of the model's attention."""
        per_head = kind.offers("init_W_V_with_active_subspace_per_head")
        return self.cfg.initialize_W_D_with_active_subspace and per_head

    def _attention(self, cfg: BaseSAEConfig, model: LanguageModel | None) -> AttentionWeights | None:
        """The attention that a Lorsa starts from, if it does."""
        per_head = self._starts_per_head(AbstractSparseAutoEncoder.kind_of(cfg))
        if not (self.cfg.initialize_lorsa_with_mhsa or per_head):
            return None
        name = "initialize_W_D_with_active_subspace" if per_head else "initialize_lorsa_with_mhsa"
        if self.cfg.model_layer is None:
            raise ConfigError(f"model_layer=None: {name} needs the layer of the attention to start from")
        if model is None:
            raise ConfigError(f"{name}=True: needs the language model's attention; give model")
        try:
            return attention_weights(model, self.cfg.model_layer).to(cfg.device)
        except NotImplementedError as error:
            raise ConfigError(f"{name}=True: {error}; remove it") from error

    def _mlp(self, cfg: BaseSAEConfig, model: LanguageModel | None) -> Callable[[Tensor], Tensor]:
        if model is None:
            raise ConfigError("initialize_tc_with_mlp=True: needs the language model; give model")
        assert self.cfg.model_layer is not None
        return model.mlp(self.cfg.model_layer, cfg.hook_points_read[0], cfg.hook_points_written[0])
