"""At which density of active latents the sparse path stops paying: forward and backward of both, side by side.

    python benchmarks/density.py
    python benchmarks/density.py --quick     a smoke test at small size

`lm_saes.latents.selection.selector.SPARSE_BELOW` is set by what this prints.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lm_saes import SAEConfig
from lm_saes.config import build
from lm_saes.latents.activations.relu import ReLU
from lm_saes.latents.encode.linear import LinearEncoder, encode
from lm_saes.latents.selection.selector import Selector
from lm_saes.machine import keep_freed_memory


def seconds(x: torch.Tensor, encoder: LinearEncoder, W_FD: torch.Tensor, selector: Selector, dense: bool) -> float:
    """Time of one forward and backward pass."""
    start = time.perf_counter()
    code = encode(x, encoder, selector, None, None, dense=dense)
    (code.decode(W_FD) - x).square().sum().backward()
    elapsed = time.perf_counter() - start
    for p in (*encoder.parameters(), W_FD):
        if p is not None:
            p.grad = None
    return elapsed


def main() -> None:
    """Print the median times and their ratio for several densities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small size: does it run?")
    quick = parser.parse_args().quick
    keep_freed_memory()
    torch.manual_seed(0)
    n_tokens, d_model = (128, 64) if quick else (2048, 576)
    cfg = build(SAEConfig, {"hook_point_in": "x", "hook_point_out": "x", "d_model": d_model, "expansion_factor": 16})
    d_sae = cfg.d_sae
    selector = Selector(ReLU(cfg.selection_settings))
    x = torch.randn(n_tokens, d_model)
    W_FD = torch.randn(d_sae, d_model).div_(d_model**0.5).requires_grad_()
    W_DF = W_FD.detach().clone().T.requires_grad_()
    print(f"{'density':>8}{'sparse':>12}{'dense':>12}{'sparse/dense':>14}")
    for density in (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12):
        bias = -(2**0.5) * torch.erfinv(torch.tensor(1 - 2 * density))
        encoder = LinearEncoder(W_DF, bias.expand(d_sae).clone().requires_grad_())
        runs = [
            [seconds(x, encoder, W_FD, selector, dense) for dense in (False, True)] for _ in range(4 if quick else 8)
        ][2:]
        sparse, dense = (statistics.median(times) for times in zip(*runs, strict=True))
        print(f"{density:>8.1%}{sparse * 1e3:>9.0f} ms{dense * 1e3:>9.0f} ms{sparse / dense:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
