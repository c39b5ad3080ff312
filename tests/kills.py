"""Kills a real run with SIGKILL again and again, some of the times in the middle of a save, and resumes it each time.

    python -m tests.kills --kills 100

In the end weights, optimizer, statistics and reports have to be, bit for bit, those of a run that nobody killed. Kills
are timed by what the run has done (reports written, a draft of a checkpoint on disk), not by the clock alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lm_saes import ActivationWriter, ActivationWriterConfig
from lm_saes.training.checkpoint import saved_steps

from .tiny_run import HOOK, make_place, reading

ROOT = Path(__file__).parents[1]
OTHER = "blocks.1.hook_resid_post"
BATCH, STEPS_A_KILL, STEPS_A_SAVE = 32, 40, 12
GIVE_UP = 120.0
"""Seconds without what is waited for, after which something is wrong."""


def make_cache(path: Path) -> Path:
    """48 contexts of 16 tokens in four shards, some tokens masked, at two hook points: sums of few directions."""
    g = torch.Generator().manual_seed(4)
    directions = torch.randn(24, 16, generator=g)
    stream = []
    for i in range(4):
        strength = (torch.rand(12, 16, 24, generator=g) < 0.15) * (torch.rand(12, 16, 24, generator=g) + 0.5)
        x = strength @ directions + 0.05 * torch.randn(12, 16, 16, generator=g)
        tokens = torch.arange(192).view(12, 16) + 192 * i
        stream.append(
            {HOOK: x, OTHER: x.roll(3, -1) + 0.1, "tokens": tokens, "mask": torch.rand(12, 16, generator=g) < 0.9}
        )
    cfg = ActivationWriterConfig(cache_dir=path, hook_points=[HOOK, OTHER], n_samples_per_chunk=12)
    return ActivationWriter(cfg).process(stream)


def _cached(place: Path, hooks: list[str], **factory: Any) -> dict[str, Any]:
    source = {"type": "activations", "path": str(place / "cache"), "epochs": None}
    return {
        "activation_factory": {"sources": [source], "target": "activations-1d", "hook_points": hooks,
                               "batch_size": BATCH, "num_workers": 2, **factory}
    }  # fmt: skip


def _text(place: Path, hooks: list[str], **factory: Any) -> dict[str, Any]:
    data = reading(place, hooks)
    data["activation_factory"] |= {"batch_size": BATCH, "num_workers": 1, **factory}
    data["activation_factory"]["sources"][0]["epochs"] = None
    return data


def _sae(act_fn: str, **more: Any) -> dict[str, Any]:
    k = {"top_k": 3} if "topk" in act_fn else {}
    return (
        {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": 16, "expansion_factor": 4, "act_fn": act_fn}
        | k
        | more
    )


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    # cached activations in a shuffle buffer, run ahead; k goes down; dead latents are revived
    "topk": lambda place: _cached(place, [HOOK], buffer_size=300) | {
        "sae": _sae("topk"),
        "trainer": {"auxk_coefficient": 0.1, "k_aux": 8, "dead_threshold": 200, "initial_k": 12, "k_warmup_steps": 0.7},
    },
    # a language model that reads text, over and over, into a shuffle buffer
    "batchtopk": lambda place: _text(place, [HOOK]) | {
        "sae": _sae("batchtopk"), "trainer": {"clip_grad_norm": 1.0}, "initializer": {"grid_search_init_norm": True},
    },
    # cached activations, each epoch in an order of its own; saved by the clock besides, only the last of those kept
    "jumprelu": lambda place: _cached(place, [HOOK], buffer_size=10_000, num_workers=0) | {
        "sae": _sae("jumprelu"), "initializer": {"init_log_jumprelu_threshold_value": -1.0},
        "trainer": {"sparsity_loss_type": "tanh-quad", "l1_coefficient": 0.01, "lp_coefficient": 0.001,
                    "save_every_minutes": 0.001, "keep_last": 1},
    },
    # two hook points, in the order of the cache, two batches a step
    "crosscoder": lambda place: _cached(place, [HOOK, OTHER]) | {
        "sae": {"sae_type": "crosscoder", "hook_points": [HOOK, OTHER], "d_model": 16, "expansion_factor": 4,
                "act_fn": "batchtopk", "top_k": 3},
        "trainer": {"gradient_accumulation_steps": 2, "optimizer_class": "sparseadam"},
    },
}  # fmt: skip


@dataclass
class Outcome:
    """What the kills met with."""

    kills: int = 0
    in_a_save: int = 0
    """Kills that left the draft of a checkpoint behind."""
    starting: int = 0
    """Kills while the run was starting or resuming."""
    reached: list[int] = field(default_factory=list)
    """The last step reported before each kill."""


def settings(case: str, place: Path, run: Path, steps: int, **trainer: Any) -> dict[str, Any]:
    """The config of a run of `steps` steps that reports each of them."""
    data = CASES[case](place)
    tokens = BATCH * data["trainer"].get("gradient_accumulation_steps", 1)
    data["trainer"] = {
        "total_training_tokens": steps * tokens, "log_frequency": 1, "eval_frequency": 10**9, "amp_dtype": "none",
        "lr": 3e-3, "lr_warm_up_steps": 0.1, "feature_sampling_window": 7,
        "exp_result_path": str(run), **data["trainer"], **trainer,
    }  # fmt: skip
    return data | {"loggers": [], "seed": 1}


def survive(case: str, place: Path, kills: int, seed: int = 0) -> Outcome:
    """Run `case` once in peace and once killed `kills` times; raises unless both end the same."""
    steps = STEPS_A_KILL * kills + STEPS_A_SAVE
    peaceful, killed = place / f"{case}-peaceful", place / f"{case}-killed"
    calm = settings(case, place, peaceful, steps, n_checkpoints=1)
    for name in ("save_every_minutes", "keep_last"):
        calm["trainer"].pop(name, None)
    reference = _start(place, f"{case}-peaceful", calm)
    _finish(reference, _log(place, f"{case}-peaceful"))
    saves = {"n_checkpoints": steps // STEPS_A_SAVE, "check_point_save_mode": "linear"}
    config = settings(case, place, killed, steps, **saves)
    dice, outcome = random.Random(f"{case} {seed}"), Outcome()
    while outcome.kills < kills:
        process = _start(place, f"{case}-killed", config, resume=(killed / "settings.json").exists())
        _kill(process, killed, dice, outcome, _log(place, f"{case}-killed"))
    last = _start(place, f"{case}-killed", config, resume=True)
    _finish(last, _log(place, f"{case}-killed"))
    assert_same(peaceful, killed)
    drafts = [path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not drafts, f"left behind: {drafts}"
    return outcome


def _kill(process: subprocess.Popen[bytes], run: Path, dice: random.Random, outcome: Outcome, log: Path) -> None:
    """Wait for a moment, and kill."""
    if outcome.kills % 7 == 5:  # while it starts
        before = _reported(run)
        time.sleep(dice.uniform(0.0, 4.0))
        outcome.starting += _reported(run) == before
    elif outcome.in_a_save <= outcome.kills // 2:
        old = set(_drafts(run))  # of a kill before, not yet swept away
        _wait(process, lambda: bool(set(_drafts(run)) - old) if old else bool(_drafts(run)))
        time.sleep(dice.choice([0.0, 0.001, 0.002, 0.004]))
    else:
        first = _reported(run)
        _wait(process, lambda: _reported(run) != first)  # it has begun; a resumed run drops lines first
        more = _reported(run) + dice.randrange(STEPS_A_KILL)
        _wait(process, lambda: _reported(run) >= more)
        time.sleep(dice.uniform(0.0, 0.01))
    process.kill()
    if process.wait() != -9:
        raise AssertionError(f"the run had ended before kill {outcome.kills + 1}: {log.read_text()[-2000:]}")
    outcome.kills += 1
    outcome.in_a_save += bool(_drafts(run))
    outcome.reached.append(_reported(run))


def _drafts(run: Path) -> list[tuple[str, int]]:
    """The drafts of checkpoints, each with its directory's number (a new one of the same name has another)."""
    try:
        with os.scandir(run / "checkpoints") as entries:
            return [(entry.name, entry.inode()) for entry in entries if entry.name.startswith(".step_")]
    except FileNotFoundError:
        return []


