"""Every example, as it is but for its size, through the command line: five steps on the quick start's real model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes import cli
from lm_saes.config import read_document
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.toml"))
QUICK_START = ["quickstart", "quickstart-activations", "quickstart-evaluate"]
STEPS, CONTEXT = 5, 64
SMALL_EVALUATION = {"eval.max_tokens": 256, "eval.downstream_tokens": 128, "eval.context_size": CONTEXT}

pytestmark = pytest.mark.usefixtures("demo")
Command = Callable[..., str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So little work gains nothing from more, and threads that wait for each other on a busy machine lose minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lm_saes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lm-saes COMMAND examples/EXAMPLE.toml` with settings changed, where the paths of examples begin.

    Gives what it printed to stdout.
    """
    monkeypatch.chdir(ROOT)

    def run(command: str, example: str, changes: dict[str, Any]) -> str:
        overrides = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
        cli.app([command, f"examples/{example}.toml", *overrides], standalone_mode=False)
        return capsys.readouterr().out

    return run


def five_steps(example: str, run: Path) -> dict[str, Any]:
    """What makes an example small: its batches, contexts and evaluation, and five steps of it."""
    document = read_document(ROOT / "examples" / f"{example}.toml")
    changes: dict[str, Any] = {"trainer.exp_result_path": run, "trainer.log_frequency": 1, **SMALL_EVALUATION}
    if document["activation_factory"]["target"] == "activations-1d":
        changes |= {"activation_factory.batch_size": 128, "activation_factory.buffer_size": 512}
    else:
        changes |= {"activation_factory.batch_size": 128 // CONTEXT}
    if "context_size" in document["activation_factory"]:
        changes |= {"activation_factory.context_size": CONTEXT}
    if "auxk_coefficient" in document["trainer"]:
        changes |= {"trainer.dead_threshold": 128}  # so that there are dead latents to revive
    return changes | {"trainer.total_training_tokens": STEPS * 128}


def check(run: Path, printed: str) -> None:
    """Five reported steps, final metrics and weights, everything finite, and a dictionary that loads."""
    assert printed.splitlines()[-1] == f"report: {run}/report.html"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert {"losses/mse_loss", "metrics/l0"} <= set(rows[-1])
    assert {"metrics/explained_variance", "metrics/l0", "metrics/downstream_loss_recovered"} <= set(evaluation)
    numbers = [value for found in (*rows, evaluation) for value in found.values() if isinstance(value, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))
    dictionary = AbstractSparseAutoEncoder.from_pretrained(run)
    assert all(bool(parameter.isfinite().all()) for parameter in dictionary.parameters())
    assert "<html" in (run / "report.html").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name not in QUICK_START])
def test_an_example_trains(example: str, lm_saes: Command, tmp_path: Path) -> None:
    check(tmp_path, lm_saes("train", example, five_steps(example, tmp_path)))


def test_the_quick_start_generates_trains_and_evaluates(lm_saes: Command, tmp_path: Path) -> None:
    assert [name for name in EXAMPLES if name.startswith("quickstart")] == QUICK_START
    cache, run = tmp_path / "activations", tmp_path / "run"
    size = {"writer.total_generating_tokens": 1024, "activation_factory.context_size": CONTEXT}
    printed = lm_saes("generate", "quickstart-activations", {"writer.cache_dir": cache, **size})
    assert printed.splitlines()[-1] == f"activations: {cache}"
    changes = five_steps("quickstart", run) | {"activation_factory.sources.0.path": cache}
    check(run, lm_saes("train", "quickstart", changes))
    again = json.loads(lm_saes("evaluate", "quickstart-evaluate", {"sae": run, **SMALL_EVALUATION}))
    assert again and all(map(math.isfinite, again.values()))
    before = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert again["metrics/explained_variance"] == pytest.approx(before["metrics/explained_variance"], rel=1e-3)
