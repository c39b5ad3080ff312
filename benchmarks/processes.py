"""What each process of a run holds, and how long its steps take, as latents or batches are cut over more of them.

    python benchmarks/processes.py --meshes 1x1 1x4 2x2

A mesh is `data x model`. Memory is the peak beyond what a process held before it built its part of the dictionary
(having trained a tiny one, which loads the code): weights, gradients, optimizer state, and what a step needs besides.
Processes share this machine's cores, so times say what cutting costs rather than what more machines would gain.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle

import torch
from timing import activations, peak_memory, return_freed_memory, watch_memory
from torch.distributed.device_mesh import DeviceMesh

from lm_saes import Initializer, InitializerConfig, SAEConfig, TrainerConfig
from lm_saes.axes.axis import Axes
from lm_saes.data.batch import Batch
from lm_saes.data.share import share
from lm_saes.parallel.launch import join
from lm_saes.parallel.mesh import axes_of, start
from lm_saes.training.run import Run
from lm_saes.training.update import update

STEPS = 6
HOOK = "x"


def work(arguments: argparse.Namespace, data: int, model: int) -> None:
    """One process: prints its memory and the median time of its steps."""
    mesh = None
    if data * model > 1:
        join()
        mesh = start(data, model)
    torch.set_num_threads(arguments.threads)
    axes = Axes() if mesh is None else axes_of(mesh)
    traffic = [getattr(axis, "traffic", Counter()) for axis in (axes.latents, axes.tokens)]
    batches = [
        share({HOOK: x, "tokens": torch.zeros(len(x), dtype=torch.int64)}, axes.tokens.place, data)
        for x in activations(2, arguments.tokens, arguments.width)
    ]
    return_freed_memory()
    train(arguments, mesh, 64 * model, batches)  # loads what steps need of libraries
    for handed in traffic:
        handed.clear()
    before = watch_memory() or 0
    times = train(arguments, mesh, arguments.latents, batches)
    print(json.dumps({
        "place": axes.everywhere.place, "bytes": peak_memory() - before, "seconds": statistics.median(times[1:]),
        "traffic": sum(handed.total() for handed in traffic) / STEPS,
    }), flush=True)  # fmt: skip
    os._exit(0)


def train(arguments: argparse.Namespace, mesh: DeviceMesh | None, d_sae: int, batches: list[Batch]) -> list[float]:
    """Build (a part of) a dictionary and train it for a few steps; how long each took."""
    cfg = SAEConfig(
        hook_point_in=HOOK, hook_point_out=HOOK, d_model=arguments.width, act_fn="topk", top_k=32,
        expansion_factor=d_sae / arguments.width, norm_activation="token-wise",
    )  # fmt: skip
    sae = Initializer(InitializerConfig()).initialize_sae_from_config(cfg, device_mesh=mesh)
    trainer = TrainerConfig(total_training_tokens=10**9, amp_dtype=None)
    run, times = Run.begin(trainer, sae, arguments.tokens), list[float]()
    for step, batch in zip(range(STEPS), cycle(batches), strict=False):
        began = time.perf_counter()
        update(run, trainer, step, [batch])
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["1x1", "1x4"])
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(arguments, *map(int, os.environ["MESH"].split("x")))
    alone = None
    for mesh in arguments.meshes:
        data, model = map(int, mesh.split("x"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [
            subprocess.Popen(
                [sys.executable, *sys.argv], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(data * model),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MESH": mesh},
            )
            for rank in range(data * model)
        ]  # fmt: skip
        said = [json.loads(process.communicate()[0]) for process in processes]
        most, seconds = max(s["bytes"] for s in said), max(s["seconds"] for s in said)
        alone = alone or most
        print(f"{mesh}: {most / 2**20:.0f} MiB a process ({most / alone:.1%}), step {seconds * 1e3:.0f} ms, "
              f"{max(s['traffic'] for s in said) / 2**20:.1f} MiB to collectives a step", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
