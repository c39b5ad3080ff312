"""What torchrun must not start is told once, in one line, with exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..tiny_run import training, training_of
from .launching import Launch

DIFFERENT = """
import os, subprocess, sys
change = ["--set", f"trainer.lr=0.{os.environ['RANK']}"]
sys.exit(subprocess.call([sys.executable, "-m", "lm_saes", "train", *sys.argv[1:], *change]))
"""


def config(place: Path, data: int, model: int, **head: int) -> str:
    made = training_of("crosscoder", place, place / "run") if head else training(place, place / "run")
    file = place / "run.json"
    file.write_text(json.dumps(made | {"data_parallel_size": data, "model_parallel_size": model} | head))
    return str(file)


def refused(launch: Launch) -> str:
    assert launch.wait() == 1 and launch.output().count("exitcode  : 2") >= 1, launch.output()
    (line,) = launch.told()
    return line


def test_a_mesh_of_another_size(tmp_path: Path) -> None:
    line = refused(Launch(2, [config(tmp_path, 1, 4)], tmp_path / "log"))
    assert line.startswith(
        "lm-saes: error: data_parallel_size=1, model_parallel_size=4: 1 x 4 = 4 processes, but 2 run"
    )
    assert not (tmp_path / "run").exists()


def test_heads_that_cannot_be_cut_evenly(tmp_path: Path) -> None:
    line = refused(Launch(3, [config(tmp_path, 1, 1, head_parallel_size=3)], tmp_path / "log"))
    what = "does not divide the 2 heads of sae_type='crosscoder' evenly; use a divisor"
    assert line == f"lm-saes: error: head_parallel_size=3: {what}"
    assert not (tmp_path / "run").exists()


def test_settings_that_differ(tmp_path: Path) -> None:
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT)
    launch = Launch(2, [config(tmp_path, 2, 1)], tmp_path / "log", command=["--no-python", sys.executable, str(script)])
    found = "process 1 against process 0: settings.trainer.lr: 0.0 there, 0.1 here"
    assert refused(launch) == (
        f"lm-saes: error: the processes do not run the same ({found}); start all with one config and one version"
    )
    assert not (tmp_path / "run").exists()
