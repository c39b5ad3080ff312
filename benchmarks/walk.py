"""The way of a tensor from `encode_sparse` to its code: how many files it enters, and how often it goes back to one.

python benchmarks/walk.py
python benchmarks/walk.py --way topk    the files, in order
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lm_saes
from lm_saes import SAEConfig, SparseAutoEncoder

ROOT = Path(str(lm_saes.__file__)).parent
SETTINGS: dict[str, dict[str, Any]] = {"topk": {"top_k": 4}, "batchtopk": {"top_k": 4}, "jumprelu": {}, "relu": {}}


def walk(act_fn: str) -> list[str]:
    """The package's files in the order in which a small autoencoder's encoding passes through them."""
    cfg = SAEConfig(hook_point_in="x", hook_point_out="x", d_model=32, expansion_factor=32, act_fn=act_fn,
                    norm_activation="inference", **SETTINGS[act_fn])  # fmt: skip
    sae = SparseAutoEncoder.from_config(cfg)
    torch.manual_seed(0)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    x, way = torch.randn(64, 32), list[str]()
    sae.encode_sparse(x)

    def follow(frame: FrameType, event: str, _: object) -> None:
        here = frame if event == "call" else frame.f_back
        while here is not None and not here.f_code.co_filename.startswith(str(ROOT)):
            here = here.f_back
        if event in ("call", "return") and here is not None:
            file = Path(here.f_code.co_filename).relative_to(ROOT).as_posix()
            if way[-1:] != [file]:
                way.append(file)

    sys.setprofile(follow)
    sae.encode_sparse(x)
    sys.setprofile(None)
    return way


def main() -> None:
    """Print the counts of every activation function, or the way of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=SETTINGS, help="print the files of one, in order")
    if only := parser.parse_args().way:
        print("\n".join(walk(only)))
        return
    for act_fn in SETTINGS:
        way = walk(act_fn)
        print(f"{act_fn:>10}: {len(set(way))} files, {len(way) - len(set(way))} returns")


if __name__ == "__main__":
    main()
