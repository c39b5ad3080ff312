"""What every dictionary kind is: normalisation, the record of a pass, the loss, saving and loading.

A kind subclasses `AbstractSparseAutoEncoder`, names its config class and gives the mathematics of section 4 of the
specification. It never knows about processes: latents elsewhere are met through `self.axes`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lm_saes.axes.axis import Axes
from lm_saes.dictionaries.building import build_part
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.files import Stored
from lm_saes.dictionaries.forward import ForwardPass
from lm_saes.dictionaries.initializing import Initializing
from lm_saes.dictionaries.loss_result import LossResult
from lm_saes.dictionaries.weight_files import read_k, read_provenance
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.latents.record import Record
from lm_saes.losses.dead_latents import DeadList
from lm_saes.losses.objective import objective
from lm_saes.losses.settings import LossSettings
from lm_saes.losses.sparsity import bound_loss

logger = logging.getLogger(__name__)


class AbstractSparseAutoEncoder(Initializing, ForwardPass, Stored):
    """A dictionary of sparse latents for a language model's activations.

    Activations come as a batch: a mapping from hook point to `[batch, d]` or `[batch, seq, d]`, with `tokens` and an
    optional `mask`. `forward`, `encode`, `decode` and `compute_loss` take normalised activations (see
    `normalize_activations`); `reconstruct` takes and gives raw ones.
    """

    kinds: ClassVar[dict[str, type[AbstractSparseAutoEncoder]]] = {}
    config_class: ClassVar[type[BaseSAEConfig]]
    reads_uniform_bounds: ClassVar[bool] = True
    """Whether fresh weights are drawn within the initialiser's bounds, rather than by a rule of the kind's own."""
    has_encoder_norm: ClassVar[bool] = True
    """Whether each latent has an encoder direction, whose norm can be measured and set."""
    averages_sites: ClassVar[bool] = False
    """Whether several sites of one latent (a crosscoder's heads) are averaged over, not added up, in L0."""
    latent_dimensions: ClassVar[tuple[str, ...]] = ("sae",)
    """Names of the dimensions of dense latents after those of tokens."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in vars(cls):
            AbstractSparseAutoEncoder.kinds[cls.config_class.model_fields["sae_type"].default] = cls

    def __init__(self, cfg: BaseSAEConfig) -> None:
        super().__init__()
        self.cfg = cfg.model_copy()
        self.axes = Axes()
        self.build_selection()

    # -- norms, cuts -----------------------------------------------------------------------------------------------

    @abstractmethod
    def encoder_norm(self, keepdim: bool = False) -> Tensor:
        """Norm of each latent's encoder direction, `[F]`."""

    @abstractmethod
    def decoder_bias_norm(self) -> Tensor:
        """Norm of the decoder bias (0-d; 0 without a bias)."""

    @abstractmethod
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        """Bring decoder norms to `value`: all of them, or only those above it."""

    @abstractmethod
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        """Bring encoder norms to `value`."""

    @abstractmethod
    def transform_to_unit_decoder_norm(self) -> None:
        """Bring decoder norms to 1 without changing what the dictionary computes."""

    def draw_uniform(self, weights_FX: Tensor, bound: float) -> None:
        """Draw weights, latents first, uniformly within plus and minus `bound`."""
        self.axes.latents.draw(weights_FX, lambda block: block.uniform_(-bound, bound), self.latent_runs)

    # -- losses ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def pre_activation_loss(self, record: Record) -> Tensor:
        """The pre-activation penalty `l_p` (JumpReLU only), without its coefficient."""

    @abstractmethod
    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        """AuxK over the `dead` latents (one list, or one for each layer), without its coefficient."""

    def compute_loss(
        self,
        batch: Mapping[str, Any],
        *,
        sparsity_loss_type: str | None = None,
        tanh_stretch_coefficient: float = 4.0,
        frequency_scale: float = 0.01,
        p: float = 1,
        l1_coefficient: float = 1.0,
        lp_coefficient: float = 0.0,
        auxk_coefficient: float = 0.0,
        k_aux: int = 512,
        update_dead_statistics: Callable[[Tensor, Tensor | None, tuple[str, ...]], Tensor] | None = None,
        return_aux_data: bool = True,
        is_dead: Tensor | None = None,
    ) -> Tensor | LossResult:
        """The loss of a normalised batch: the sum of `l_rec`, `l_s`, `l_p` and `l_aux`, each times its coefficient.

        Args:
            update_dead_statistics: called with the dense latents, the mask and the names of their dimensions; says
                which latents are dead (for AuxK), unless `is_dead` is given.
            return_aux_data: True: a mapping with the terms and what they were made from; False: the loss alone.
            is_dead: bool `[F]`, the latents that AuxK revives.
        """
        shape = {"tanh_stretch_coefficient": tanh_stretch_coefficient, "frequency_scale": frequency_scale, "p": p}
        sparsity_loss = bound_loss(sparsity_loss_type, shape)
        settings = LossSettings(sparsity_loss, l1_coefficient, lp_coefficient, auxk_coefficient, k_aux)
        record = self.make_record(batch)
        result = LossResult(record, settings, batch.get("mask"), {
            "label": lambda: self.prepare_label(batch),
            "reconstructed": lambda: record.reconstruction.view(self.prepare_label(batch).shape),
            "feature_acts": lambda: self.latents_of(record.code.dense(), self.prepare_label(batch)),
            "hidden_pre": lambda: self.hidden_pre(self.prepare_input(batch)),
        })  # fmt: skip
        if update_dead_statistics is not None:
            with torch.no_grad():
                tokens = ("batch", "context")[: batch["tokens"].ndim]
                specs = (*tokens, *self.latent_dimensions)
                updated = update_dead_statistics(result["feature_acts"].detach(), batch.get("mask"), specs)
            is_dead = updated if is_dead is None else is_dead
        result.terms.update(objective(self, record, settings, is_dead))
        return result if return_aux_data else result["loss"]

    @property
    def n_latents(self) -> int:
        """How many latents (of a site) there are here: all, or this process's part."""
        return self.cfg.d_sae // self.axes.latents.size

    @property
    def dead_shape(self) -> tuple[int, ...]:
        """Shape of what is counted per latent: firing, and tokens since the last activation."""
        return (self.n_latents,)

    def latent_counts(self, record: Record) -> Tensor:
        """On how many valid tokens of a record each latent is active, shaped `dead_shape`."""
        return record.counts.view(self.dead_shape)

    def latent_entries(self, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Token, latent (its place in `dead_shape`, flattened) and value of every active latent, in order of tokens."""
        return record.code.entries()

    # -- parameters, saving, loading -------------------------------------------------------------------------------

    def get_parameters(self) -> list[dict[str, Any]]:
        """Parameter groups: `"others"` and, if there are learnt thresholds, `"jumprelu"`."""
        named = dict(self.named_parameters())
        thresholds = [p for name, p in named.items() if name.endswith("log_jumprelu_threshold")]
        others = [p for name, p in named.items() if not name.endswith("log_jumprelu_threshold")]
        groups = [{"params": others, "name": "others"}]
        return [*groups, {"params": thresholds, "name": "jumprelu"}] if thresholds else groups

    @classmethod
    def kind_of(cls, cfg: BaseSAEConfig) -> type[AbstractSparseAutoEncoder]:
        """The class of a config's kind."""
        cfg.kind(cfg.sae_type)  # imports the module that it is in
        return cls.kinds[cfg.sae_type]

    @classmethod
    def from_config(cls, cfg: BaseSAEConfig, device_mesh: Any = None) -> Self:
        """A dictionary of the config's kind, weights not yet drawn.

        Args:
            device_mesh: a DeviceMesh with some of the dimensions `"data"`, `"model"` and (a crosscoder's) `"head"`:
                the dictionary is this process's part of one.
        """
        kind = cls.kind_of(cfg)
        if not issubclass(kind, cls):
            raise ConfigError(f"sae_type={cfg.sae_type!r} is not a {cls.__name__}; use AbstractSparseAutoEncoder")
        if device_mesh is None:
            return kind(cfg).to(cfg.device)
        from lm_saes.parallel.mesh import axes_of  # only who has a mesh needs torch's distributed modules

        return build_part(kind, cfg, axes_of(device_mesh))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device_mesh: Any = None,
        fold_activation_scale: bool = True,
        strict_loading: bool = True,
        **overrides: Any,
    ) -> Self:
        """Load a dictionary from a directory, for use: in evaluation mode, dataset-wise factors folded in.

        Args:
            fold_activation_scale: False keeps the dictionary as it was trained.
            strict_loading: whether missing and unexpected tensors are errors.
            overrides: config fields to change (`device="cuda"`). Unless `top_k` is one, k is what it was when saved.

        Raises:
            CheckpointError: files are missing or do not fit together.
        """
        dictionary = cls.from_config(BaseSAEConfig.from_pretrained(path, **overrides), device_mesh)
        weights = dictionary.read_weights(path)
        try:
            dictionary.load_full_state_dict(weights, strict=strict_loading)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        dictionary.provenance = read_provenance(path)
        if dictionary.current_k is not None and "top_k" not in overrides:
            dictionary.set_current_k(read_k(path) or dictionary.current_k)
        if fold_activation_scale:
            if dictionary.cfg.norm_activation == "dataset-wise":
                dictionary.standardize_parameters_of_dataset_norm()
            elif dictionary.cfg.norm_activation != "inference":
                logger.info(
                    "norm_activation=%r cannot be folded; activations are scaled at use", dictionary.cfg.norm_activation
                )
        return dictionary.eval()

    @classmethod
    def from_local(cls, path: str | Path, **options: Any) -> Self:
        """The same as `from_pretrained`, for a local directory."""
        return cls.from_pretrained(path, **options)
