"""The few sparse products that a training step is made of; the plain versions repeat themselves bit for bit."""

from lm_saes.latents.kernels.plain import gather_sum, row_dot, transpose

__all__ = ["gather_sum", "row_dot", "transpose"]
