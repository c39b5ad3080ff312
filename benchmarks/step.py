"""Time a training step against its floor, the single encoder product `x[B, d] @ W[d, F]` in float32.

    python benchmarks/step.py                     every configuration, and how the step grows with F and B
    python benchmarks/step.py --only jumprelu     those with this in their name
    python benchmarks/step.py --quick             a smoke test at small size

Each configuration has a process of its own. In it step and floor alternate, so that both see the same state of a noisy
machine; medians are compared. Activations are in memory; gating, dataset-wise normalisation, dead counts and metrics
are on, as by default. Beside each ratio stands its bar, the largest that it is to be. `density` is the share of active
latents before and after the run (and of further entries in JumpReLU's window) on batches that are trained on.

Memory is the largest resident size during the steps, less what is there before the first (weights, batches, the floor's
tensors), gradients and optimizer state; buffers of the math library count. `in use` is of a few steps that give freed
memory back at once; `resident` is of the timed ones, which keep freed memory, as `lm-saes train` does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import logging
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from cases import CASES, Case, as_batch, densities, dictionary, shrink_some
from timing import Clock, activations, peak_memory, return_freed_memory, watch_memory
from torch import Tensor

from lm_saes import SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.config import build
from lm_saes.machine import cpu_computes_in, keep_freed_memory

DEAD_SHARE = 0.1
LONG_AGO = 1 << 40


class Done(Exception):
    """Enough steps were timed; saves the time of writing the dictionary out."""


@dataclass(frozen=True)
class Result:
    """What one configuration took."""

    step: float
    """Median seconds."""
    floor: float
    extra: float | None
    """Median seconds that AuxK adds."""
    in_use: int | None
    """Bytes."""
    resident: int | None
    notes: str


def stream(clock: Clock, trainer: Trainer, dead_F: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """The clock's batches; with `dead_F`, these latents count as dead in every other step (those of odd number)."""
    for step, x in enumerate(clock):
        waited, is_dead = trainer.tokens_since_last_activation, trainer.is_dead
        if dead_F is not None and waited is not None and is_dead is not None:
            assert step % 2 or step == 0 or bool((waited[dead_F] > LONG_AGO).all()), "a dead latent was active"
            waited[dead_F] = LONG_AGO if step % 2 else 0
            is_dead[dead_F] = bool(step % 2)
        yield as_batch(x)
    raise Done


def train(case: Case, sae: SparseAutoEncoder, clock: Clock, dead_F: Tensor | None = None) -> int | None:
    """Train as the clock says; the peak in bytes beyond weights, gradients and optimizer state (None: unknown)."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            build(TrainerConfig, {
                "total_training_tokens": case.n_tokens * 1_000_000, "amp_dtype": None, "n_checkpoints": 0,
                "lr_warm_up_steps": 0, "lr_cool_down_steps": 0, "exp_result_path": directory, **case.trainer,
            })
        )  # fmt: skip
        before = watch_memory()
        with contextlib.suppress(Done):
            trainer.fit(sae, stream(clock, trainer, dead_F))
        if before is None or trainer.optimizer is None:
            return None
        state = [t for of_one in trainer.optimizer.state.values() for t in of_one.values() if isinstance(t, Tensor)]
        return peak_memory() - before - sum(t.nbytes for t in (*sae.parameters(), *state))


def measure(case: Case, d_model: int, warm: int, steps: int) -> Result:
    """Memory of a few steps, then time of others."""
    return_freed_memory()
    batches = activations(min(24, warm + steps), case.n_tokens, d_model)
    sae = dictionary(case, batches)
    dead_F = None if case.auxk_bar is None else shrink_some(sae, DEAD_SHARE)
    judged = case.act_fn in ("relu", "jumprelu")
    shares = [densities(sae, batches[:4])] if judged else []
    in_use = train(case, copy.deepcopy(sae), Clock(batches, case.d_sae, 0, 3), dead_F)
    keep_freed_memory()
    sae, twice = copy.deepcopy(sae), 1 if dead_F is None else 2
    clock = Clock(batches, case.d_sae, twice * warm, twice * steps)
    resident = train(case, sae, clock, dead_F)
    shares += [densities(sae, batches[:4])] if judged else []
    floor = statistics.median(clock.floors)
    if dead_F is None:
        notes = "density " + " to ".join(f"{active:.2%}" for active, _ in shares) if shares else ""
        notes += f", window +{shares[-1][1]:.2%}" if case.act_fn == "jumprelu" else ""
        return Result(statistics.median(clock.times), floor, None, in_use, resident, notes)
    step, without = statistics.median(clock.times[1::2]), statistics.median(clock.times[::2])
    return Result(step, floor, step - without, in_use, resident, "")


def prepare() -> None:
    """Train a little: what is loaded at first use is no part of any configuration's memory."""
    logging.disable(logging.WARNING)
    measure(CASES[0].scaled_down(), 64, 1, 1)
    gc.freeze()  # what is loaded by now: later collections need not look through it


