"""What torchrun tells its processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_saes.errors import ConfigError
from lm_saes.parallel.launch import alone, n_started, note_begun, was_begun
from lm_saes.parallel.mesh import start

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(n))


@pytest.mark.parametrize(
    ("started", "sizes", "told"),
    [
        (1, (2, 1), "2 x 1 = 2 processes, but 1 runs; change the sizes, or start it with torchrun --nproc-per-node 2"),
        (4, (2, 3), "2 x 3 = 6 processes, but 4 run; change the sizes, or start it with torchrun --nproc-per-node 6"),
        (2, (1, 1), "1 x 1 = 1 process, but 2 run; change the sizes, or start it with lm-saes train ..."),
    ],
)
def test_a_wrong_product_is_told_with_the_arithmetic(
    started: int, sizes: tuple[int, int], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, started)
    with pytest.raises(ConfigError) as caught:
        start(*sizes)
    assert told in str(caught.value) and str(caught.value).startswith(f"data_parallel_size={sizes[0]}, model_parallel")


def test_a_world_size_alone_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for every job
    assert n_started() == 1


def test_a_command_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone("evaluate")
    launched(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"^evaluate: runs in one process, but 2 were started"):
        alone("evaluate")


def test_only_what_this_torchrun_has_begun_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(torchrun: str, number: int) -> None:
        file = tmp_path / torchrun / f"attempt_{number}" / "0" / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    note_begun(tmp_path / "run")
    assert not was_begun(tmp_path / "run")  # without torchrun there is no second attempt
    attempt("one", 0)
    assert not was_begun(tmp_path / "run")
    note_begun(tmp_path / "run")
    attempt("one", 1)
    assert was_begun(tmp_path / "run") and not was_begun(tmp_path / "other")
    attempt("two", 1)
    assert not was_begun(tmp_path / "run")
