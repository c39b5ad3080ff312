"""Twenty kills of each case; `python -m tests.kills` makes a hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..kills import CASES, make_cache, survive
from ..tiny_run import make_place

pytestmark = pytest.mark.long


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_twenty_times_is_the_same_to_the_bit(tmp_path: Path, case: str) -> None:
    make_cache(make_place(tmp_path) / "cache")
    outcome = survive(case, tmp_path, kills=20)
    assert outcome.kills == 20 and outcome.in_a_save >= 5 and outcome.starting >= 1
    assert len(set(outcome.reached)) > 10
