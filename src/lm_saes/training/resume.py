"""Going on with a run: what may differ from its checkpoint, and what a new run must not overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lm_saes.axes.differences import differences
from lm_saes.config import LENIENT, describe
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.files import SHARDS, WEIGHTS
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.training import checkpoint
from lm_saes.training.config import TrainerConfig
from lm_saes.training.run import Run

MAY_CHANGE = frozenset({
    "total_training_tokens", "log_frequency", "eval_frequency", "feature_sampling_window", "n_checkpoints",
    "check_point_save_mode", "save_every_minutes", "keep_last", "from_pretrained_path", "exp_result_path",
    "on_non_finite",
})  # fmt: skip
"""The trainer's settings that a resumed run may change: its length, its logging, its saving, its faults."""
_NO_EFFECT = frozenset({
    "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "decode_with_csr", "sparsity_threshold_for_csr",
})  # fmt: skip


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from."""

    run: Run
    progress: Mapping[str, Any]
    stream_state: dict[str, Any] | None
    wandb_run_id: str | None


def load(cfg: TrainerConfig, sae: AbstractSparseAutoEncoder, directory: Path) -> Resumed:
    """Put dictionary, optimizer, statistics and random generator back to a checkpoint.

    Args:
        directory: what `find_checkpoint` found: its files have been compared with the manifest and are not hashed here.

    Raises:
        CheckpointError: it is of a run with other settings, or does not hold what a checkpoint holds.
    """
    refuse_changes(directory, sae.cfg, cfg)
    progress = checkpoint.read_json(directory / checkpoint.PROGRESS, "batch_tokens", "cur_step", "cur_tokens")
    run = Run.begin(cfg, sae, progress["batch_tokens"])
    checkpoint.read_tensors(directory, sae, run.board, run.optimizer)
    return Resumed(run, progress, checkpoint.read_stream(directory), checkpoint.read_run_id(directory))


def saved_config(directory: Path) -> TrainerConfig:
    """The trainer's settings that a checkpoint was made with."""
    file = directory / checkpoint.PROGRESS
    data = checkpoint.read_json(file, "cfg")["cfg"]
    try:
        return TrainerConfig.model_validate(data, context=LENIENT)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {describe(error, data)}") from error


def refuse_changes(directory: Path, sae: BaseSAEConfig, trainer: TrainerConfig) -> None:
    """Raise `CheckpointError`, with every field, if settings differ that a resumed run may not change.

    `directory` is what `find_checkpoint` found: its files are not hashed here.
    """
    trained = BaseSAEConfig.read(directory)
    if trained.sae_type == sae.sae_type and trained.norm_activation != sae.norm_activation == "inference":
        raise CheckpointError(
            f"{directory}: the dictionary has norm_activation='inference' but was trained with "
            f"{trained.norm_activation!r}; load it with from_pretrained(..., fold_activation_scale=False)"
        )
    found = [
        *_changed("sae", trained, sae, _NO_EFFECT),
        *_changed("trainer", saved_config(directory), trainer, MAY_CHANGE),
    ]
    if found:
        raise CheckpointError(
            f"{directory}: made with other settings ({'; '.join(found)}); set them back, or start a new run with "
            "another exp_result_path"
        )


def _changed(prefix: str, theirs: BaseSAEConfig | TrainerConfig, ours: Any, free: Iterable[str]) -> list[str]:
    before, now = ({k: v for k, v in cfg.to_json().items() if k not in free} for cfg in (theirs, ours))
    return list(differences(before, now, prefix))


def refuse_older_run(path: str | Path, source: Path | None = None) -> None:
    """Raise `ConfigError` if a directory holds a run already, other than the one of the checkpoint `source`."""
    if source is not None and source.resolve().parents[1] == Path(path).resolve():
        return
    if checkpoint.all_steps(path) or Path(path, WEIGHTS).exists() or Path(path, SHARDS).exists():
        raise ConfigError(
            f"trainer.exp_result_path={str(path)!r}: holds a run already; resume it, remove it, or name another"
        )
