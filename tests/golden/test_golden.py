"""The losses of fifty steps are what they were. If they are meant to change: `python tests/golden/regenerate.py`."""

import math
import runpy
from pathlib import Path

import pytest

GOLDEN = runpy.run_path(str(Path(__file__).with_name("regenerate.py")))


@pytest.mark.parametrize("kind", GOLDEN["KINDS"])
def test_losses_are_what_they_were(kind: str) -> None:
    expected = [float(line) for line in GOLDEN["path_of"](kind).read_text().splitlines()]
    assert len(expected) == 50 and all(map(math.isfinite, expected)) and expected[-1] < 0.5 * max(expected)
    assert GOLDEN["losses"](kind) == pytest.approx(expected, rel=1e-5)  # processors round differently
