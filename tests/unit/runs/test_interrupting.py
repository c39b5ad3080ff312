"""SIGTERM and SIGINT: the step is finished and saved, the exit code says so, and a second signal ends at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_saes.errors import Interrupted
from lm_saes.training.checkpoint import saved_steps
from lm_saes.training.signals import stopping
from lm_saes.training.verify import verify

from ...kills import ROOT, assert_same, make_cache, settings

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_cache(place / "cache")
    return place


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Starts `lm-saes train`; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(name: str, steps: int, *arguments: str, **trainer: Any) -> subprocess.Popen[str]:
        file = place / f"{name}.json"
        file.write_text(json.dumps(settings("topk", place, place / name, steps, **trainer)))
        command = [sys.executable, "-m", "lm_saes", "train", str(file), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_for(process: subprocess.Popen[str], run: Path, rows: int) -> None:
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.002)


@pytest.mark.timeout(400)  # about 20 s, but it starts four processes
def test_an_interrupted_run_has_saved_and_goes_on_as_if_nothing_had_happened(place: Path, start: Start) -> None:
    """SIGTERM after some steps, SIGINT after some more, then on to the end."""
    whole = start("whole", 120, n_checkpoints=1)
    assert whole.wait() == 0
    run = place / "parts"
    for number, code, rows, *more in ((signal.SIGTERM, 143, 20), (signal.SIGINT, 130, 60, "--resume")):
        process = start("parts", 120, *more, n_checkpoints=1)
        wait_for(process, run, rows)
        process.send_signal(number)
        _, told = process.communicate()
        assert process.returncode == code, told
        assert f"{signal.Signals(number).name}: saving after this step; once more ends the run at once" in told
        (step, *_) = reversed(list(saved_steps(run)))
        last = told.strip().splitlines()[-1]
        assert last == f"lm-saes: error: {signal.Signals(number).name}: stopped after step {step} of 120; " \
                       "saved, go on with --resume"  # fmt: skip
        assert rows <= step < 120 and verify(run)[0] == []
        assert not (run / "sae_weights.safetensors").exists() and "Traceback" not in told
    process = start("parts", 120, "--resume", n_checkpoints=1)
    assert process.wait() == 0
    assert_same(place / "whole", run)


BUSY = """
import time
from lm_saes.training.signals import stopping
with stopping(lambda number: None):
    print("ready", flush=True)
    time.sleep(600)  # a step, or a save, that takes for ever
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY], env=environment, **pipes) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stderr.readline() == "\n" and first.name in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(20) == -second  # which a shell tells as 128 + its number


def test_what_the_handlers_do_and_that_they_are_put_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    asked: list[signal.Signals] = []
    with stopping(asked.append):
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        for number in (signal.SIGINT, signal.SIGTERM):  # the next one ends the process
            assert signal.getsignal(number) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "SIGTERM: saving after this step" in capfd.readouterr().err
    with pytest.raises(ZeroDivisionError), stopping(asked.append):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping(lambda number: None):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with stopping(lambda number: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_exit_codes_are_those_of_shells() -> None:
    assert Interrupted("x", signal.SIGTERM).exit_code == 143 and Interrupted("x", signal.SIGINT).exit_code == 130
