"""When a run is saved, and how much room that takes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lm_saes.training import checkpoint
from lm_saes.training.config import TrainerConfig
from lm_saes.training.run import Run

log = logging.getLogger(__name__)


class Timetable:
    """When to save: after the steps of the plan, and every `save_every_minutes`."""

    def __init__(self, cfg: TrainerConfig, run: Run) -> None:
        self._minutes, self._scheduled = cfg.save_every_minutes, run.plan.checkpoints
        self.since = run.board.restart_clock()
        """When a save was last made or tried, in seconds of `perf_counter`."""

    def scheduled(self, step: int) -> bool:
        """Whether the plan has this step saved."""
        return step in self._scheduled

    def overdue(self) -> bool:
        """Whether the clock has a step saved now."""
        return self._minutes is not None and time.perf_counter() - self.since > 60 * self._minutes


def announce(cfg: TrainerConfig, run: Run, step: int, position: Callable[[], dict[str, Any] | None]) -> None:
    """Log how much room the checkpoints that are still to come will take, and warn if the disk has less."""
    scheduled = len([at for at in run.plan.checkpoints if at > step]) + bool(cfg.n_checkpoints)
    timed = cfg.save_every_minutes is not None
    if not scheduled and not timed:
        return
    each = checkpoint_bytes(run, position())
    count = scheduled + (cfg.keep_last or 0 if timed else 0)
    rest = f", and one every {cfg.save_every_minutes:g} minutes" if timed and cfg.keep_last is None else ""
    free = shutil.disk_usage(_nearest(Path(cfg.exp_result_path, "checkpoints"))).free
    told = f"checkpoints: {count} of {_size(each)}, {_size(count * each)} in all{rest}; {_size(free)} free"
    log.info("%s", told)
    if count * each > free:
        log.warning("%s: too little; free some, lower n_checkpoints or keep_last, or use another disk", told)


def checkpoint_bytes(run: Run, stream_state: dict[str, Any] | None) -> int:
    """About what one checkpoint takes: weights, two moments each, statistics, and the shuffle buffer if it is saved."""
    weights = _bytes(run.dictionary.full_state_dict().values())
    moments = 2 * _bytes(run.dictionary.parameters())
    here = weights + moments + _bytes(tensor for _, tensor in run.board.tensors())
    stream = _bytes(checkpoint.split_tensors(stream_state)[1].values()) if stream_state else 0
    axes = run.dictionary.axes
    return axes.sites.size * axes.latents.size * here + stream


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def _nearest(path: Path) -> Path:
    return path if path.exists() else _nearest(path.parent)


def _size(n: int) -> str:
    size, units = float(n), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"
