"""The benchmarks at a tiny size: they run, and print a line for everything. Times are not looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *options: str) -> str:
    command = [sys.executable, BENCHMARKS / script, *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_step() -> None:
    output = run("step.py", "--quick")
    lines = re.findall(r"^(\w.*?) +\d+ +\d+ +[\d.]+ ms +[\d.]+ ms +([\d.]+) ", output, re.MULTILINE)
    names = {name for name, _ in lines}
    assert len(lines) == 16 and all(float(ratio) > 0 for _, ratio in lines)
    assert {"TopK k=32", "TopK k=32, bfloat16", "BatchTopK k=32", "TopK k=32, AuxK, 10% dead"} <= names
    assert len(re.findall(r"F \d+ to \d+: step x", output)) == 3 and len(re.findall(r"B \d+ to \d+: step", output)) == 2
    sparse = re.findall(r"^(?:ReLU|JumpReLU).*2%.* density ([\d.]+)% to ([\d.]+)%", output, re.MULTILINE)
    assert len(sparse) == 4 and all(1.5 < float(share) < 2.5 for shares in sparse for share in shares), output
    further = re.findall(r"^JumpReLU, 2%(.*?) {2,}.* window \+([\d.]+)%", output, re.MULTILINE)
    assert [float(share) < 1.2 for _, share in further] == ["wide" not in name for name, _ in further], output


def test_density() -> None:
    assert len(re.findall(r"^ +[\d.]+% +\d+ ms +\d+ ms +[\d.]+$", run("density.py", "--quick"), re.MULTILINE)) == 8


def test_recovery() -> None:
    assert re.fullmatch(
        r"topk lr=.* steps=3: FVU 0\.\d+, atoms recovered .*\n", run("recovery.py", "--small", "--steps", "3")
    )


def test_this_project_among_its_peers() -> None:
    output = run("peers/run.py", "--only", "lm_saes", "--configs", "C", "--quick", "--steps", "2")
    assert re.search(r"^lm_saes +[\d.]+ s +[\d.]+ +[\d.]+ GB", output, re.MULTILINE), output
