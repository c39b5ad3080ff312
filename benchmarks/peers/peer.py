"""What the scripts of all tools share: the configurations, and how a run is timed and handed to `run.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

from timing import Clock, activations, peak_of_process

WARM = 3


@dataclass(frozen=True)
class Setting:
    """One configuration."""

    title: str
    act_fn: str
    d_sae: int
    d_model: int = 576
    n_tokens: int = 2048
    k: int = 32

    def scaled_down(self) -> Setting:
        """The same at a size for a smoke test."""
        return Setting(self.title, self.act_fn, self.d_sae // 36, 64, 128, 8)


SETTINGS = {
    "A": Setting("TopK k=32, F=9216", "topk", 9216),
    "B": Setting("BatchTopK k=32, F=9216", "batchtopk", 9216),
    "C": Setting("JumpReLU, F=9216", "jumprelu", 9216),
    "D": Setting("ReLU + L1, F=9216", "relu", 9216),
    "E": Setting("TopK k=32, F=36864", "topk", 36864),
}


def speed(train: Callable[[Setting, Clock], None]) -> None:
    """Time what `train` does with the clock's batches; print times and memory as one line of JSON.

    `train` has to take all batches in order: one step each, `clock.n_steps + 1` of them.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=SETTINGS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    setting = SETTINGS[given.config]
    setting = setting.scaled_down() if given.quick else setting
    clock = Clock(activations(8, setting.n_tokens, setting.d_model), setting.d_sae, WARM, given.steps)
    before = peak_of_process()
    train(setting, clock)
    peak = peak_of_process()
    assert len(clock.times) == given.steps, f"{len(clock.times)} steps were timed, not {given.steps}"
    print(json.dumps({"times": clock.times, "floors": clock.floors, "peak": peak, "training": peak - before}))
