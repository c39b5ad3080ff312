"""What torchrun tells the processes that it starts, and what it is told of them.

Each process has its place in the environment. When one ends with an error, torchrun ends the others, shows the error
that the first had noted in its error file, and starts all again if it was asked to (`--max-restarts`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from lm_saes.axes.axis import ALONE, Axis
from lm_saes.errors import ConfigError, LMSaesError, LostProcessError, OtherProcessError
from lm_saes.parallel.axis import SharedAxis, answers

TIMEOUT = timedelta(minutes=10)
"""After so long without an answer a process takes the others for dead. Those that end are noticed at once."""


def n_started() -> int:
    """How many processes have been started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def n_on_this_node() -> int:
    """How many of them run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Axis]:
    """Within this, the processes that were started together form a group, given as an axis.

    A bug's traceback is noted for torchrun, which shows that of the process that failed first. What people are told in
    one line is not: it is told already, and where another process has failed it is not the cause.
    """
    ours = n_started() > 1 and not dist.is_initialized()
    try:
        if ours:
            join()
        yield SharedAxis(dist.group.WORLD) if n_started() > 1 and dist.group.WORLD is not None else ALONE
    except LMSaesError:
        raise
    except Exception as error:
        get_error_handler().record_exception(error)
        raise
    if ours:
        dist.destroy_process_group()


def join() -> None:
    """Make the group of all processes: of gloo for tensors on CPUs and, where there is CUDA, nccl for those there."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with answers():
        store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
        fresh = PrefixStore(_attempt(store, rank, world_size), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world_size, timeout=TIMEOUT)


def _attempt(store: Store, rank: int, world_size: int) -> str:
    """A name, new and the same for all processes, of this start of theirs.

    torchrun's store outlives a restart, with the addresses of the processes that died, and its count of restarts is
    each node's own. So every process makes itself known by a new word, and the first answers it under that word.
    """
    word = uuid4().hex
    if rank > 0:
        store.set(f"lm-saes/here/{rank}", word)
        attempt = store.get(f"lm-saes/answer/{word}").decode()
        store.set(f"lm-saes/heard/{attempt}/{rank}", "")
        return attempt
    missing, until = set(range(1, world_size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"lm-saes/heard/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"lm-saes/here/{other}"]):
                store.set(f"lm-saes/answer/{store.get(f'lm-saes/here/{other}').decode()}", word)
        if time.monotonic() > until:
            raise LostProcessError(f"processes {sorted(missing)} have not started within {TIMEOUT}")
        time.sleep(0.01)
    return word


def leave(code: int) -> NoReturn:
    """End this process at once, all being said and written.

    Python's own way out takes the interpreter down while threads of the process group may still have tensors to drop,
    which needs the interpreter; once in a few dozen runs that aborts a process which has done everything.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speaks_first(error: Exception) -> bool:
    """Whether this process is the one to tell people why the run ends: the first that asks."""
    if not dist.is_initialized() or dist.group.WORLD is None:
        return True
    if isinstance(error, OtherProcessError) and not isinstance(error, LostProcessError):
        return False
    try:
        return dist.group.WORLD.get_group_store().add("lm-saes/told", 1) == 1
    except dist.DistError:  # the store is gone, with whoever told before
        return True


def alone(command: str) -> None:
    """Raise `ConfigError` where several processes run a command that is for one."""
    if n_started() > 1:
        raise ConfigError(f"{command}: runs in one process, but {n_started()} were started; start it without torchrun")


def note_begun(run: Path) -> None:
    """Note, for restarts by the torchrun of this node, that it has begun a run."""
    if (note := _note()) is not None:
        note.write_text(str(run.resolve()), encoding="utf-8")


def was_begun(run: Path) -> bool:
    """Whether the torchrun of this node has begun the run before: it has then started the processes again.

    That it has merely started them again says less: it also does so after what was refused, such as a new run in the
    directory of an older one.
    """
    note = _note()
    return note is not None and note.exists() and note.read_text(encoding="utf-8") == str(run.resolve())


def _note() -> Path | None:
    """A file in the folder that torchrun keeps for all its attempts, whose error files are `attempt_N/RANK/...`."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return None if file is None else Path(file).parents[2] / "lm-saes-run"
