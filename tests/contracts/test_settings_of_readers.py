"""What reads a setting owns it: one class with a setting of its own each, and no edit elsewhere.

Each is trained with, has an effect, is refused where it is wrong, listed by `lm-saes settings`, saved and resumed.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from lm_saes import SAEConfig
from lm_saes.axes.axis import Axes
from lm_saes.config import build
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError, ConfigError
from lm_saes.initialization import InitializationStep, Start
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.latents.record import Record
from lm_saes.losses.sparsity import SparsityLoss
from lm_saes.runners import train_from_config
from lm_saes.trainer import Trainer, TrainerConfig
from lm_saes.training.loggers import LoggedRun, Logger, LoggerConfig
from lm_saes.training.optimizers import OptimizerChoice
from lm_saes.training.schedules import RateSchedule

from ..conftest import Run
from ..tiny_run import make_place, training

pytestmark = pytest.mark.usefixtures("own_registries")
HOOK = "blocks.0.hook_resid_post"


def readers() -> dict[str, type]:
    """One of each family, as somebody outside would write it."""

    class CountOfSquares(SparsityLoss):
        name = "count-of-squares"
        square_weight: float = Field(default=1.0, gt=0)
        """Weight of each square."""

        def __call__(self, record: Record) -> Tensor:
            return self.square_weight * record.row_mean(record.code.sum_rows(record.code.values.square()))

    class Steps(RateSchedule):
        name = "staircase"
        stair_steps: int = Field(default=5, gt=0)
        """Steps after which the rate is halved."""

        def factor(self, t: int, total: int) -> float:
            return 0.5 ** (t // self.stair_steps)

    class Descent(OptimizerChoice):
        name = "sgd"
        sgd_momentum: float = Field(default=0.0, ge=0, lt=1)
        """Momentum of plain descent."""

        def build(self, groups: list[dict[str, Any]], axes: Axes) -> Optimizer:
            return torch.optim.SGD(groups, momentum=self.sgd_momentum)

    class Shift(InitializationStep):
        name = "shift"
        order = 9
        looks_at_a_batch = False
        encoder_bias_shift: float = Field(default=0.0, le=0)
        """What is added to every encoder bias at the end."""

        def is_on(self) -> bool:
            return self.encoder_bias_shift != 0

        def apply(self, start: Start) -> None:
            start.sae.get_parameter("b_E").add_(self.encoder_bias_shift)

    class Lines(LoggerConfig):
        name = "lines"
        separator: str = Field(default=",", min_length=1)
        """What stands between numbers."""

        def make(self, run: LoggedRun) -> Logger:
            return LinesLogger(run.directory / "lines.txt", self.separator)

    return {kind.__name__: kind for kind in (CountOfSquares, Steps, Descent, Shift, Lines)}


class LinesLogger:
    """A line a report."""

    def __init__(self, file: Path, separator: str) -> None:
        self.file, self.separator = file, separator

    def start(self, total_steps: int, step: int) -> None:
        """Nothing to open."""

    def advance(self, step: int) -> None:
        """Only reports are written."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(self.separator.join([str(step), f"{metrics['losses/overall_loss']:.3g}"]) + "\n")

    def close(self, summary: Mapping[str, float]) -> None:
        """Nothing to close."""


def batches(n: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{HOOK: torch.randn(32, 8, generator=draw), "tokens": torch.zeros(32, dtype=torch.int64)} for _ in range(n)]


def trained(path: Path, initializer: Mapping[str, Any] = {}, **trainer: Any) -> AbstractSparseAutoEncoder:
    """Ten steps with the given settings; a checkpoint after five."""
    cfg = SAEConfig(hook_point_in=HOOK, hook_point_out=HOOK, d_model=8, expansion_factor=3)
    made = Initializer(build(InitializerConfig, dict(initializer))).initialize_sae_from_config(cfg, batches(10))
    own = {"total_training_tokens": 320, "n_checkpoints": 2, "check_point_save_mode": "linear", "lr": 0.05,
           "amp_dtype": "none", "exp_result_path": str(path)}  # fmt: skip
    Trainer(build(TrainerConfig, own | trainer)).fit(made, batches(10))
    return made


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "CountOfSquares": ("square_weight", {"sparsity_loss_type": "count-of-squares", "l1_coefficient": 1.0}, 9.0),
    "Steps": ("stair_steps", {"lr_scheduler_name": "staircase"}, 1),
    "Descent": ("sgd_momentum", {"optimizer_class": "sgd"}, 0.9),
}


