"""The settings of the commands: what a config file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, create_model, model_validator

from lm_saes.choices import Choice, OpenConfig, one_of
from lm_saes.config import BaseConfig
from lm_saes.data.factory import ActivationFactoryConfig
from lm_saes.data.factory_config import ActivationFactoryDatasetSource, ActivationFactoryTarget
from lm_saes.data.text import DatasetConfig
from lm_saes.data.writer import ActivationWriterConfig
from lm_saes.dictionaries.clt import CLTConfig
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.crosscoder import CrossCoderConfig
from lm_saes.dictionaries.lorsa_config import LorsaConfig
from lm_saes.dictionaries.molt import MOLTConfig
from lm_saes.dictionaries.sae import SAEConfig
from lm_saes.errors import ConfigError
from lm_saes.evaluation.evaluator import EvalConfig
from lm_saes.initializer import InitializerConfig
from lm_saes.models.base import LanguageModelConfig
from lm_saes.training.config import TrainerConfig
from lm_saes.training.loggers import LoggerConfig, WandbConfig


def _known_logger(name: str) -> str:
    return one_of(name, [name for name, kind in LoggerConfig.registry.items() if not kind.by_table_only])


class TrainSettings(OpenConfig):
    """What every training run has; a kind adds the settings of its dictionary as `sae`."""

    kinds: ClassVar[dict[str, type[TrainSettings]]] = {}
    tables: ClassVar[type[Choice] | None] = LoggerConfig

    sae: BaseSAEConfig
    """The dictionary."""
    sae_name: str = "sae"
    """Name of this dictionary, for people."""
    sae_series: str = ""
    """Series that it belongs to, for people."""
    initializer: InitializerConfig = Field(default_factory=InitializerConfig)
    """How it is initialised."""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """How it is trained."""
    activation_factory: ActivationFactoryConfig
    """Where its activations come from."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases (`WANDB_MODE=offline` works too)."""
    eval: EvalConfig | None = None
    """Evaluate on held-out text every `trainer.eval_frequency` steps and at the end."""
    data_parallel_size: int = Field(default=1, ge=1)
    """Processes that share the rows of each batch; the product of all such sizes is what torchrun has to start."""
    model_parallel_size: int = Field(default=1, ge=1)
    """Processes that share the latents, with their weights and moments."""
    model: LanguageModelConfig | None = None
    """The language model; not needed to train on cached activations."""
    model_name: str | None = None
    """Name of the language model, for the artefact; by default that of `model`."""
    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Texts, by the names that `activation_factory.sources` use; the held-out part of each serves the evaluation."""
    device_type: Literal["cpu", "cuda"] = "cpu"
    """Kind of device to train on."""
    seed: int = 0
    """Fixes initialisation, order of the data and shuffling."""
    resume: bool = False
    """Go on from the newest checkpoint in `trainer.exp_result_path`."""
    loggers: list[Annotated[str, AfterValidator(_known_logger)]] = Field(default=["console"])
    """Where reports go besides `metrics.jsonl` (and W&B, if `wandb` is set)."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        config = cls.model_fields["sae"].annotation
        if isinstance(config, type) and issubclass(config, BaseSAEConfig):
            TrainSettings.kinds[config.model_fields["sae_type"].default] = cls

    @property
    def chosen_loggers(self) -> list[LoggerConfig]:
        """The loggers that are named, or have a table, each with its settings."""
        tables = {name: getattr(self, name, None) for name in LoggerConfig.registry}
        wanted = [name for name, table in tables.items() if name in self.loggers or table is not None]
        return [tables[name] or LoggerConfig.find(name)() for name in wanted]

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """How many processes share each dimension of the mesh."""
        return {"data": self.data_parallel_size, "model": self.model_parallel_size}

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> TrainSettings:
        if self.activation_factory.batch_size < self.data_parallel_size:
            raise ValueError(
                f"data_parallel_size={self.data_parallel_size}: more processes than the "
                f"{self.activation_factory.batch_size} rows of activation_factory.batch_size; lower it"
            )
        if self.activation_factory.target == ActivationFactoryTarget.TOKENS:
            raise ValueError(
                "activation_factory.target='tokens': holds no activations; use activations-1d or activations-2d"
            )
        missing = set(self.sae.associated_hook_points) - set(self.activation_factory.hook_points)
        if missing:
            raise ValueError(f"activation_factory.hook_points: the dictionary also needs {sorted(missing)}; add it")
        check_sources(self.activation_factory, self.datasets)
        if self.activation_factory.dataset_sources and self.model is None:
            raise ValueError("model: missing; a source of type 'dataset' is read by a language model")
        if self.eval is not None:
            check_evaluation(self.model, self.datasets)
        return self


