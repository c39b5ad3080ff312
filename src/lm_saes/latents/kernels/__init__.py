"""The few sparse products that a training step is made of, each in a plain version that repeats itself bit for bit on the CPU."""

from lm_saes.latents.kernels.plain import gather_sum, row_dot, transpose

__all__ = ["gather_sum", "row_dot", "transpose"]