COLUMNS = (("configuration", -33), ("F", 6), ("B", 5), ("step", 10), ("floor", 10), ("ratio", 6), ("bar", 4),
           ("tokens/s", 9), ("in use", 8), ("resident", 9))  # fmt: skip


def line(cells: list[str]) -> str:
    """One line of the table; what is left over stands behind it."""
    aligned = [f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, (_, w) in zip(cells, COLUMNS, strict=False)]
    return " ".join([*aligned, *("  " + note for note in cells[len(COLUMNS) :] if note)])


def report(case: Case, result: Result) -> str:
    """The line of one configuration."""
    notes = result.notes
    if result.extra is not None:
        notes = f"+{result.extra / result.floor:.2f} floors over the same without (bar {case.auxk_bar:g})"
    if case.memory_bar is not None:
        notes = f"memory bar {case.memory_bar} MB"
    memory = ["" if n is None else f"{n / 1e6:,.0f} MB" for n in (result.in_use, result.resident)]
    return line([
        case.name, str(case.d_sae), str(case.n_tokens), f"{result.step * 1e3:.1f} ms", f"{result.floor * 1e3:.1f} ms",
        f"{result.step / result.floor:.2f}", "" if case.bar is None else f"{case.bar:g}",
        f"{case.n_tokens / result.step:,.0f}", *memory, notes,
    ])  # fmt: skip


def growth(results: dict[Case, Result], axis: str, fixed: str) -> Iterator[str]:
    """How the step of the first configuration grows from one size to the next."""
    same = [case for case in results if case.name == CASES[0].name]
    usual = statistics.mode(getattr(case, fixed) for case in same) if same else 0
    chosen = sorted((case for case in same if getattr(case, fixed) == usual), key=lambda case: getattr(case, axis))
    for small, large in itertools.pairwise(chosen):
        sizes = [getattr(case, axis) for case in (small, large)]
        step, floor = (getattr(results[large], t) / getattr(results[small], t) for t in ("step", "floor"))
        yield (f"{small.name}, {'F' if axis == 'd_sae' else 'B'} {sizes[0]} to {sizes[1]}: step x {step:.2f}, "
               f"bar x {sizes[1] / sizes[0]:.2f}, floor x {floor:.2f}")  # fmt: skip


def main() -> None:
    """Print one line a configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few steps: does it run?")
    parser.add_argument("--only", default="", metavar="NAME", help="part of the names of the configurations to time")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    chosen = [case for case in CASES if given.only.lower() in f"{case.name} F={case.d_sae} B={case.n_tokens}".lower()]
    if not chosen:
        parser.error(f"--only {given.only}: no configuration has this in its name, F=... and B=... included")
    d_model = 64 if given.quick else 576
    can = "" if cpu_computes_in(torch.bfloat16) else "; no bfloat16 instructions, so its bar does not apply"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, d={d_model}{can}")
    print(line([name for name, _ in COLUMNS]), flush=True)
    results: dict[Case, Result] = {}
    if given.quick:
        prepare()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, max_tasks_per_child=1) as pool:
        for case in (case.scaled_down() if given.quick else case for case in chosen):
            results[case] = (
                measure(case, d_model, 2, 2) if given.quick
                else pool.submit(measure, case, d_model, 4, given.steps).result()
            )  # fmt: skip
            print(report(case, results[case]), flush=True)
    for text in (*growth(results, "d_sae", "n_tokens"), *growth(results, "n_tokens", "d_sae")):
        print(text)


if __name__ == "__main__":
    main()
