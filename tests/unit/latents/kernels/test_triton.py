"""The Triton kernels on a machine without a GPU: run by Triton's interpreter, and compiled for a GPU without running.

Both need settings that hold for a whole process, so each has one of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("triton")
HERE = Path(__file__).parent
SOURCE = Path(__file__).parents[4] / "src"


def run(*arguments: str, **environment: str) -> str:
    """Run Python on something; what it printed. Fails, with what it printed, if that does."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)} | environment
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=inherited | settings, cwd=HERE.parents[3]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_agree_with_their_plain_twins() -> None:
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    printed = run(*arguments, str(HERE / "twins.py"), TRITON_INTERPRET="1")
    passed = re.search(r"^(\d+) passed in", printed, re.MULTILINE)
    assert passed, printed
    assert int(passed[1]) > 50  # all of them, none skipped


def test_every_kernel_compiles_for_a_gpu_and_fits_into_its_registers(tmp_path: Path) -> None:
    printed = run(str(HERE / "compiled.py"), TRITON_CACHE_DIR=str(tmp_path))
    spilled = [line.split() for line in printed.splitlines()]
    source = "".join(path.read_text() for path in (SOURCE / "lm_saes/latents/kernels").glob("cuda*.py"))
    assert {name for name, _ in spilled} == set(re.findall(r"launch\(\s*(_\w+)", source))
    assert [name for name, stack in spilled if stack != "0"] == []
