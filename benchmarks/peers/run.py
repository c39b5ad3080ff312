"""Time a training step of other tools, each in an environment of its own, and of this project on the same work.

    python benchmarks/peers/run.py                               everything; 8 GB of disk and a quarter of an hour
    python benchmarks/peers/run.py --only sparsify --configs A   one tool beside this project, one configuration

The environments, with pinned versions, are made in .cache/peers and used again; delete that folder to have the space
back. Every run is a process of its own and the tools take turns. Each has its own trainer, optimizer and
default settings, or those of its examples; activations are in memory. A cell says the median seconds of a step, the
same over the single encoder product `x[B, d] @ W[d, F]` in float32 timed between the steps, and the peak memory of the
process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS, CACHE = ROOT / "benchmarks", ROOT / ".cache" / "peers"
sys.path.insert(0, str(BENCHMARKS))
from peer import SETTINGS  # noqa: E402

COMMON = ("numpy==2.4.6", "transformers==5.23.0")


@dataclass(frozen=True)
class Tool:
    """What is timed: `run_NAME.py`, in an environment with these requirements."""

    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    configs: str = "ABCDE"


OURS = "lm_saes"
TOOLS = {
    OURS: Tool(),
    "saelens": Tool(("sae-lens==6.54.12", "transformer-lens==3.9.0", *COMMON)),
    "sparsify": Tool(("eai-sparsify==1.3.3", "schedulefree==1.4.1", *COMMON), configs="AE"),  # has TopK alone
    # imports what later versions of transformer-lens lack
    "llamascopium": Tool(("llamascopium==2.0.0b34", "transformer-lens==3.9.0", *COMMON)),
    # the torchvision that it brings may not fit torch, and is not needed
    "dictionary_learning": Tool(("dictionary-learning==0.1.0", "nnsight==0.3.7", *COMMON), unwanted=("torchvision",)),
}


def environment(name: str, torch: str) -> Path:
    """The Python of a tool's environment, which is made if it is not there as wanted."""
    tool, place = TOOLS[name], CACHE / name
    if name == OURS:
        return Path(sys.executable)
    python, stamp, wanted = place / "bin" / "python", place / "installed.txt", [torch, *tool.requirements]
    if stamp.exists() and stamp.read_text(encoding="utf-8").split() == wanted:
        return python
    print(f"{name}: making {place.relative_to(ROOT)} with {' '.join(wanted)}", file=sys.stderr, flush=True)
    make = [sys.executable, "-m", "venv", "--clear", place]
    if subprocess.run(make, capture_output=True).returncode:  # a Python without its venv module
        lender = CACHE / "virtualenv"
        subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--target", lender, "virtualenv"], check=True)
        make = [sys.executable, "-m", "virtualenv", "-q", "--clear", place]
        subprocess.run(make, check=True, env={**os.environ, "PYTHONPATH": str(lender)})
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "install", "-qq", torch], check=True)  # first and alone, so that its build stays
    subprocess.run([*pip, "install", "-qq", *wanted], check=True)
    if tool.unwanted:
        subprocess.run([*pip, "uninstall", "-qq", "-y", *tool.unwanted], check=True)
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return python


def time_one(name: str, python: Path, config: str, steps: int, quick: bool) -> dict[str, Any] | None:
    """Run a tool's script once; what it measured, or None if it failed."""
    path = os.pathsep.join(map(str, [BENCHMARKS, ROOT / "src"] if name == OURS else [BENCHMARKS]))
    settings = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    script = BENCHMARKS / "peers" / f"run_{name}.py"
    command = [python, script, "--config", config, "--steps", str(steps), *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(command, cwd=place, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{name}, {config}: failed: {last}", file=sys.stderr, flush=True)
        return None
    return json.loads(next(text for text in reversed(done.stdout.splitlines()) if text.startswith("{")))


def cell(runs: list[dict[str, Any]]) -> str:
    """Seconds, ratio and memory of all runs of one tool on one configuration."""
    if not runs:
        return "-"
    step, floor = (statistics.median(t for run in runs for t in run[what]) for what in ("times", "floors"))
    return f"{step:.3f} s {step / floor:5.2f} {max(run['peak'] for run in runs) / 1e9:4.1f} GB"


def main() -> None:
    """Print the table; exit with 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"tools to time beside this project, of {','.join(TOOLS)}; with commas")
    parser.add_argument("--configs", default="ABCDE", help="; ".join(f"{c}: {s.title}" for c, s in SETTINGS.items()))
    parser.add_argument("--steps", type=int, default=10, help="timed steps a run")
    parser.add_argument("--passes", type=int, default=2, help="runs of each tool on each configuration")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement for PyTorch, installed first")
    parser.add_argument("--quick", action="store_true", help="a tiny size, one pass: does it run?")
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else list(TOOLS)
    if wrong := set(wanted) - set(TOOLS):
        parser.error(f"--only {wrong.pop()}: not a tool; use {', '.join(TOOLS)}")
    if wrong := set(given.configs) - set(SETTINGS):
        parser.error(f"--configs {wrong.pop()}: not a configuration; use {', '.join(SETTINGS)}")
    pythons = {name: environment(name, given.torch) for name in TOOLS if name in wanted or name == OURS}
    runs, failed = defaultdict[tuple[str, str], list[dict[str, Any]]](list), False
    for config in given.configs * (1 if given.quick else given.passes):
        for name, python in pythons.items():
            if config in TOOLS[name].configs:
                result = time_one(name, python, config, given.steps, given.quick)
                failed |= result is None
                runs[name, config] += [] if result is None else [result]
                print(f"{config} {name:20} {cell(runs[name, config])}", file=sys.stderr, flush=True)
    configs = sorted(set(given.configs))
    print(" " * 20 + "".join(f"{c} {SETTINGS[c].title:24}" for c in configs))
    for name in pythons:
        print(f"{name:20}" + "".join(f"{cell(runs[name, c]):26}" for c in configs))
    sys.exit(failed)


if __name__ == "__main__":
    main()
