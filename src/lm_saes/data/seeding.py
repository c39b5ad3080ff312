"""Random numbers as pure functions of a seed and a place, so that nothing random has to be saved."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *place: str | int, device: str | None = None) -> torch.Generator:
    """A generator for one use of randomness, e.g. `generator(seed, "rows", epoch)`; other places are independent."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator(device=device or "cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def permutation(n: int, seed: int, *place: str | int, device: str | None = None) -> Tensor:
    """A random order of `range(n)`, on the CPU; drawn on `device`."""
    return torch.randperm(n, generator=generator(seed, *place, device=device), device=device or "cpu").cpu()
