"""What tests of dictionaries share."""

import pytest

from lm_saes.latents.encode import transforms
from lm_saes.latents.selection import selector


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces the sparse or the dense path wherever the density would decide."""
    for module in (selector, transforms):
        monkeypatch.setattr(module, "sparse_pays", lambda entries, places: request.param == "sparse")
    return request.param
