"""The GPU benchmark at a tiny size on the CPU: it runs, and prints a line for everything."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_runs_on_a_cpu() -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = [ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--quick"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\w.*?) +d=24 F=600 k=5 B=64 +[\d.]+ ms +[\d.]+ ms +[\d.]+ ", done.stdout, re.MULTILINE)
    sums = [f"{name}, {dtype}" for dtype in ("bfloat16", "float32")
            for name in ("gather_sum, decode", "gather_sum, weight gradient", "row_dot", "top_of_product")]  # fmt: skip
    steps = ["kernels chained to a step, bfloat16", *(f"step, {a}, AuxK, adam, float32" for a in ("topk", "batchtopk"))]
    assert sorted(lines) == sorted([*sums, "transpose, float32", "sparse_adam, half of the rows, float32", *steps])
