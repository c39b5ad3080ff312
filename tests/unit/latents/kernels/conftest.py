"""What the tests of the Triton kernels need."""

import importlib.util
import os

import pytest


@pytest.fixture
def triton() -> None:
    """Skips a test where Triton is not installed, as on a Mac; with `CI` set, it fails instead."""
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("CI"):
            pytest.fail("triton is not installed: `make setup` installs it on Linux")
        pytest.skip("triton is not installed")
