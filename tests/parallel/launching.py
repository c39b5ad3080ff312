"""Starts `lm_saes train` as people do: by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Launch:
    """`n` processes of one torchrun, all of whose output goes to a file; with a port, a node of two that meet there."""

    def __init__(
        self, n: int, arguments: list[str], log: Path, *, restarts: int = 0, command: list[str] | None = None,
        port: int | None = None,
    ) -> None:  # fmt: skip
        self._log = log
        meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "run"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--max-restarts"]
        command = command or ["-m", "lm_saes", "train"]
        with log.open("wb") as output:
            self._torchrun = subprocess.Popen(
                [*torchrun, str(restarts), *([] if port is None else meet), *command, *arguments],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
            )  # fmt: skip

    def wait(self, seconds: float = 120) -> int:
        """The exit code of torchrun."""
        return self._torchrun.wait(seconds)

    def signal(self, number: int, process: int) -> None:
        """Send a signal to one of the processes."""
        children = Path(f"/proc/{self._torchrun.pid}/task/{self._torchrun.pid}/children").read_text().split()
        os.kill(sorted(map(int, children))[process], number)

    def wait_for(self, run: Path, rows: int) -> None:
        """Wait until a run has made so many reports."""
        metrics, until = run / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
            if self._torchrun.poll() is not None or time.monotonic() > until:
                raise AssertionError(self.output())
            time.sleep(0.01)

    def output(self) -> str:
        """What torchrun and the processes have printed."""
        return self._log.read_text(errors="replace")

    def told(self) -> list[str]:
        """What lm-saes has printed, but for what it tells of its progress."""
        lines = self.output().splitlines()
        return [line for line in lines if line.startswith("lm-saes: ") and "checkpoints: " not in line]