class TrainSAESettings(TrainSettings):
    """Train a sparse autoencoder or a transcoder."""

    sae: SAEConfig  # type: ignore[assignment]
    """The dictionary."""


class TrainCrossCoderSettings(TrainSettings):
    """Train a crosscoder."""

    sae: CrossCoderConfig  # type: ignore[assignment]
    """The dictionary."""
    head_parallel_size: int = Field(default=1, ge=1)
    """Processes that share the heads, with their weights and moments."""

    @property
    def mesh_sizes(self) -> dict[str, int]:
        return super().mesh_sizes | {"head": self.head_parallel_size}


class TrainCLTSettings(TrainSettings):
    """Train a cross-layer transcoder."""

    sae: CLTConfig  # type: ignore[assignment]
    """The dictionary."""


class TrainMOLTSettings(TrainSettings):
    """Train a mixture of linear transforms."""

    sae: MOLTConfig  # type: ignore[assignment]
    """The dictionary."""


class TrainLorsaSettings(TrainSettings):
    """Train a low-rank sparse attention; its activations keep their contexts (`activations-2d`)."""

    sae: LorsaConfig  # type: ignore[assignment]
    """The dictionary."""

    @model_validator(mode="after")
    def _check_contexts(self) -> TrainLorsaSettings:
        target = self.activation_factory.target
        if target != ActivationFactoryTarget.ACTIVATIONS_2D:
            raise ValueError(
                f"activation_factory.target={target.value!r}: attention needs contexts; use activations-2d"
            )
        size, longest = self.activation_factory.context_size, self.sae.n_ctx
        if size is not None and size > longest:
            raise ValueError(f"sae.n_ctx={longest}: below activation_factory.context_size={size}; raise it to {size}")
        return self


def train_settings_class(sae_type: Any) -> type[TrainSettings]:
    """The settings of a training run for a kind of dictionary; made on the spot for a kind that brings none."""
    config = BaseSAEConfig.kind(sae_type)
    if sae_type not in TrainSettings.kinds:
        create_model("TrainSettings", __base__=TrainSettings, sae=(config, ...))  # registers itself
    return TrainSettings.kinds[sae_type]


class GenerateActivationsSettings(BaseConfig):
    """Run a language model over text and keep its activations."""

    model: LanguageModelConfig
    """The language model."""
    datasets: dict[str, DatasetConfig]
    """Texts, by the names that `activation_factory.sources` use."""
    activation_factory: ActivationFactoryConfig
    """Which activations, in which contexts."""
    writer: ActivationWriterConfig
    """Where and how much to write."""
    seed: int = 0
    """Fixes the order of the data."""

    @model_validator(mode="after")
    def _check(self) -> GenerateActivationsSettings:
        if self.activation_factory.target == ActivationFactoryTarget.TOKENS:
            raise ValueError(
                "activation_factory.target='tokens': holds no activations; use activations-1d or activations-2d"
            )
        if missing := sorted(set(self.writer.hook_points) - set(self.activation_factory.hook_points)):
            raise ValueError(f"writer.hook_points: activation_factory.hook_points lacks {missing}; add it there")
        check_sources(self.activation_factory, self.datasets)
        return self


class EvaluateSAESettings(BaseConfig):
    """Measure a trained dictionary on held-out text. What is left out is taken from the run's own settings."""

    sae: Path
    """Directory of a run, or of a dictionary that `save_pretrained` wrote."""
    model: LanguageModelConfig | None = None
    """The language model."""
    datasets: dict[str, DatasetConfig] | None = None
    """Texts; their held-out parts are read."""
    eval: EvalConfig | None = None
    """How much to measure."""


def check_sources(factory: ActivationFactoryConfig, datasets: dict[str, DatasetConfig]) -> None:
    """Raise `ConfigError` unless every source of text is among the datasets."""
    for place, source in enumerate(factory.sources):
        if isinstance(source, ActivationFactoryDatasetSource) and source.name not in datasets:
            raise ConfigError(
                f"activation_factory.sources.{place}.name={source.name!r}: no dataset of that name; datasets has "
                f"{sorted(datasets)}"
            )


def check_evaluation(model: LanguageModelConfig | None, datasets: dict[str, DatasetConfig]) -> None:
    """Raise `ConfigError` unless there is a model and held-out text to evaluate with."""
    if model is None:
        raise ConfigError("eval: needs a language model to read held-out text; add [model], or leave [eval] out")
    if not held_out(datasets):
        raise ConfigError(
            "eval: no dataset keeps documents apart; set datasets.<name>.held_out_fraction, or leave [eval] out"
        )


def held_out(datasets: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
    """The held-out part of every dataset that has one."""
    return {
        name: cfg.model_copy(update={"part": "held_out"}) for name, cfg in datasets.items() if cfg.held_out_fraction > 0
    }
