"""Loggers, through the files and the text that they really write."""

import io
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from lm_saes.errors import ConfigError, DataError
from lm_saes.training.loggers import (
    ConsoleLogger,
    JsonlLogger,
    Logger,
    Loggers,
    TensorBoardLogger,
    WandbConfig,
    WandbLogger,
)
from lm_saes.training.loggers.run import RunLogger

# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(path: Path, first: int, last: int) -> None:
    logger = JsonlLogger(path)
    logger.start(100, first)
    for step in range(first + 1, last + 1):
        logger.advance(step)
        logger.report(step, {"losses/overall_loss": float(step)})
    logger.close({})


def test_every_report_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.start(10, 0)
    logger.report(5, {"a/b": 1.5, "nan": float("nan"), "inf": float("-inf"), "count": 3})
    (line,) = read(path)
    time = line.pop("time")
    assert isinstance(time, float) and time > 1.7e9
    assert line == {"step": 5, "a/b": 1.5, "nan": None, "inf": None, "count": 3}
    logger.close({})


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 10)
    write_steps(path, 6, 12)
    assert [line["step"] for line in read(path)] == list(range(1, 13))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 3)
    path.write_text(path.read_text() + '{"step": 3, "ti')
    write_steps(path, 3, 4)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 3)
    write_steps(path, 0, 2)
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_file_of_something_else_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2: not a report"):
        JsonlLogger(path).start(10, 2)
    assert "hello" in path.read_text()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "tb")
    logger.start(10, 0)
    for step in (2, 4):
        logger.report(step, {"losses/overall_loss": step / 4, "metrics/l0": 32.0})
    logger.close({})
    assert scalars(tmp_path / "tb") == {
        "losses/overall_loss": [(2, 0.5), (4, 1.0)],
        "metrics/l0": [(2, 32.0), (4, 32.0)],
    }


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    for first, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        logger = TensorBoardLogger(tmp_path)
        logger.start(10, first)
        for step in steps:
            logger.report(step, {"a": first + step / 8})
        logger.close({})
    assert scalars(tmp_path)["a"] == [(2, 0.25), (4, 0.5), (6, 4.75), (8, 5.0)]


# --- W&B -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(directory: Path, run_id: str | None) -> bytes:
    """The bytes of that run under `directory` (W&B's log is not compressed: names and values stand in it)."""
    import wandb

    wandb.teardown()  # the file is complete when W&B's own process has ended, as it does with ours
    (log,) = directory.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    return log.read_bytes()


def test_wandb_offline_writes_a_run_and_a_resumed_one_keeps_its_id(tmp_path: Path, offline: None) -> None:
    cfg = WandbConfig(wandb_project="project-of-test", exp_name="name-of-test")
    first = WandbLogger(cfg, {"sae": {"top_k": 77}}, tmp_path / "first")
    assert first.run_id is None
    first.start(10, 0)
    assert first.run_id
    first.advance(1)
    first.report(5, {"losses/overall_loss": 0.125})
    first.close({"metrics/l0": 31.5})
    log = records(tmp_path / "first", first.run_id)
    for expected in (b"project-of-test", b"name-of-test", b"top_k", b"losses/overall_loss", b"0.125", b"31.5"):
        assert expected in log

    second = WandbLogger(cfg, {}, tmp_path / "second", resume_id=first.run_id)
    assert second.run_id == first.run_id
    second.start(10, 5)
    second.report(6, {"losses/overall_loss": 0.0625})
    second.close({})
    assert b"0.0625" in records(tmp_path / "second", first.run_id)


def test_a_wandb_run_of_the_caller_is_logged_to_and_left_open(tmp_path: Path, offline: None) -> None:
    import wandb

    with wandb.init(project="p", dir=str(tmp_path), mode="offline") as run:
        logger = RunLogger(run)
        logger.start(10, 0)
        logger.report(1, {"ours": 0.1875})
        logger.close({"end": 1.0})
        run.log({"callers": 0.375})
    log = records(tmp_path, run.id)
    assert b"0.1875" in log and b"0.375" in log


