"""Pools of processes that all tests of this folder share: starting them takes longer than most cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from .pool import Pool


class Pools(Protocol):
    """Gives the pool of so many processes."""

    def __call__(self, size: int) -> Pool: ...


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    made: dict[int, Pool] = {}
    with ExitStack() as stack:

        def pool(size: int) -> Pool:
            if size not in made or not made[size].alive:
                made[size] = stack.enter_context(Pool(size, tmp_path_factory.mktemp(f"pool{size}")))
            return made[size]

        yield pool
