"""A run that was killed (SIGKILL) three times, at least once in a save, ends as one that nobody killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...kills import make_cache, survive


@pytest.mark.timeout(400)  # about 20 s, but it starts five processes
def test_a_run_that_was_killed_three_times_is_the_same_to_the_bit(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    outcome = survive("topk", tmp_path, kills=3)
    assert outcome.kills == 3 and outcome.in_a_save >= 1
