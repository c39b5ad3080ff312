"""What selection by learnt thresholds shares on the sparse and the dense path. Letters: R rows, S sites, F latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled(h_RF: Tensor, scale_SF: Tensor | None) -> Tensor:
    """`s = h * scale`, each row by its site's scale; `h` itself without one."""
    if scale_SF is None:
        return h_RF
    return (h_RF.view(-1, *scale_SF.shape) * scale_SF).view(h_RF.shape)


def in_units_of_h(s_F: Tensor, scale_F: Tensor | None) -> Tensor:
    """The `h` from which on `s = h scale` exceeds `s_F`; with a scale of 0 it never does."""
    return s_F if scale_F is None else torch.where(scale_F > 0, s_F / scale_F, math.inf)


def threshold_gradient(df_SF: Tensor, log_theta: Tensor, scale_SF: Tensor | None, window: float) -> Tensor:
    """Gradient of log theta (`[F]` or `[S, F]`) from the summed output gradients of the entries in the window.

    `df_SF` is in the units of `h`; divided by the scales it is `g`.
    """
    g_SF = df_SF if scale_SF is None else torch.where(scale_SF > 0, df_SF / scale_SF, 0.0)
    g = g_SF if log_theta.ndim > 1 else g_SF.sum(0)
    return (-(log_theta.exp() ** 2) / window * g).to(log_theta.dtype)


class DenseJumpReLU(torch.autograd.Function):
    """`h` where `s = h * scale` exceeds its threshold, with the rectangular window's gradient for the threshold."""

    @staticmethod
    def forward(ctx, h_RF, log_theta, scale_SF, window, n_sites):  # type: ignore[override]
        theta = log_theta.exp().to(h_RF.dtype)
        s_NSF = scaled(h_RF, scale_SF).view(-1, n_sites, h_RF.shape[1])
        kept_NSF = s_NSF > theta
        in_window_NSF = ((s_NSF - theta).abs() < window / 2) & (s_NSF > 0)
        ctx.save_for_backward(kept_NSF, in_window_NSF, log_theta, scale_SF)
        ctx.window = window
        return torch.where(kept_NSF.view_as(h_RF), h_RF, 0.0)

    @staticmethod
    def backward(ctx, df_RF):  # type: ignore[override]
        kept_NSF, in_window_NSF, log_theta, scale_SF = ctx.saved_tensors
        dh_RF = torch.where(kept_NSF.view_as(df_RF), df_RF, 0.0)
        window_SF = torch.where(in_window_NSF, df_RF.view(in_window_NSF.shape), 0.0).sum(0)
        return dh_RF, threshold_gradient(window_SF, log_theta, scale_SF, ctx.window), None, None, None
