"""Whether the host loses time when it reads what a device computes.

A GPU works through a queue that the host fills; whoever asks for a value (`.item()`, `nonzero`, a mask as an index)
waits until the queue is empty, and the device then waits for the host. On a CPU the value is there.
"""

from __future__ import annotations

import torch


def waits_cost(device: torch.device | str) -> bool:
    """Whether reading a value that lies on `device` costs time.

    The only place that decides this. Call it as `waiting.waits_cost`, so that tests can put another answer in its place
    and run what a GPU runs on a CPU.
    """
    return torch.device(device).type == "cuda"
