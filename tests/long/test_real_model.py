"""The quick start and every example, whole, on the real model and text (fetched if they are not there yet)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.toml") if not path.stem.startswith("quickstart"))

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("demo")]


def lm_saes(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lm_saes", *arguments], cwd=ROOT, check=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_quick_start_reaches_its_numbers(tmp_path: Path) -> None:
    cache, run = tmp_path / "activations", tmp_path / "run"
    lm_saes("generate", "examples/quickstart-activations.toml", "--set", f"writer.cache_dir={cache}")
    source = f"activation_factory.sources.0.path={cache}"
    lm_saes("train", "examples/quickstart.toml", "--set", source, "--set", f"trainer.exp_result_path={run}")
    evaluation = read(run / "evaluation.json")
    assert evaluation["metrics/explained_variance"] >= 0.80
    assert evaluation["metrics/downstream_loss_recovered"] > 0.9
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["sparsity/dead"] < 0.05 * 4608  # over the last 200,000 tokens


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_trains(tmp_path: Path, example: str) -> None:
    lm_saes("train", f"examples/{example}.toml", "--set", f"trainer.exp_result_path={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["losses/mse_loss"] for row in rows if "losses/mse_loss" in row]
    assert losses[-1] < losses[0]
    assert read(tmp_path / "evaluation.json")["metrics/explained_variance"] > 0.2
    assert (tmp_path / "report.html").exists()
