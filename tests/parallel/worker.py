"""A process of a test's pool: reads orders, one JSON object a line, and answers each with a line."""

from __future__ import annotations

import json
import sys
import traceback

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lm_saes.parallel.mesh import start

from .saving import full_disk, loaded, refused
from .work import Case, traffic, train

ACTIONS = {act.__name__: act for act in (train, traffic, full_disk, loaded, refused)}


def main() -> None:
    torch.set_num_threads(1)
    meshes = {}
    for line in sys.stdin:
        order = json.loads(line)
        sizes = tuple(order["mesh"])
        try:
            if sizes not in meshes:
                meshes[sizes] = start(*sizes)
            act = ACTIONS[order["action"]]
            results = act(Case(**order["case"]), meshes[sizes], order["out"] + ".run", **order["options"])
            if dist.get_rank() == 0:
                save_file({name: tensor.contiguous() for name, tensor in results.items()}, order["out"])
            answer = "done"
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
        if answer != "done":
            break  # the others would wait for this process


if __name__ == "__main__":
    main()
