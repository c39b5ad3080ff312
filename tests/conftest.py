"""What tests of several folders share."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm_saes import cli
from lm_saes.demo import MODEL, TEXT, fetch

ROOT = Path(__file__).parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
if sys.platform == "linux":
    # Processes and threads that wait for each other at every step otherwise take the cores from one another as soon as
    # they are woken, which costs more than what they compute. Everything that a test starts inherits this.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
Run = Callable[..., tuple[int, str, str]]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is worth keeping in one worker; of what others take over, the small tests come first."""
    items.sort(key=lambda item: "parallel" not in item.path.relative_to(ROOT).parts[:2])


@pytest.fixture(scope="session")
def demo() -> None:
    """The quick start's model and text where the examples look for them; fetched if they are not there yet."""
    for part in (MODEL, TEXT):
        fetch(part, ROOT / ".cache" / "demo")


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """The command sets up handlers and levels, which other tests are not to see."""
    handlers, level = list(logging.getLogger().handlers), logging.getLogger("lm_saes").level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger("lm_saes").setLevel(level)


@pytest.fixture
def lm_saes_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_as_before: None
) -> Run:
    """Runs `lm-saes ARGUMENTS...` in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lm-saes", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers by defining it is gone after it."""
    from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
    from lm_saes.dictionaries.config import BaseSAEConfig
    from lm_saes.initialization import InitializationStep
    from lm_saes.latents.activations import ActivationFunction
    from lm_saes.losses.sparsity import SparsityLoss
    from lm_saes.metrics import Metric
    from lm_saes.models import hook_points
    from lm_saes.runs.settings import TrainSettings
    from lm_saes.training.loggers import LoggerConfig
    from lm_saes.training.optimizers import OptimizerChoice
    from lm_saes.training.schedules import RateSchedule

    BaseSAEConfig.kind("sae")  # imports all kinds, which stay
    registries = [
        (hook_points, "LAYOUTS"),
        (ActivationFunction, "registry"),
        (AbstractSparseAutoEncoder, "kinds"),
        (BaseSAEConfig, "registry"),
        (TrainSettings, "kinds"),
        *(
            (family, "registry")
            for family in (SparsityLoss, OptimizerChoice, RateSchedule, LoggerConfig, InitializationStep)
        ),
    ]
    for owner, name in registries:
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    monkeypatch.setattr(Metric, "registry", list(Metric.registry))
