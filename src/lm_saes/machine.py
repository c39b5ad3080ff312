"""What this machine can do, how it is used, and every number that was measured on machines.

A number here decides when something is computed, or in pieces of what size; none decides what is computed, beyond
rounding. Read one as `machine.NAME` where it is used, so that tests can put another in its place.
"""

from __future__ import annotations

import ctypes
import os
import platform

import torch

from lm_saes.errors import ConfigError, one_line

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

# --- devices ---------------------------------------------------------------------------------------------------------


def waits_cost(device: torch.device | str) -> bool:
    """Whether reading a value that lies on `device` costs time.

    The only place that decides this. Call it as `machine.waits_cost`, so that tests can put another answer in its place
    and run what a GPU runs on a CPU.
    """
    return torch.device(device).type == "cuda"


def check_device(name: str, setting: str) -> torch.device:
    """The device of that name, or a `ConfigError` if this machine lacks it; `setting` is the one that names it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{setting}={name!r} is not available here ({one_line(error)}); use 'cpu'") from error
    return device


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this machine's processor has instructions for products in a half-precision type."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in _INSTRUCTIONS.get(dtype, ()))


_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fphp"),
}
"""Names, in `torch.cpu.get_capabilities`, of instructions for products in a type."""


def automatic_dtype(device: torch.device) -> torch.dtype:
    """What a language model runs in unless a setting says otherwise: bfloat16 where `device` multiplies it faster than
    float32. Of processors these are x86 ones: on ARM it depends on the libraries that torch was built with."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32
    return torch.float32


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY_SHARE = 0.8
"""So much of the memory may be taken by caches that are shuffled as a whole."""


def memory_bytes(device: str = "cpu") -> int:
    """How much memory the machine, or a CUDA device of it, has."""
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(device)[1]


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of giving them back to the system; returns whether it will.

    A training step frees and takes the same few large blocks again and again. Given back, each would have to be mapped
    and zeroed anew: 7% of a step at d=576, F=9216. Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


# --- blocks: small enough for a cache, large enough for an efficient product -----------------------------------------

PRODUCT_BLOCK_BYTES = 20 << 20
"""Size of one block of pre-activations on a CPU: small enough for the cache, large enough for an efficient product."""
DEVICE_BLOCK_BYTES = 1 << 30
"""The same on other devices."""
GRADIENT_BLOCK_BYTES = 8 << 20
"""Size of one block of latents of all tokens, in dense gradients (measured: 2 to 16 MB serve)."""
BOUNDS_BLOCK_BYTES = 38 << 20
"""Size of one block of bounds, in half precision."""
ROUNDED_ROWS = 512
"""So many inputs, or latents' weights, are scaled and rounded at a time: they stay in the cache meanwhile."""
PRODUCT_WIDTH = 32
"""Products in half precision are fastest in widths that this divides."""
CORE_CACHE_BYTES = 1 << 20
"""Size, for each thread, of what several passes follow each other on: half of a core's second-level cache."""
MLP_ROWS = 4096
"""Rows that go through a language model's MLP at a time: its hidden layer is several times wider than the model."""
TOKENS_PER_FORWARD = 1024
"""Contexts are run in groups of about this many tokens where logits are wanted: it bounds the memory that they take."""

# --- selection: which entries are looked at, and how many at a time --------------------------------------------------

SELECTION_GROUP = 16
"""Columns of one group in the first stage of a selection of the largest."""
BITS_GROUP = 4
"""The same at each of several stages, where values are compared by their bits in half precision."""
COMPARED_TOKENS = 16
"""So many tokens' pre-activations are compared at a time on a CPU: they stay in a core's cache."""
SCREENING_PROBE_TOKENS = 128
"""So many tokens are screened first, to see whether it pays."""
SCREENING_MOST_FAILURES = 0.05
"""Screening goes on if it fails for no more than this share of them."""
SCREENING_CANDIDATES = (1.5, 1.75, 2.5, 4.5)
"""So many times the entries that a token keeps are computed exactly: the first that is enough."""
SCREENING_BATCH_CANDIDATES = 1.5
"""So many times the entries that a batch keeps are computed exactly."""
SCREENING_LEAST_PRODUCT = 1 << 28
"""Multiplications of a product that is worth screening."""
SCREENING_LEAST_TOKENS = 512
"""Rounding the weights costs as much as the product of half as many tokens."""
HALF_PRECISION_SHARES = 1.5
"""So many times its share of a batch's entries is taken from each block of tokens, in half precision."""

# --- sparse or dense -------------------------------------------------------------------------------------------------

SPARSE_BELOW = 0.06
"""Share of latents per token under which the sparse path wins (measured at d=576 on two cores, see docs/LOG.md)."""
DENSITY_PROBE_TOKENS = 64
"""So many tokens tell how dense a batch is."""
TRANSFORM_DENSITY_SCALE = 3.0
"""How many times denser than an autoencoder's a code of transforms may be before dense products win: a map costs more
than a direction (measured at d=576 for ranks 1 to 64, see docs/LOG.md)."""
LOW_RANK = 8
"""The rank from which matrix products over gathered rows are faster than sums over directions (measured likewise)."""
OFTEN_READ = 16
"""Rows that are read so many times each are worth bringing into the cache, some columns of all of them at a time."""
MOST_COLUMN_PARTS = 8
"""Narrower parts than an eighth of the columns do not pay."""

# --- GPU kernels -----------------------------------------------------------------------------------------------------

TILE_BYTES = 2048
"""What a program reads of one row at a time, at most: 16 bytes for each thread of four warps."""
CHUNK_ENTRIES = 256
"""Entries that one program adds up; a longer row is cut into pieces, so that a hot latent keeps many programs busy."""
MOST_CHUNKS = 4096
"""With more entries than this many chunks hold, chunks grow instead: the pieces' buffer stays below 8192 rows."""
MANY_GROUPS = 2048
"""More groups than this are themselves grouped: torch's `topk` reads a row many times over."""
SPARE_DEAD_LATENTS = 64
"""Room in AuxK's list for so many latents at least that may die before the next report, where waiting costs time."""

# --- streams ---------------------------------------------------------------------------------------------------------

SINGLE_THREAD_ELEMENTS = 32768
"""torch works on fewer elements than this in the calling thread."""
DOCUMENTS_READ = 256
"""Documents that are fetched from a dataset at a time."""
DOCUMENTS_TOKENIZED = 64
"""Documents that are tokenised at a time."""
STREAM_PATIENCE_S = 60.0
"""How long a batch is waited for before a warning says what the stream is doing."""
STREAM_END_S = 10.0
"""How long a stream's thread that is to end is waited for; one that never does must not keep the process."""
