"""A run directory as the report reads it: whatever files are there, as plain values."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_saes.errors import DataError


@dataclass(frozen=True)
class SavedRun:
    """The files of a finished or running training run; a file that is absent is empty here."""

    path: Path
    rows: list[dict[str, Any]]
    """The training reports by step; a step that was reported twice (a resumed run) counts as last reported."""
    evaluation: dict[str, float | None]
    frequency: list[float]
    """Of each latent, the fraction of held-out tokens on which it is active."""
    latents: list[dict[str, Any]]
    config: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> SavedRun:
        """Read a run directory.

        Raises:
            DataError: `metrics.jsonl` is absent, or a file is not what it should be.
        """
        latents = _read_json(path / "latents.json")
        return cls(
            path=path,
            rows=_read_rows(path / "metrics.jsonl"),
            evaluation=_read_json(path / "evaluation.json"),
            frequency=latents.get("frequency", []),
            latents=latents.get("latents", []),
            config=_read_json(path / "config.json"),
            settings=_read_json(path / "settings.json"),
            provenance=_read_json(path / "provenance.json"),
        )

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which `name` was reported as a finite number, and the numbers."""
        points = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, name: str) -> float | None:
        """The last finite value of a training metric."""
        return next((row[name] for row in reversed(self.rows) if _is_number(row.get(name))), None)

    def evaluated(self, name: str) -> float | None:
        """A held-out metric."""
        value = self.evaluation.get(name)
        return value if _is_number(value) else None

    @property
    def dictionary(self) -> dict[str, Any]:
        """The dictionary's config, from `config.json` or else from the settings."""
        return self.config or self.settings.get("sae") or {}

    @property
    def n_latents(self) -> int | None:
        """The width of the dictionary, where a file tells it."""
        if self.frequency:
            return len(self.frequency)
        d_model, factor = self.dictionary.get("d_model"), self.dictionary.get("expansion_factor")
        return int(d_model * factor) if d_model and factor else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"report: {path} is not JSON ({error}); restore it or remove it") from error
    if not isinstance(content, dict):
        raise DataError(f"report: {path} holds a {type(content).__name__}, not an object; restore it or remove it")
    return content


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows by step. A last line without its end was cut off by a kill, and is left out."""
    if not path.exists():
        raise DataError(f"report: {path} does not exist; give the directory of a run (trainer.exp_result_path)")
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise DataError(f"report: {path} is not UTF-8 text ({error.reason}); restore it") from error
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows[row["step"]] = row
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"report: {path}, line {number} is not a training report ({error}); remove the line"
            ) from error
    return [rows[step] for step in sorted(rows)]
