"""Time a training step against its floor, the single encoder product `x[B, d] @ W[d, F]` in float32.

    python benchmarks/step.py            every configuration
    python benchmarks/step.py --quick    a smoke test at small size

Step and floor alternate in one process, so that both see the same state of a noisy machine; medians are compared.
Activations are in memory; gating, dataset-wise normalisation, dead counts and metrics are on, as by default.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lm_saes import SAEConfig, SparseAutoEncoder, Trainer, TrainerConfig
from lm_saes.config import build
from lm_saes.memory import keep_freed_memory

HOOK = "activations"


@dataclass(frozen=True)
class Case:
    """One configuration of the benchmark."""

    name: str
    act_fn: str
    d_sae: int
    amp_dtype: str | None = None


CASES = [
    Case("TopK k=32", "topk", 9216),
    Case("TopK k=32", "topk", 36864),
    Case("TopK k=32, bfloat16", "topk", 9216, "bfloat16"),
    Case("BatchTopK k=32", "batchtopk", 9216),
    Case("JumpReLU + tanh-quad, at start", "jumprelu", 9216),
    Case("ReLU + L1, at start", "relu", 9216),
]


class Clock:
    """Yields batches and times what happens between two of them, and the floor before each."""

    def __init__(self, batches: list[torch.Tensor], d_sae: int, steps: int) -> None:
        self.batches, self.steps = batches, steps
        n_tokens, d_model = batches[0].shape
        self.x, self.W, self.out = (
            torch.randn(n_tokens, d_model),
            torch.randn(d_model, d_sae),
            torch.empty(n_tokens, d_sae),
        )
        self.floors: list[float] = []
        self.times: list[float] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.steps):
            start = time.perf_counter()
            torch.mm(self.x, self.W, out=self.out)
            served = time.perf_counter()
            self.floors.append(served - start)
            x = self.batches[step % len(self.batches)]
            yield {HOOK: x, "tokens": torch.zeros(len(x), dtype=torch.int64)}
            self.times.append(time.perf_counter() - served)


def measure(case: Case, n_tokens: int, d_model: int, d_sae: int, steps: int, warm: int) -> tuple[float, float]:
    """Median seconds of a step and of the floor."""
    torch.manual_seed(0)
    mixing = torch.randn(2 * d_model, d_model)
    batches = [torch.relu(torch.randn(n_tokens, 2 * d_model) - 1.5) @ mixing for _ in range(8)]
    settings: dict[str, object] = {"act_fn": case.act_fn}
    if "topk" in case.act_fn:
        settings["top_k"] = min(32, d_sae // 4)
    cfg = build(SAEConfig, {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": d_model,
                            "expansion_factor": d_sae / d_model, **settings})  # fmt: skip
    sae = SparseAutoEncoder(cfg)
    bound = 1 / d_model**0.5
    threshold = -1.0 if case.act_fn == "jumprelu" else None
    sae.init_parameters(
        encoder_uniform_bound=bound, decoder_uniform_bound=bound, init_log_jumprelu_threshold_value=threshold
    )
    sae.set_dataset_average_activation_norm({HOOK: float(batches[0].norm(dim=1).mean())})
    sparsity = {"jumprelu": "tanh-quad", "relu": "power"}.get(case.act_fn)
    clock = Clock(batches, d_sae, warm + steps)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            build(TrainerConfig, {
                "total_training_tokens": n_tokens * (warm + steps), "amp_dtype": case.amp_dtype, "n_checkpoints": 0,
                "lr_warm_up_steps": 0, "sparsity_loss_type": sparsity, "exp_result_path": directory,
            })
        )  # fmt: skip
        trainer.fit(sae, clock)
    return statistics.median(clock.times[warm:]), statistics.median(clock.floors[warm:])


def main() -> None:
    """Print one line a configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few steps: does it run?")
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    keep_freed_memory()
    n_tokens, d_model, steps, warm = (128, 64, 2, 1) if arguments.quick else (2048, 576, arguments.steps, 4)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, d={d_model}, B={n_tokens}")
    print(f"{'configuration':34}{'F':>7}{'step':>11}{'floor':>11}{'ratio':>8}{'tokens/s':>11}")
    for case in CASES:
        d_sae = 512 if arguments.quick else case.d_sae
        step, floor = measure(case, n_tokens, d_model, d_sae, steps, warm)
        times = f"{step * 1e3:>8.1f} ms{floor * 1e3:>8.1f} ms{step / floor:>8.2f}{n_tokens / step:>11,.0f}"
        print(f"{case.name:34}{d_sae:>7}{times}", flush=True)


if __name__ == "__main__":
    main()