def test_wandb_failing_in_the_middle_warns_once_and_does_not_end_the_run(
    tmp_path: Path, offline: None, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    loggers = Loggers([], optional=[WandbLogger(WandbConfig(), {}, tmp_path)])
    loggers.start(10, 0)
    assert wandb.run is not None
    wandb.run.finish()
    for step in (1, 2):
        loggers.report(step, {"a": 1.0})
    loggers.close({"a": 1.0})
    (record,) = [record for record in caplog.records if record.name.startswith("lm_saes")]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("WandbLogger failed and is left out from here on: UsageError: ")


@pytest.mark.parametrize(("package", "extra"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_an_error_with_the_remedy(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    logger = WandbLogger(WandbConfig(), {}, tmp_path) if package == "wandb" else TensorBoardLogger(tmp_path)
    with pytest.raises(ConfigError, match=rf"pip install 'lm-saes\[{extra}\]'"):
        Loggers([], optional=[logger]).start(10, 0)


def test_wandb_that_cannot_begin_is_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**settings: object) -> None:
        raise wandb.Error("no API key\nconfigured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"the run cannot begin \(no API key configured\); .* WANDB_MODE=offline"):
        WandbLogger(WandbConfig(), {}, tmp_path).start(10, 0)


# --- several ---------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.calls: list[tuple[object, ...]] = []

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if call[0] == self.fails_at:
            raise OSError(f"{call[0]} is\nbroken")

    def start(self, total_steps: int, step: int) -> None:
        self._call("start", total_steps, step)

    def advance(self, step: int) -> None:
        self._call("advance", step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call("report", step, dict(metrics))

    def close(self, summary: Mapping[str, float]) -> None:
        self._call("close", dict(summary))


def drive(logger: Logger) -> None:
    logger.start(10, 3)
    logger.advance(4)
    logger.report(4, {"a": 1.0})
    logger.advance(5)
    logger.close({"b": 2.0})


EVERYTHING = [("start", 10, 3), ("advance", 4), ("report", 4, {"a": 1.0}), ("advance", 5), ("close", {"b": 2.0})]


def test_every_call_reaches_every_logger() -> None:
    recorders = [Recorder(), Recorder(), Recorder()]
    drive(Loggers(recorders[:2], optional=recorders[2:]))
    assert all(recorder.calls == EVERYTHING for recorder in recorders)


@pytest.mark.parametrize(("fails_at", "calls"), [("advance", 2), ("report", 3), ("close", 5)])
def test_an_optional_logger_that_fails_is_dropped_with_one_warning(
    fails_at: str, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad, other = Recorder(), Recorder(fails_at), Recorder()
    drive(Loggers([good], optional=[bad, other]))
    assert good.calls == other.calls == EVERYTHING
    assert bad.calls == EVERYTHING[:calls]
    assert [record.getMessage() for record in caplog.records] == [
        f"Recorder failed and is left out from here on: OSError: {fails_at} is broken"
    ]


@pytest.mark.parametrize("fails_at", ["start", "advance", "report", "close"])
def test_a_required_logger_that_fails_ends_the_run(fails_at: str) -> None:
    with pytest.raises(OSError, match=fails_at):
        drive(Loggers([Recorder(fails_at)]))


def test_an_optional_logger_that_cannot_start_is_an_error_of_a_new_run_only(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match="start"):
        Loggers([], optional=[Recorder("start")]).start(10, 0)
    bad, good = Recorder("start"), Recorder()
    drive(Loggers([good], optional=[bad]))  # from step 3 on
    assert good.calls == EVERYTHING and bad.calls == EVERYTHING[:1]
    assert caplog.messages == ["Recorder failed and is left out from here on: OSError: start is broken"]


def test_reports_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/full is a disk that is always full; the first line was half written when it became so."""
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(10, 0)
    disk = logger._file
    assert disk is not None

    class Full:
        room = 7

        def write(self, data: bytes) -> int:
            if not self.room:
                return full.write(data)
            written, self.room = disk.write(data[: self.room]), 0
            return written

    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(logger, "_file", Full())
        logger.report(1, {"a": 1.0})
        logger.report(2, {"a": 2.0})
    assert len(caplog.messages) == 1 and "cannot be written ([Errno 28]" in caplog.messages[0]
    monkeypatch.setattr(logger, "_file", disk)
    logger.report(3, {"a": 3.0})
    logger.close({})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["a"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_closing_closes_all_even_when_one_fails() -> None:
    bad, good, optional = Recorder("close"), Recorder(), Recorder()
    with pytest.raises(OSError, match="close"):
        Loggers([bad, good], optional=[optional]).close({})
    assert good.calls == optional.calls == [("close", {})]


def test_every_logger_may_be_closed_before_it_started(tmp_path: Path) -> None:
    console = ConsoleLogger(Console(file=io.StringIO()))
    wandb = WandbLogger(WandbConfig(), {}, tmp_path)
    Loggers([console, JsonlLogger(tmp_path / "m.jsonl")], optional=[wandb, TensorBoardLogger(tmp_path)]).close({})
    assert os.listdir(tmp_path) == []
