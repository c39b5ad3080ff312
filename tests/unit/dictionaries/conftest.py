"""What tests of dictionaries share."""

import pytest

from lm_saes.latents.encode import given as dense_select
from lm_saes.latents.encode import linear, transforms


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces the sparse or the dense path wherever the density would decide."""
    for module in (linear, transforms, dense_select):
        monkeypatch.setattr(module, "sparse_pays", lambda entries, places: request.param == "sparse")
    return request.param
