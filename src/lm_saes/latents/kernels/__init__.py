"""The few sparse products that a training step is made of; all of them repeat themselves bit for bit.

Each has a plain version in torch operations and, for CUDA, one in Triton. What the tensors are on decides;
`LM_SAES_KERNELS=plain` in the environment makes it the plain one everywhere.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType

from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.latents.kernels import plain

__all__ = ["gather_sum", "implementation", "row_dot", "sparse_adam", "top_of_product", "transpose"]


def implementation(device_type: str) -> ModuleType:
    """The module whose functions work on devices of a type: Triton's for `cuda` where it is installed, else `plain`.

    Raises:
        ConfigError: `LM_SAES_KERNELS` is set to something else than `plain`.
    """
    wish = os.environ.get("LM_SAES_KERNELS", "")
    if wish not in ("", "plain"):
        raise ConfigError(f"LM_SAES_KERNELS={wish}: is neither 'plain' nor unset; unset it to let the device decide")
    if wish == "plain" or device_type != "cuda" or not _has_triton():
        return plain
    from lm_saes.latents.kernels import cuda

    return cuda


@cache
def _has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def gather_sum(weights_E: Tensor, indices_E: Tensor, offsets: Tensor, table_XD: Tensor) -> Tensor:
    """`out[r] = sum over entries e of row r of weights[e] * table[indices[e]]`; one offset more than rows."""
    return implementation(table_XD.device.type).gather_sum(weights_E, indices_E, offsets, table_XD)


def row_dot(left_ND: Tensor, table_FD: Tensor, rows_E: Tensor, indices_E: Tensor, offsets: Tensor) -> Tensor:
    """`out[e] = <left[rows[e]], table[indices[e]]>` without gathering `[E, D]` tensors."""
    return implementation(table_FD.device.type).row_dot(left_ND, table_FD, rows_E, indices_E, offsets)


def transpose(indices_E: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Order of the entries by latent (stable: rows stay ascending within one) and each latent's segment offsets."""
    return implementation(indices_E.device.type).transpose(indices_E, n_latents)


def top_of_product(product_BF: Tensor, scale_F: Tensor | None, shift_F: Tensor, k: int) -> Tensor:
    """Columns of the k largest `s = product * scale + shift` of each row, `[B, k]` (int64); no scale counts as 1.

    `s` is never written out. It is compared in float32 at least; among equal entries any may be chosen.
    """
    return implementation(product_BF.device.type).top_of_product(product_BF, scale_F, shift_F, k)


def sparse_adam(
    p_FD: Tensor, m_FD: Tensor, v_FD: Tensor, grad_RD: Tensor, rows_R: Tensor, lr: float, beta1: float, beta2: float,
    eps: float, step: float,
) -> None:  # fmt: skip
    """One update of sparse Adam, in place, with a gradient that is zero outside `rows`.

    All moments decay; where an entry of the gradient is not zero they take it up and the weight moves by
    `-lr sqrt(1 - beta2^step) / (1 - beta1^step) m / (sqrt(v) + eps)`. A step whose gradient is zero everywhere is not
    treated otherwise: to skip it is up to the caller.

    Args:
        grad_RD: gradient of the rows in `rows_R` alone, which are all different (int32 or int64).
        step: number of this update, from 1 on.
    """
    implementation(p_FD.device.type).sparse_adam(
        p_FD, m_FD, v_FD, grad_RD, rows_R, lr, beta1, beta2, eps, step
    )  # fmt: skip
