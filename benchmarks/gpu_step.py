"""Time the training step of an autoencoder on a CUDA device against the one product that it cannot do without.

    python benchmarks/gpu_step.py                        on a CUDA device
    python benchmarks/gpu_step.py --device cpu --quick   a smoke test: does it run?

`benchmarks/gpu.sh` runs this after `gpu_kernels.py`; both print lines of one table. The reference is the encoder's
product in bfloat16; the step is the trainer's, with mixed precision and default settings. Then it lists where the host
waits for the device in a step; with the fused Adam it fails if there is such a place.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_kernels import Setting, header, median_ms, product_peak, row, share_of_peak
from torch import Tensor

from lm_saes import SAEConfig, SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.config import build

HOOK = "activations"


@dataclass(frozen=True)
class Case:
    """One training run."""

    setting: Setting
    optimizer: str = "adam"
    compute: str | None = "bfloat16"
    act_fn: str = "topk"
    auxk: bool = False

    @property
    def name(self) -> str:
        auxk = ", AuxK" if self.auxk else ""
        return f"step, {self.act_fn}{auxk}, {self.optimizer}, {self.compute or 'float32'}"


SMALL, LARGE = Setting(768, 24576, 32, 8192), Setting(4096, 131072, 64, 8192)
CASES = [
    Case(SMALL), Case(SMALL, auxk=True), Case(SMALL, act_fn="batchtopk"), Case(SMALL, "sparseadam"),
    Case(LARGE), Case(LARGE, act_fn="batchtopk"), Case(LARGE, "sparseadam"),
]  # fmt: skip
QUICK = [Case(Setting(24, 600, 5, 64), compute=None, act_fn=act_fn, auxk=True) for act_fn in ("topk", "batchtopk")]


class Done(Exception):
    """Enough steps were timed; saves the time of writing the dictionary out."""


class Clock:
    """Yields batches that are on the device already, and marks the time between them; then looks for waits."""

    def __init__(self, batches: list[Tensor], device: str, warm: int, steps: int, watched: int) -> None:
        self.batches, self.device = batches, device
        self.warm, self.steps, self.watched = warm, steps, watched
        self.marks: list[torch.cuda.Event | float] = []
        self.waits: Counter[str] = Counter()
        self.peak_bytes = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.warm):
            yield self._batch(step)
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for step in range(self.steps + 1):
            self._mark()
            yield self._batch(step)
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated()
            yield from self._watch()
        raise Done

    def _watch(self) -> Iterator[dict[str, Tensor]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for step in range(self.watched):
                    yield self._batch(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.waits.update(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message).lower()
        )

    def _batch(self, step: int) -> dict[str, Tensor]:
        x = self.batches[step % len(self.batches)]
        return {HOOK: x, "tokens": torch.zeros(len(x), dtype=torch.int64)}

    def _mark(self) -> None:
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    @property
    def median_ms(self) -> float:
        between = [
            (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)  # type: ignore[operator, arg-type]
            for a, b in zip(self.marks, self.marks[1:], strict=False)
        ]
        return sorted(between)[len(between) // 2]


def dictionary(s: Setting, act_fn: str, device: str, batch: Tensor) -> SparseAutoEncoder:
    """A freshly initialised autoencoder on the device."""
    cfg = build(SAEConfig, {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": s.width, "act_fn": act_fn,
                            "expansion_factor": s.n_latents / s.width, "top_k": s.k, "device": device})  # fmt: skip
    sae = SparseAutoEncoder.from_config(cfg)
    bound = 1 / s.width**0.5
    sae.init_parameters(
        encoder_uniform_bound=bound, decoder_uniform_bound=bound, init_log_jumprelu_threshold_value=None
    )
    sae.set_dataset_average_activation_norm({HOOK: float(batch.norm(dim=1).mean())})
    return sae


def measure(case: Case, device: str, warm: int, steps: int, watched: int) -> Clock:
    """Train for a few steps."""
    s = case.setting
    torch.manual_seed(0)
    mixing = torch.randn(2 * s.width, s.width, device=device)
    batches = [torch.relu(torch.randn(s.n_tokens, 2 * s.width, device=device) - 1.5) @ mixing for _ in range(4)]
    clock = Clock(batches, device, warm, steps, watched)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            build(TrainerConfig, {
                "total_training_tokens": s.n_tokens * 10_000, "amp_dtype": case.compute, "n_checkpoints": 0,
                "lr_warm_up_steps": 0, "optimizer_class": case.optimizer, "exp_result_path": directory,
                "log_frequency": 10_000, "auxk_coefficient": 1 / 32 if case.auxk else None,
            })
        )  # fmt: skip
        with contextlib.suppress(Done):
            trainer.fit(dictionary(s, case.act_fn, device, batches[0]), clock)
    return clock


def report(case: Case, device: str, warm: int, steps: int, peak: float) -> bool:
    """Print the step's line, and the lines of source where the host waits for the device; whether that is as wanted."""
    s, watched = case.setting, 2
    clock = measure(case, device, warm, steps, watched)
    x, W = (torch.randn(*shape, device=device).bfloat16() for shape in ((s.n_tokens, s.width), (s.width, s.n_latents)))
    out = torch.empty(s.n_tokens, s.n_latents, dtype=torch.bfloat16, device=device)
    floor = median_ms(lambda: torch.mm(x, W, out=out), device, 3 if device == "cpu" else 20)
    kept = 4 * 4 * 2 * s.width * s.n_latents  # weights, gradients and two moments, in float32
    note = share_of_peak(s, clock.median_ms, peak)
    if device == "cuda":
        most, beyond = clock.peak_bytes / 2**30, (clock.peak_bytes - kept) / 2**30
        note += f", peak {most:.1f} GiB ({beyond:.1f} beyond weights, gradients and moments)"
    print(row(case.name, s, clock.median_ms, floor, note), flush=True)
    for place, count in sorted(clock.waits.items()):
        print(f"    waits for the device at {place}, {count / watched:g} times a step", flush=True)
    return not clock.waits or case.optimizer != "adam"


def main() -> None:
    """Print one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny size and few steps: does it run?")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-header", action="store_true", help="the lines alone, to go on with a table")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: run it on a machine with one, or try `--device cpu --quick`")
    logging.disable(logging.WARNING)
    if not arguments.no_header:
        print(header(), flush=True)
    peak = product_peak(arguments.device, 64 if arguments.quick else 8192)
    warm, steps = (2, 3) if arguments.quick else (5, arguments.steps)
    cases = QUICK if arguments.quick else CASES
    fine = [report(case, arguments.device, warm, steps, peak) for case in cases]
    if not all(fine):
        sys.exit("a step with the fused Adam waits for the device")


if __name__ == "__main__":
    main()
