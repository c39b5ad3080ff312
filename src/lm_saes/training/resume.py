"""Going on with a run: what may differ from its checkpoint, and what a new run must not overwrite."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lm_saes.axes.axis import ALONE, Axis
from lm_saes.axes.differences import differences
from lm_saes.axes.together import by_first
from lm_saes.config import LENIENT, describe
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.weight_files import SHARDS, WEIGHTS
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.training import checkpoint
from lm_saes.training.config import TrainerConfig
from lm_saes.training.run import Run

log = logging.getLogger(__name__)

MAY_CHANGE = frozenset({
    "total_training_tokens", "log_frequency", "eval_frequency", "feature_sampling_window", "n_checkpoints",
    "check_point_save_mode", "save_every_minutes", "keep_last", "from_pretrained_path", "exp_result_path",
    "on_non_finite",
})  # fmt: skip
"""The trainer's settings that a resumed run may change: its length, its logging, its saving, its faults."""
_NO_EFFECT = frozenset({
    "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "decode_with_csr", "sparsity_threshold_for_csr",
})  # fmt: skip


def where_to_begin(
    trainer: TrainerConfig,
    sae: BaseSAEConfig,
    everyone: Axis = ALONE,
    *,
    resume: bool = False,
    again: bool = False,
    found: Path | None = None,
) -> Path | None:
    """The checkpoint that a run goes on from; None: a new run begins, at step 0.

    This alone decides it, for commands and for trainers: a run that is resumed goes on from its newest whole
    checkpoint; one that was killed before its first begins again; any other begins where `from_pretrained_path` says,
    and never in a directory that holds another run.

    Args:
        everyone: the processes of the run, which come to the same answer.
        resume: whether the run in `exp_result_path` is to be gone on with.
        again: whether its processes were started again after a failure: where it was begun from is behind then.
        found: a checkpoint that has been found, and compared with its manifest, already.

    Raises:
        ConfigError: the directory holds another run.
        CheckpointError: no whole checkpoint is there, or it was made with other settings.
    """
    run = Path(trainer.exp_result_path)
    where = str(found) if found is not None else by_first(everyone, lambda: _place(trainer, run, resume, again))
    if where is None:
        by_first(everyone, lambda: refuse_older_run(run))
        return None
    start = found or checkpoint.find_checkpoint(where, everyone)

    def refuse() -> None:
        refuse_older_run(run, start)
        refuse_changes(start, sae, trainer)

    by_first(everyone, refuse)
    return start


def _place(trainer: TrainerConfig, run: Path, resume: bool, again: bool) -> str | None:
    """Where to look for a checkpoint: a step's directory or a run's; None: nowhere."""
    given = trainer.from_pretrained_path
    if not (resume or again):
        return given
    checkpoint.put_back(run)
    if again and checkpoint.all_steps(run):
        return str(run)
    if given is None and (run / "settings.json").exists() and not checkpoint.all_steps(run):
        log.warning("%s: was stopped before its first checkpoint; it starts at step 0", run)
        return None
    return str(run) if given is None else given


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
