"""A process of a test's pool: reads cases from standard input, one JSON object a line, and answers each with a line."""

from __future__ import annotations

import json
import sys
import traceback

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lm_saes.parallel.mesh import start

from .work import Case, train


def main() -> None:
    torch.set_num_threads(1)
    meshes = {}
    for line in sys.stdin:
        order = json.loads(line)
        sizes = tuple(order["mesh"])
        try:
            if sizes not in meshes:
                meshes[sizes] = start(*sizes)
            results = train(Case(**order["case"]), meshes[sizes], order["out"] + ".run")
            if dist.get_rank() == 0:
                save_file({name: tensor.contiguous() for name, tensor in results.items()}, order["out"])
            answer = "done"
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
