"""The train command under torchrun: the numbers of one process, stops, kills, restarts, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.export import export
from lm_saes.training.checkpoint import saved_steps

from ..kills import ROOT, make_cache, settings
from ..tiny_run import make_place

STEPS = 24
SAVES = {"n_checkpoints": 4, "check_point_save_mode": "linear"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrun")
    make_place(path)
    make_cache(path / "cache")
    return path


def config(place: Path, name: str, case: str, mesh: tuple[int, int], steps: int = STEPS, **trainer: Any) -> Path:
    """A config file of the run in `place / name`."""
    sizes = {"data_parallel_size": mesh[0], "model_parallel_size": mesh[1]}
    made = settings(case, place, place / name, steps, **SAVES, **trainer) | sizes
    file = place / f"{name}.json"
    file.write_text(json.dumps(made, default=str))
    return file


def start(file: Path, n: int, *options: str, resume: bool = False) -> subprocess.Popen[str]:
    """The train command on a config: alone, or as n processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), *options] if n > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "lm_saes", "train", str(file), *(["--resume"] if resume else [])],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 100) -> str:
    """What a process has said by its end, which has to come."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {seconds} s: {process.communicate()[0]}") from None


def train(file: Path, n: int, *options: str, resume: bool = False) -> str:
    process = start(file, n, *options, resume=resume)
    said = finish(process)
    assert process.returncode == 0, said
    return said


def reports(run: Path) -> list[dict[str, float]]:
    """Every report, without what is told by the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "details/tokens_per_second")} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run, whoever saved them."""
    file = run / "sae_weights.safetensors"
    return load_file(file if file.exists() else export(run))


def same(run: Path, other: Path, tolerance: float) -> None:
    """Two runs agree in every report and every weight."""
    ours, theirs = reports(run), reports(other)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs] and ours
    for line, line2 in zip(ours, theirs, strict=True):
        assert line == pytest.approx(line2, rel=tolerance, abs=tolerance)
    assert weights(run).keys() == weights(other).keys()
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("case", "mesh"), [("topk", (1, 2)), ("crosscoder", (2, 1)), ("batchtopk", (2, 2))])
def test_a_run_has_the_numbers_of_one_process(place: Path, case: str, mesh: tuple[int, int]) -> None:
    one, many = f"{case}-one", f"{case}-many"
    train(config(place, one, case, (1, 1)), 1)
    said = train(config(place, many, case, mesh), mesh[0] * mesh[1])
    assert said.count("report: ") == 1 and (place / many / "report.html").exists()
    assert list(saved_steps(place / many)) == list(saved_steps(place / one))
    same(place / one, place / many, 2e-3)


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process number of a rank that torchrun has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{process.pid}\n" in (entry / "status").read_text() and (
                f"\0RANK={rank}\0" in (entry / "environ").read_text()
            ):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} is not there")


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def test_a_killed_process_takes_the_others_down_and_the_restarted_run_ends_the_same(place: Path) -> None:
    steps = 400
    train(config(place, "calm", "topk", (1, 2), steps), 2)
    run = place / "killed"
    file = config(place, "killed", "topk", (1, 2), steps)
    process = start(file, 2)
    wait_for(lambda: bool(saved_steps(run)), process)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    began = time.monotonic()
    said = finish(process, 60)
    assert process.returncode != 0 and "SIGKILL" in said and time.monotonic() - began < 60
    assert 0 < max(saved_steps(run)) < steps
    train(file, 2, resume=True)
    same(place / "calm", run, 0)

    run = place / "restarted"
    process = start(config(place, "restarted", "topk", (1, 2), steps), 2, "--max-restarts", "1")
    wait_for(lambda: bool(saved_steps(run)), process)
    os.kill(rank_of(process, 0), signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    same(place / "calm", run, 0)


def test_one_process_told_to_stop_stops_all_at_one_step(place: Path) -> None:
    run, file = place / "stopped", config(place, "stopped", "jumprelu", (2, 1), 400, save_every_minutes=None)
    process = start(file, 2)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(reports(run)) > 3, process)
    os.kill(rank_of(process, 1), signal.SIGTERM)
    said = finish(process, 60)
    assert process.returncode != 0 and len(re.findall("stopped after step", said)) == 1
    stopped = max(saved_steps(run))
    assert stopped < 400 and reports(run)[-1]["step"] == stopped
    train(config(place, "stopped", "jumprelu", (1, 2), 400, save_every_minutes=None), 2, resume=True)  # on another mesh
    assert reports(run)[-1]["step"] == 400


def test_what_is_refused_is_told_once(place: Path) -> None:
    process = start(config(place, "product", "topk", (2, 2)), 2)
    said = finish(process)
    assert process.returncode != 0 and said.count("2 x 2 = 4 processes") == 1
    assert not (place / "product").exists()
    process = start(config(place, "uneven", "topk", (1, 3)), 3)
    said = finish(process)
    assert process.returncode != 0 and said.count("model_parallel_size=3: does not divide the 64 latents") == 1
    assert not (place / "uneven").exists()
