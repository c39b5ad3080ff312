"""What tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_saes.demo import MODEL, TEXT, fetch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def demo() -> None:
    """The quick start's model and text where the examples look for them; fetched if they are not there yet."""
    for part in (MODEL, TEXT):
        fetch(part, ROOT / ".cache" / "demo")
