"""Whether what a run has saved is still as it was."""

from __future__ import annotations

from pathlib import Path

from lm_saes.errors import CheckpointError
from lm_saes.storage.manifest import MANIFEST, listed, problems
from lm_saes.training.checkpoint import PROGRESS, all_steps


def verify(directory: str | Path) -> tuple[list[str], int, int]:
    """Check a run's directory with all its checkpoints, one checkpoint, or a saved dictionary.

    Returns:
        A line for every file that is wrong; how many files and how many directories were looked at.

    Raises:
        CheckpointError: nothing there has a manifest.
    """
    directory = Path(directory)
    steps = list(all_steps(directory).values())
    parts = [directory, *steps] if (directory / MANIFEST).exists() or (directory / PROGRESS).exists() else steps
    if not parts:
        raise CheckpointError(
            f"{directory}: has neither {MANIFEST} nor checkpoints; give a run's, a checkpoint's or a dictionary's "
            "directory, saved by this version or later"
        )
    found = {part: problems(part, whole=part in steps or (part / PROGRESS).exists()) for part in parts}
    wrong = [f"{part / what}" for part, lines in found.items() for what in lines]
    return wrong, sum(len(listed(part)) for part in parts if not found[part]), len(parts)
