"""A pool of worker processes that form a world, and stay for all cases of a session."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from .work import Case

ROOT = Path(__file__).parents[2]


class Pool:
    """`size` processes joined by gloo."""

    def __init__(self, size: int, place: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._place, self._count = place, 0
        self._logs = [(place / f"rank{rank}.log").open("w+") for rank in range(size)]
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.worker"],
                cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            )
            for rank, log in enumerate(self._logs)
        ]  # fmt: skip

    def train(self, case: Case, mesh: tuple[int, ...], **options: Any) -> dict[str, Tensor]:
        """What `work.train` gives on a mesh of `data x model` (`x head`) processes."""
        return self.run("train", case, mesh, **options)

    def run(self, action: str, case: Case, mesh: tuple[int, ...], **options: Any) -> dict[str, Tensor]:
        """What one of `worker.ACTIONS` gives on a mesh of `data x model` (`x head`); `options` are JSON values."""
        self._count += 1
        out = self._place / f"{self._count}.safetensors"
        order = json.dumps({"action": action, "case": asdict(case), "mesh": mesh, "out": str(out), "options": options})
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(order + "\n")
            worker.stdin.flush()
        answers = [json.loads(worker.stdout.readline() or '"ended"') for worker in self._workers]  # type: ignore[union-attr]
        if set(answers) != {"done"}:
            self.__exit__(None, None, None)
            raise RuntimeError("\n".join(f"rank {rank}: {answer}" for rank, answer in enumerate(answers)))
        return load_file(out)

    @property
    def alive(self) -> bool:
        """Whether all processes are still there: an error in one ends them all."""
        return all(worker.poll() is None for worker in self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()  # also closes its pipes
        for log in self._logs:
            log.close()