def _reported(run: Path) -> int:
    """The last step that `metrics.jsonl` has."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
        return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
    except FileNotFoundError:
        return 0


def _wait(process: subprocess.Popen[bytes], done: Callable[[], bool]) -> None:
    since = time.monotonic()
    while not done() and process.poll() is None:
        if time.monotonic() - since > GIVE_UP:
            process.kill()
            raise AssertionError(f"nothing happened for {GIVE_UP:.0f} s")
        time.sleep(0.0002)


def _start(place: Path, name: str, config: dict[str, Any], resume: bool = False) -> subprocess.Popen[bytes]:
    file = place / f"{name}.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "lm_saes", "train", str(file), *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with _log(place, name).open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _log(place: Path, name: str) -> Path:
    return place / f"{name}.log"


def _finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait(600):
        raise AssertionError(f"{process.args} failed: {log.read_text()[-2000:]}")


def assert_same(one: Path, two: Path) -> None:
    """Raise unless the last checkpoints, the dictionaries and the reports of two runs are the same, bit for bit."""
    last = [list(saved_steps(run).values())[-1] for run in (one, two)]
    assert last[0].name == last[1].name, last
    for name in ("sae_weights", "optimizer", "state"):
        contents = [(step / f"{name}.safetensors").read_bytes() for step in last]
        assert contents[0] == contents[1], f"{name} differs"
    assert (one / "sae_weights.safetensors").read_bytes() == (two / "sae_weights.safetensors").read_bytes()
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    plain = [
        [{k: v for k, v in row.items() if k not in ("time", "details/tokens_per_second")} for row in run]
        for run in rows
    ]
    assert plain[0] == plain[1], "metrics.jsonl differs"
    assert [row["step"] for row in rows[1]] == list(range(1, len(rows[1]) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills of each case (default 100)")
    parser.add_argument("--case", choices=CASES, action="append", help="which (default: all); may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as directory:
            place, since = make_place(Path(directory)), time.monotonic()
            make_cache(place / "cache")
            outcome = survive(case, place, arguments.kills, arguments.seed)
        print(
            f"{case}: {outcome.kills} kills, {outcome.in_a_save} in a save and {outcome.starting} while starting; "
            f"the same to the bit ({time.monotonic() - since:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
