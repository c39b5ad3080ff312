"""The settings that every dictionary kind shares; a kind adds its own fields and its `sae_type`."""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from lm_saes.config import LENIENT, BaseConfig, DType, describe
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.latents.activations import ActivationFunction
from lm_saes.latents.activations.base import SelectionSettings
from lm_saes.storage.files import write_json
from lm_saes.storage.manifest import check_file

ALL_ACTIVATIONS = frozenset({"relu", "topk", "batchtopk", "jumprelu", "layertopk", "batchlayertopk"})
NormActivation = Literal["token-wise", "batch-wise", "dataset-wise", "inference"]


class BaseSAEConfig(BaseConfig):
    """Settings common to every dictionary kind. Building one touches no disk."""

    registry: ClassVar[dict[str, type[BaseSAEConfig]]] = {}
    activation_functions: ClassVar[frozenset[str]] = frozenset({"relu", "topk", "batchtopk", "jumprelu"})
    """The built-in activation functions that this kind admits (others may be registered)."""
    restricted_activations: ClassVar[frozenset[str]] = frozenset({"layertopk", "batchlayertopk"})

    sae_type: str
    """Kind of dictionary: `sae`, `clt`, `molt`, `lorsa` or `crosscoder`."""
    d_model: int = Field(gt=0)
    """Width of the activations that the dictionary reads and writes."""
    expansion_factor: float = Field(gt=0)
    """Number of latents per dimension: `d_sae = int(d_model * expansion_factor)`."""
    use_decoder_bias: bool = True
    """Whether the decoder adds a learnt bias."""
    act_fn: str = "relu"
    """Activation function: `relu`, `jumprelu`, `topk`, `batchtopk` (CLT, crosscoder: `layertopk batchlayertopk`)."""
    norm_activation: NormActivation = "dataset-wise"
    """How activations are brought to an average norm of sqrt(d_model): per token, per batch, by one measured factor, or
    (`inference`) not at all."""
    sparsity_include_decoder_norm: bool = True
    """Gating: select latents, and weigh them in sparsity losses, by activation times decoder norm."""
    top_k: int = Field(default=50, gt=0)
    """Active latents per token for the top-k family (on average, for the batch-wide ones)."""
    jumprelu_threshold_window: float = Field(default=2.0, gt=0)
    """Width of the window around a JumpReLU threshold in which entries move it."""
    use_triton_kernel: bool = False
    """Kept for old configs; the sparse path is chosen automatically."""
    sparsity_threshold_for_triton_spmm_kernel: float = 0.996
    """Kept for old configs; the sparse path is chosen automatically."""
    device: str = Field(default="cpu", exclude=True)
    """Where the parameters are made (not saved)."""
    dtype: DType = torch.float32
    """Type of the parameters; thresholds are always float32."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        kind = cls.model_fields["sae_type"].default
        if isinstance(kind, str):
            BaseSAEConfig.registry[kind] = cls

    @model_validator(mode="after")
    def _check_activation(self, info: ValidationInfo) -> BaseSAEConfig:
        function = ActivationFunction.registry.get(self.act_fn)
        if function is None or (self.act_fn in self.restricted_activations - self.activation_functions):
            allowed = sorted(
                set(ActivationFunction.registry) - (self.restricted_activations - self.activation_functions)
            )
            raise ValueError(
                f"act_fn={self.act_fn!r} is not an activation function here; use one of {', '.join(allowed)}"
            )
        every = frozenset().union(*(f.config_fields for f in ActivationFunction.registry.values()))
        self.refuse_without_effect(
            sorted(every - function.config_fields), f"act_fn={self.act_fn!r} does not read it", info
        )
        old = ("use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel")
        self.warn_without_effect(old, "the sparse path is chosen automatically")
        if self.d_sae < 1:
            raise ValueError(
                f"expansion_factor={self.expansion_factor}: gives no latents at d_model={self.d_model}; raise it"
            )
        if "top_k" in function.config_fields and self.top_k > self.largest_k:
            raise ValueError(
                f"act_fn={self.act_fn!r}: top_k={self.top_k} exceeds the {self.largest_k} latents available"
            )
        return self

    @property
    def widths(self) -> dict[str, int]:
        """How wide the activations of each hook point must be."""
        return dict.fromkeys(self.associated_hook_points, self.d_model)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.d_model * self.expansion_factor)

    @property
    def largest_k(self) -> int:
        """How many latents the top-k family picks from on a token: those of one site, or of all if they compete."""
        joins_sites = ActivationFunction.registry[self.act_fn].joins_sites
        return self.d_sae * (len(self.hook_points_written) if joins_sites else 1)

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        """Shape of JumpReLU's thresholds."""
        return (self.d_sae,)

    @property
    def n_selection_pools(self) -> int:
        """Pools of entries that batch-wide selection picks from, each for itself."""
        return 1

    @property
    def selection_settings(self) -> SelectionSettings:
        """What the activation function reads."""
        return SelectionSettings(
            self.top_k, self.jumprelu_threshold_window, self.threshold_shape, self.n_selection_pools
        )

    @property
    @abstractmethod
    def hook_points_read(self) -> list[str]:
        """The hook points that inputs come from, in order."""

    @property
    @abstractmethod
    def hook_points_written(self) -> list[str]:
        """The hook points that are reconstructed, in order."""

    @property
    def associated_hook_points(self) -> list[str]:
        """Every hook point that the dictionary reads or writes, without repetition."""
        return list(dict.fromkeys([*self.hook_points_read, *self.hook_points_written]))

    def save_hyperparameters(self, directory: str | Path) -> None:
        """Write `config.json` into `directory`."""
        write_json(Path(directory, "config.json"), self.to_json())

    @classmethod
    def kind(cls, sae_type: Any) -> type[BaseSAEConfig]:
        """The config class of a kind; raises `ConfigError` with the known kinds."""
        import lm_saes.dictionaries as kinds

        for module in pkgutil.iter_modules(kinds.__path__):
            importlib.import_module(f"{kinds.__name__}.{module.name}")
        if sae_type not in cls.registry:
            raise ConfigError(
                f"sae.sae_type={sae_type!r}: not a dictionary kind; use one of {', '.join(sorted(cls.registry))}"
            )
        return cls.registry[sae_type]

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> BaseSAEConfig:
        """Read `config.json` from a directory; the subclass follows from `sae_type`.

        Raises:
            CheckpointError: there is no readable `config.json`, or it is not the one of the manifest.
            ConfigError: what it says, or an override, is not a config.
        """
        check_file(path, "config.json")
        return cls.read(path, **overrides)

    @classmethod
    def read(cls, path: str | Path, **overrides: Any) -> BaseSAEConfig:
        """The same as `from_pretrained`, but no manifest is asked: for a directory that has just been verified."""
        file = Path(path, "config.json")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{file}: cannot be read as a dictionary's config ({reason}); give the directory of a run or of a "
                "saved dictionary"
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{file}: holds no table of settings; is it a dictionary's config?")
        data |= overrides
        if data.get("sae_type") is None:
            raise ConfigError(f"{file}: sae_type=None: is not a dictionary's config; give the directory of one")
        try:
            return cls.kind(data.get("sae_type")).model_validate(data, context=LENIENT)
        except ValidationError as error:
            raise ConfigError(f"{file}: {describe(error, data)}") from error
