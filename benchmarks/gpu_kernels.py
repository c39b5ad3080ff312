"""Compare each Triton kernel with its plain twin and time both, on real shapes. Needs torch and triton alone.

    python benchmarks/gpu_kernels.py                        on a CUDA device
    python benchmarks/gpu_kernels.py --device cpu --quick   a smoke test: does it run? Plain against plain, or with
                                                            TRITON_INTERPRET=1 what Triton's interpreter does

`benchmarks/gpu.sh` runs this and the training step. Inputs are random, with one latent that is active on every token
and others that are active more often than the rest. An error is the 2-norm of the difference over that of the result.

Letters: B tokens, D width, F latents, E entries of the code, k active latents a token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lm_saes.latents.kernels import implementation, plain


@dataclass(frozen=True)
class Setting:
    """Sizes of a dictionary and its batch."""

    width: int
    n_latents: int
    k: int
    n_tokens: int

    def __str__(self) -> str:
        return f"d={self.width} F={self.n_latents} k={self.k} B={self.n_tokens}"


SETTINGS = [Setting(768, 24576, 32, 8192), Setting(4096, 131072, 64, 8192)]
QUICK = [Setting(24, 600, 5, 64)]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error: float32 sums in another order; results (and on one side perhaps sums) in bfloat16."""
WIDTHS = (40, 32, 11, 13, 8)


def kernels_for(device: str) -> ModuleType:
    """The implementation that is looked at."""
    return implementation("cuda" if os.environ.get("TRITON_INTERPRET") == "1" else device)


def header() -> str:
    """What stands above the table that this script and `gpu_step.py` share."""
    names = ("what", "sizes", "time", "reference", "ratio")
    left = "".join(f"{name:<{width}}" for name, width in zip(names[:2], WIDTHS[:2], strict=True))
    return left + "".join(f"{name:>{width}}" for name, width in zip(names[2:], WIDTHS[2:], strict=True))


def row(what: str, sizes: object, ms: float, reference_ms: float, note: str) -> str:
    """One line of it: times in milliseconds, the first over the second, and what else there is to say."""
    what, sizes = f"{what:<{WIDTHS[0]}}", f"{sizes!s:<{WIDTHS[1]}}"
    return f"{what}{sizes}{ms:>8.3f} ms{reference_ms:>10.3f} ms{ms / reference_ms:>8.2f}  {note}"


