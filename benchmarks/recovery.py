"""Train on activations made from a known dictionary and say how much of it comes back.

    python benchmarks/recovery.py                 the large problem: 4,608 atoms in 576 dimensions, 500 steps
    python benchmarks/recovery.py --small         512 atoms in 128 dimensions, 400,000 samples
    python benchmarks/recovery.py --small --act-fn batchtopk --ungated

A sample is `sum_i a_i atom_i + noise`: atoms are random unit vectors, atom i is active with probability proportional to
`(i + 1)^-0.7`, amplitudes are `0.5 + Exponential(mean 0.5)`. Scored on samples that were not trained on: FVU, the share
of atoms with a decoder row of cosine above 0.9, the mean over atoms of the largest cosine, and latents that never fire.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lm_saes import Initializer, InitializerConfig, SAEConfig, Trainer, TrainerConfig
from lm_saes.config import build
from lm_saes.machine import keep_freed_memory

HOOK = "activations"
HELD_OUT = 1_000_000
"""Number of the first batch that is never trained on."""


class KnownDictionary:
    """Activations from a known sparse dictionary; a batch depends on its number and the seed alone."""

    def __init__(self, d_model: int, n_atoms: int, mean_active: float, seed: int, noise: float = 0.01) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.seed, self.noise = seed, noise
        self.atoms_AD = nnf.normalize(torch.randn(n_atoms, d_model, generator=draw), dim=1)
        weight_A = torch.arange(1, n_atoms + 1, dtype=torch.float64) ** -0.7
        self.frequency_A = (weight_A * (mean_active / weight_A.sum())).clamp(max=0.95).float()

    def batch(self, number: int, size: int) -> Tensor:
        """Samples `[size, D]`."""
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + number)
        active_NA = torch.rand(size, len(self.atoms_AD), generator=draw) < self.frequency_A
        atoms_E, counts_N = active_NA.nonzero()[:, 1], active_NA.sum(1)
        amplitude_E = 0.5 + torch.empty(len(atoms_E)).exponential_(2.0, generator=draw)
        x_ND = nnf.embedding_bag(
            atoms_E, self.atoms_AD, counts_N.cumsum(0) - counts_N, mode="sum", per_sample_weights=amplitude_E
        )
        return x_ND + self.noise * torch.randn(x_ND.shape, generator=draw)


def batches(known: KnownDictionary, steps: int, size: int) -> Iterator[dict[str, Tensor]]:
    """What the trainer reads."""
    for number in range(steps):
        yield {HOOK: known.batch(number, size), "tokens": torch.zeros(size, dtype=torch.int64)}


def main() -> None:
    """Print one line with the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the small problem")
    parser.add_argument("--act-fn", default="topk", choices=["topk", "batchtopk"])
    parser.add_argument("--lr", type=float, default=None, help="2.5e-3, or 6e-3 for the small problem")
    parser.add_argument("--beta1", type=float, default=0.5)
    parser.add_argument("--cool-down", type=float, default=0.2, help="share of the steps")
    parser.add_argument("--ungated", action="store_true", help="select without regard to decoder norms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--auxk", type=float, default=0.0)
    given = parser.parse_args()
    d_model, n_atoms, mean_active, k, size = (128, 512, 8.0, 12, 1024) if given.small else (576, 4608, 20.0, 32, 2048)
    steps = given.steps or (390 if given.small else 500)
    lr = given.lr or (6e-3 if given.small else 2.5e-3)
    logging.disable(logging.WARNING)
    keep_freed_memory()
    known = KnownDictionary(d_model, n_atoms, mean_active, given.seed)
    torch.manual_seed(given.seed)
    cfg = build(SAEConfig, {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": d_model, "top_k": k,
                            "expansion_factor": n_atoms / d_model, "act_fn": given.act_fn,
                            "sparsity_include_decoder_norm": not given.ungated})  # fmt: skip
    stream = batches(known, steps, size)
    start = time.perf_counter()
    initializer = InitializerConfig(grid_search_init_norm=True, bias_init_method="geometric_median")
    sae = Initializer(initializer).initialize_sae_from_config(cfg, stream)
    auxk = {"auxk_coefficient": given.auxk, "k_aux": min(512, n_atoms // 2)} if given.auxk else {}
    with tempfile.TemporaryDirectory() as directory:
        trainer = build(TrainerConfig, {
            "total_training_tokens": steps * size, "amp_dtype": None, "lr": lr, "lr_warm_up_steps": 0.05,
            "lr_cool_down_steps": given.cool_down, "betas": (given.beta1, 0.999),
            "n_checkpoints": 0, "dead_threshold": 50_000, "exp_result_path": directory,
            **auxk,
        })  # fmt: skip
        Trainer(trainer).fit(sae, stream)
    seconds = time.perf_counter() - start
    error = total = 0.0
    fired_F = torch.zeros(sae.cfg.d_sae)
    mean_D = torch.cat([known.batch(HELD_OUT + i, size) for i in range(8)]).mean(0)
    with torch.no_grad():
        for i in range(64):
            x_ND = known.batch(HELD_OUT + i, size)
            batch = {HOOK: x_ND, "tokens": torch.zeros(size, dtype=torch.int64)}
            error += float((sae.reconstruct(batch) - x_ND).square().sum())
            total += float((x_ND - mean_D).square().sum())
            fired_F += sae.record(batch).counts
    rows_FD = dict(sae.named_parameters())["W_D"].detach()
    best_A = (nnf.normalize(rows_FD, dim=1) @ known.atoms_AD.T).amax(0)
    name = given.act_fn + (" ungated" if given.ungated else "")
    print(f"{name} lr={lr:g} seed={given.seed} steps={steps}: FVU {error / total:.3f}, "
          f"atoms recovered {float((best_A > 0.9).float().mean()):.1%}, mean max cosine {float(best_A.mean()):.3f}, "
          f"dead {float((fired_F == 0).float().mean()):.1%}, {seconds:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
