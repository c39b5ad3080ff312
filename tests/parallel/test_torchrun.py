"""The train command under torchrun: the numbers of one process, stops, kills and restarts."""

from __future__ import annotations

import json
import math
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes import cli
from lm_saes.dictionaries.merge import export
from lm_saes.training.checkpoint import saved_steps

from ..kills import make_cache, settings
from ..tiny_run import make_place
from .launching import Launch

STEPS = 24
SAVES = {"n_checkpoints": 4, "check_point_save_mode": "linear"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchrun")
    make_place(path)
    make_cache(path / "cache")
    return path


def config(place: Path, name: str, case: str, mesh: tuple[int, ...], steps: int = STEPS, **trainer: Any) -> Path:
    """A config file of the run in `place / name`; a mesh is `data x model`, or `data x model x head`."""
    sizes = {f"{axis}_parallel_size": size for axis, size in zip(("data", "model", "head"), mesh, strict=False)}
    made = settings(case, place, place / name, steps, **SAVES, **trainer) | sizes
    file = place / f"{name}.json"
    file.write_text(json.dumps(made, default=str))
    return file


def train(file: Path, n: int, resume: bool = False) -> list[str]:
    """Train what a config says, by n processes; what they told."""
    options = ["--resume"] if resume else []
    if n == 1:  # in this process, which has everything imported
        cli.app(["train", str(file), *options], standalone_mode=False)
        return []
    launch = Launch(n, [str(file), *options], file.with_suffix(".log"))
    assert launch.wait() == 0, launch.output()
    return launch.told()


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


@pytest.mark.parametrize(
    ("case", "mesh"), [("topk", (1, 2)), ("crosscoder", (2, 1)), ("crosscoder", (1, 1, 2)), ("batchtopk", (2, 2))]
)
def test_a_run_has_the_numbers_of_one_process(place: Path, case: str, mesh: tuple[int, ...]) -> None:
    one, many = f"{case}-one", f"{case}-on-{'x'.join(map(str, mesh))}"
    if not (place / one).exists():
        train(config(place, one, case, (1, 1)), 1)
    said = train(config(place, many, case, mesh), math.prod(mesh))
    assert not any("process" in line for line in said) and (place / many / "report.html").exists()
    assert list(saved_steps(place / many)) == list(saved_steps(place / one))
    same(place / one, place / many, 2e-3)


def test_two_nodes_meet_and_a_killed_one_ends_the_other(place: Path) -> None:
    file = config(place, "nodes", "topk", (2, 1))
    assert [node.wait() for node in on_two_nodes(file, "calm")] == [0, 0]
    one = place / "topk-one"
    if not one.exists():
        train(config(place, "topk-one", "topk", (1, 1)), 1)
    same(one, place / "nodes", 2e-3)

    file = config(place, "lost", "topk", (2, 1), 400)
    nodes = on_two_nodes(file, "lost")
    wait_for_a_save(nodes[0], place / "lost")
    nodes[1].signal(signal.SIGKILL, 0)
    assert nodes[0].wait(60) != 0, nodes[0].output()
    assert nodes[1].wait(60) != 0, nodes[1].output()
    assert 0 < max(saved_steps(place / "lost")) < 400


def on_two_nodes(file: Path, name: str) -> list[Launch]:
    """One process each of two torchruns, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Launch(1, [str(file)], file.with_name(f"{name}-{node}.log"), port=port) for node in range(2)]


def test_a_killed_process_takes_the_others_down_and_the_restarted_run_ends_the_same(place: Path) -> None:
    steps, killed, restarted = 400, place / "killed", place / "restarted"
    train(config(place, "calm", "topk", (1, 2), steps), 2)
    file = config(place, "killed", "topk", (1, 2), steps)
    launch = Launch(2, [str(file)], place / "killed.log")
    wait_for_a_save(launch, killed)
    launch.signal(signal.SIGKILL, 1)
    assert launch.wait(60) != 0 and "SIGKILL" in launch.output()
    assert 0 < max(saved_steps(killed)) < steps
    train(file, 2, resume=True)
    same(place / "calm", killed, 0)

    file = config(place, "restarted", "topk", (1, 2), steps)
    launch = Launch(2, [str(file)], place / "restarted.log", restarts=1)
    wait_for_a_save(launch, restarted)
    launch.signal(signal.SIGKILL, 0)
    assert launch.wait() == 0, launch.output()
    same(place / "calm", restarted, 0)


def wait_for_a_save(launch: Launch, run: Path) -> None:
    launch.wait_for(run, 1)
    until = time.monotonic() + 60
    while not saved_steps(run):
        assert time.monotonic() < until, launch.output()
        time.sleep(0.01)


def test_one_process_told_to_stop_stops_all_at_one_step(place: Path) -> None:
    run, file = place / "stopped", config(place, "stopped", "jumprelu", (2, 1), 400, save_every_minutes=None)
    launch = Launch(2, [str(file)], place / "stopped.log")
    launch.wait_for(run, 4)
    launch.signal(signal.SIGTERM, 1)
    assert launch.wait(60) != 0 and launch.output().count("stopped after step") == 1
    stopped = max(saved_steps(run))
    assert stopped < 400 and reports(run)[-1]["step"] == stopped
    train(config(place, "stopped", "jumprelu", (1, 2), 400, save_every_minutes=None), 2, resume=True)  # on another mesh
    assert reports(run)[-1]["step"] == 400


def test_latents_that_cannot_be_cut_evenly(place: Path) -> None:
    launch = Launch(3, [str(config(place, "uneven", "topk", (1, 3)))], place / "uneven.log")
    assert launch.wait() != 0
    (line,) = launch.told()
    assert "model_parallel_size=3: does not divide the 64 latents" in line
    assert not (place / "uneven").exists()
