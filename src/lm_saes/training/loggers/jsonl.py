"""`metrics.jsonl`: one JSON object a report, with every metric."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from lm_saes.errors import DataError
from lm_saes.storage.files import write_text

_log = logging.getLogger(__name__)


class JsonlLogger:
    """Writes `{"step", "time", <metric>: number, ...}`, one line a report; NaN and infinities become null.

    `time` is in seconds since 1970. A resumed run goes on in its file after the step that it resumes from: lines of
    later steps, which it will write again, and a last line torn by a crash are dropped. A new run starts a new file.
    A disk that is full does not end the run: the lines wait in memory, and are tried again with the next report.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._waiting = b""
        self._failed = False

    def start(self, total_steps: int, step: int) -> None:
        kept = _lines_up_to(step, self.path) if step > 0 and self.path.exists() else []
        write_text(self.path, "".join(kept))
        self._file = self.path.open("ab", buffering=0)

    def advance(self, step: int) -> None:
        """Nothing: only reports are written."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            raise RuntimeError("JsonlLogger.report was called before start")
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **numbers}, allow_nan=False)
        self._waiting += f"{line}\n".encode()
        self._write(self._file)

    def close(self, summary: Mapping[str, float]) -> None:
        if self._file is not None:
            self._write(self._file)
            if self._waiting:
                _log.error("%s: %d reports could not be written", self.path, self._waiting.count(b"\n"))
            self._file.close()
            self._file = None

    def _write(self, file: BinaryIO) -> None:
        """Write what is waiting; what does not fit stays."""
        try:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not self._failed:
                _log.error("%s: cannot be written (%s); reports wait until it can", self.path, error)
            self._failed = True
        else:
            self._failed = False


def _lines_up_to(step: int, path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} line {number}: not a report of a run, so it cannot be continued; move the file away"
            ) from error
    return kept