def median_ms(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, after two to warm up; on CUDA by events on the device."""
    for _ in range(2):
        function()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def difference(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|`, computed in float32 a part at a time."""
    parts = zip(got.flatten(0, -1).split(1 << 26), want.flatten(0, -1).split(1 << 26), strict=True)
    apart = size = 0.0
    for a, b in parts:
        apart += float((a.float() - b.float()).square().sum())
        size += float(b.float().square().sum())
    return (apart / size) ** 0.5 if size else apart**0.5


class Problem:
    """A dictionary in one type, and a batch with its code."""

    def __init__(self, setting: Setting, dtype: torch.dtype, device: str) -> None:
        s, make = setting, {"dtype": dtype, "device": device}
        torch.manual_seed(0)
        self.setting, self.dtype, self.device = setting, dtype, device
        self.W_FD = torch.randn(s.n_latents, s.width, **make) / s.width**0.5
        self.x_BD = torch.randn(s.n_tokens, s.width, **make)
        self.scale_F = torch.rand(s.n_latents, device=device) + 0.5
        self.shift_F = torch.randn(s.n_latents, device=device) * 0.3
        self.shift_F[7] = 100.0  # active on every token
        self.product_BF = self.x_BD @ self.W_FD.T
        columns_Bk = kernels_for(device).top_of_product(self.product_BF, self.scale_F, self.shift_F, s.k)
        self.indices_E = columns_Bk.flatten().int()
        self.weights_E = torch.rand(s.n_tokens * s.k, **make)
        self.offsets = torch.arange(0, s.n_tokens * s.k + 1, s.k, dtype=torch.int32, device=device)
        self.rows_E = torch.arange(s.n_tokens, dtype=torch.int32, device=device).repeat_interleave(s.k)
        self.order_E, self.segments = plain.transpose(self.indices_E, s.n_latents)

    def selected(self, columns_Bk: Tensor) -> Tensor:
        """The selected entries in order: equal for equally good selections."""
        product_Bk = self.product_BF.gather(1, columns_Bk).float()
        return (product_Bk * self.scale_F[columns_Bk] + self.shift_F[columns_Bk]).sort(1).values

    def adam_state(self) -> list[Tensor]:
        torch.manual_seed(1)
        return [self.W_FD.float(), torch.randn_like(self.W_FD).float(), torch.rand_like(self.W_FD).float()]


@dataclass(frozen=True)
class Case:
    """One function on one problem: what to call, what to compare, and the bytes that have to be moved."""

    name: str
    call: Callable[[Any], Any]
    """Called with the module of an implementation."""
    results: Callable[[Any], list[Tensor]]
    bytes_moved: float


def cases(p: Problem) -> list[Case]:
    """What a step is made of, in one type."""
    s, size = p.setting, p.dtype.itemsize
    n_entries = s.n_tokens * s.k
    by_latent = (p.weights_E[p.order_E], p.rows_E[p.order_E], p.segments, p.x_BD)
    by_row = (p.weights_E, p.indices_E, p.offsets, p.W_FD)
    dot = (p.x_BD, p.W_FD, p.rows_E, p.indices_E, p.offsets)
    made = [
        Case("gather_sum, decode", lambda m: m.gather_sum(*by_row), lambda y: [y],
             size * s.width * (n_entries + s.n_tokens)),
        Case("gather_sum, weight gradient", lambda m: m.gather_sum(*by_latent), lambda y: [y],
             size * s.width * (n_entries + s.n_latents)),
        Case("row_dot", lambda m: m.row_dot(*dot), lambda y: [y], size * s.width * (n_entries + s.n_tokens)),
        Case("top_of_product", lambda m: m.top_of_product(p.product_BF, p.scale_F, p.shift_F, s.k),
             lambda columns: [p.selected(columns)], size * s.n_tokens * s.n_latents),
    ]  # fmt: skip
    if p.dtype != torch.float32:
        return made
    touched = torch.randperm(s.n_latents, device=p.device)[: s.n_latents // 2]
    gradient = torch.randn(len(touched), s.width, device=p.device)
    state = {module: p.adam_state() for module in (plain, kernels_for(p.device))}

    def adam(module: Any) -> list[Tensor]:
        module.sparse_adam(*state[module], gradient, touched, 1e-3, 0.9, 0.999, 1e-8, 10)
        return state[module]

    return [
        *made,
        Case("transpose", lambda m: m.transpose(p.indices_E, s.n_latents), list, 16 * n_entries),
        Case("sparse_adam, half of the rows", adam, list, 4 * s.width * (4 * s.n_latents + 3 * len(touched))),
    ]


def compare(setting: Setting, dtype: torch.dtype, device: str, repeats: int) -> bool:
    """Print a line for each function; whether all of them agree."""
    problem, good = Problem(setting, dtype, device), True
    kernels = kernels_for(device)
    for case in cases(problem):
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
        got = case.results(case.call(kernels))
        try:
            want = case.results(case.call(plain))
        except RuntimeError as error:  # a plain operation that this version of torch lacks for the type
            ms = median_ms(lambda case=case: case.call(kernels), device, repeats)
            print(row(name, setting, ms, float("nan"), f"plain: {str(error).splitlines()[0][:60]}"), flush=True)
            continue
        error = max(difference(a, b) for a, b in zip(got, want, strict=True))
        agrees = error <= LIMITS[dtype]  # false for NaN
        good &= agrees
        del got, want
        ms = median_ms(lambda case=case: case.call(kernels), device, repeats)
        plain_ms = median_ms(lambda case=case: case.call(plain), device, max(3, repeats // 4))
        rate = case.bytes_moved / ms / 1e6
        print(
            row(name, setting, ms, plain_ms, f"{rate:,.0f} GB/s, error {error:.0e}" + " WRONG" * (not agrees)),
            flush=True,
        )
    return good


def chain(setting: Setting, device: str, repeats: int, peak: float) -> None:
    """Print the step that the kernels alone make (no losses, metrics or trainer) over the encoder's product.

    Master weights and moments are in float32, products and gathers in bfloat16, the update is sparse Adam on all rows.
    """
    s, kernels = setting, kernels_for(device)
    problem = Problem(setting, torch.bfloat16, device)
    del problem.product_BF
    masters = [problem.adam_state() for _ in range(2)]
    every = torch.arange(s.n_latents, device=device)
    x_BD, block = problem.x_BD, min(s.n_tokens, 2048)
    product_BF = torch.empty(block, s.n_latents, dtype=torch.bfloat16, device=device)

    def select(W_FD: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x in x_BD.split(block):
            torch.mm(x, W_FD.T, out=product_BF[: len(x)])
            columns = kernels.top_of_product(product_BF[: len(x)], problem.scale_F, problem.shift_F, s.k)
            found.append((columns, product_BF[: len(x)].gather(1, columns)))
        columns, values = (torch.cat(parts).flatten() for parts in zip(*found, strict=True))
        return columns.int(), values

    def step() -> None:
        encoder_FD, decoder_FD = (state[0].to(torch.bfloat16) for state in masters)
        indices_E, values_E = select(encoder_FD)
        error_BD = kernels.gather_sum(values_E, indices_E, problem.offsets, decoder_FD) - x_BD
        dvalues_E = kernels.row_dot(error_BD, decoder_FD, problem.rows_E, indices_E, problem.offsets)
        order_E, segments = kernels.transpose(indices_E, s.n_latents)
        rows_E = problem.rows_E[order_E]
        for state, weights_E, table_BD in ((masters[0], dvalues_E, x_BD), (masters[1], values_E, error_BD)):
            gradient = kernels.gather_sum(weights_E[order_E], rows_E, segments, table_BD)
            kernels.sparse_adam(*state, gradient, every, 1e-5, 0.9, 0.999, 1e-8, 10)

    whole_BF = torch.empty(s.n_tokens, s.n_latents, dtype=torch.bfloat16, device=device)
    floor = median_ms(lambda: torch.mm(x_BD, problem.W_FD.T, out=whole_BF), device, repeats)
    ms = median_ms(step, device, repeats)
    print(row("kernels chained to a step, bfloat16", s, ms, floor, share_of_peak(s, ms, peak)), flush=True)


def share_of_peak(s: Setting, ms: float, peak: float) -> str:
    """How much of the product peak (in FLOP/s) a step reaches, with the encoder's product alone as useful work."""
    return f"{2 * s.n_tokens * s.width * s.n_latents / ms * 1e3 / peak:.1%} of the bf16 product peak"


def product_peak(device: str, n: int) -> float:
    """FLOP/s of a large square product in bfloat16."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device, 10) * 1e3


def main() -> None:
    """Print the table; exit with 1 if a kernel does not agree with its twin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny size: does it run?")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device, repeats = arguments.device, 3 if arguments.quick else arguments.repeats
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: run it on a machine with one, or try `--device cpu --quick`")
    peak = product_peak(device, 64 if arguments.quick else 8192)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    which = kernels_for(device).__name__.rpartition(".")[2]
    print(f"torch {torch.__version__}, {name}, kernels: {which}, bf16 product peak {peak / 1e12:.1f} TFLOP/s")
    print(header(), flush=True)
    good = True
    with torch.no_grad():
        for setting in QUICK if arguments.quick else SETTINGS:
            for dtype in (torch.bfloat16, torch.float32):
                good &= compare(setting, dtype, device, repeats)
            chain(setting, device, repeats, peak)
    if not good:
        sys.exit("a kernel does not agree with its plain twin")


if __name__ == "__main__":
    main()