@pytest.mark.parametrize("name", CASES)
def test_a_trainers_reader_is_one_class_with_its_setting(name: str, tmp_path: Path) -> None:
    kind, (setting, choice, value) = readers()[name], CASES[name]
    assert len(inspect.getsource(kind).splitlines()) <= 10
    torch.manual_seed(0)
    plain = trained(tmp_path / "plain", **choice)
    torch.manual_seed(0)
    other = trained(tmp_path / "other", **choice, **{setting: value})
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    step = tmp_path / "other" / "checkpoints" / "step_5"
    assert json.loads((step / "trainer.json").read_text())["cfg"][setting] == value
    again = AbstractSparseAutoEncoder.from_config(other.cfg)
    trainer = Trainer.from_checkpoint(again, step)
    assert getattr(trainer.cfg, setting) == value
    trainer.cfg = trainer.cfg.model_copy(update={"exp_result_path": str(tmp_path / "again")})
    trainer.fit(again, batches(10)[5:])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
    cfg = build(TrainerConfig, choice | {setting: value, "from_pretrained_path": str(step)})
    with pytest.raises(CheckpointError, match=setting):
        Trainer(cfg.model_copy(update={setting: type(value)(value / 3 + 2)})).fit(again, batches(1))


@pytest.mark.parametrize("name", CASES)
def test_its_mistakes_are_told_in_one_line(name: str) -> None:
    readers()
    setting, choice, value = CASES[name]
    wrong: list[tuple[dict[str, Any], str]] = [
        (choice | {setting: "much"}, f"{setting}: must be a valid"),
        (choice | {setting: -1}, f"{setting}: must be greater than"),
        (choice | {setting: True}, f"{setting}=True: must be a number, not a switch"),
        (choice | {setting[:-1]: value}, f"unknown key '{setting[:-1]}' in TrainerConfig; did you mean '{setting}'"),
        ({setting: value}, rf"{setting}={value} has no effect: .*; remove it"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message) as told:
            build(TrainerConfig, settings)
        assert "\n" not in str(told.value)
    assert getattr(build(TrainerConfig, choice), setting) == readers()[name].model_fields[setting].default


def test_a_step_of_the_initialisation_is_one_class_with_its_setting(tmp_path: Path) -> None:
    assert len(inspect.getsource(readers()["Shift"]).splitlines()) <= 12
    with pytest.raises(ConfigError, match="encoder_bias_shift: must be less than or equal to 0"):
        build(InitializerConfig, {"encoder_bias_shift": 1.0})
    plain = trained(tmp_path / "plain", lr=0.0)
    shifted = trained(tmp_path / "shifted", {"encoder_bias_shift": -0.5}, lr=0.0)
    assert torch.equal(shifted.get_parameter("b_E"), plain.get_parameter("b_E") - 0.5)
    assert build(InitializerConfig, {"encoder_bias_shift": -1}).to_json()["encoder_bias_shift"] == -1


def test_a_logger_is_one_class_with_its_setting(tmp_path: Path) -> None:
    assert len(inspect.getsource(readers()["Lines"]).splitlines()) <= 10
    data = training(make_place(tmp_path), tmp_path / "run") | {"loggers": ["lines"], "lines": {"separator": " | "}}
    del data["eval"]
    train_from_config(data)
    lines = (tmp_path / "run" / "lines.txt").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["4", "8", "12"]
    assert all(math.isfinite(float(line.split(" | ")[1])) for line in lines)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["lines"] == {"separator": " | "}
    for table, message in (({"separator": ""}, "lines.separator: "), ({"seperator": ";"}, "did you mean 'separator'")):
        with pytest.raises(ConfigError, match=message):
            train_from_config(data | {"lines": table})


def test_all_are_listed(lm_saes_command: Run) -> None:
    readers()
    code, out, _ = lm_saes_command("settings", "train", "--kind", "clt")
    assert code == 0
    for line, help_text in {
        "trainer.square_weight: float = 1.0": "[count-of-squares] Weight of each square.",
        "trainer.stair_steps: int = 5": "[staircase] Steps after which the rate is halved.",
        "trainer.sgd_momentum: float = 0.0": "[sgd] Momentum of plain descent.",
        "initializer.encoder_bias_shift: float = 0.0": "[shift] What is added to every encoder bias at the end.",
        "lines.separator: str = ','": "What stands between numbers.",
    }.items():
        assert f"{line}\n    {help_text}" in out
    assert "trainer.optimizer_class: 'adam' | 'sparseadam' | 'sgd' = 'adam'" in out
    assert "sae.hook_points_in: list[str] (required)" in out and "sae.hook_point_in:" not in out


def test_a_kind_that_is_none(lm_saes_command: Run) -> None:
    code, _, err = lm_saes_command("settings", "train", "--kind", "vae")
    assert code == 2 and err.startswith("lm-saes: error: ") and err.count("\n") == 1 and "'vae'" in err
