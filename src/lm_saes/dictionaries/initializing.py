"""What a dictionary offers to its initialisation: fresh weights, and what one batch or the model's weights can set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lm_saes.models.attention_weights import AttentionWeights


class Initializing(ABC):
    """The part of a dictionary that the initialiser calls. Of the methods other than `init_parameters` none is a must.

    A kind overrides those that make sense for it; `offers` tells which.
    """

    @classmethod
    def offers(cls, method: str) -> bool:
        """Whether this kind has its own version of an optional method, which here only says that there is none."""
        return getattr(cls, method) is not getattr(Initializing, method)

    @abstractmethod
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        """Draw fresh weights; biases are 0."""

    def init_encoder_with_decoder_transpose(self, factor: float = 1.0) -> None:
        """`W_E = factor x W_D^T`."""
        raise NotImplementedError(f"{type(self).__name__}: encoder and decoder have no common shape to tie")

    def init_decoder_bias_with_geometric_median(self, batch: Mapping[str, Any]) -> None:
        """Set the decoder bias to the geometric median of the (normalised) labels."""
        raise NotImplementedError(f"{type(self).__name__}: has no one decoder bias")

    def init_encoder_bias_with_mean_hidden_pre(self, batch: Mapping[str, Any]) -> None:
        """Set the encoder bias to minus the mean pre-activation of a (normalised) batch."""
        raise NotImplementedError(f"{type(self).__name__}: has no encoder bias")

    def init_W_D_with_active_subspace(self, batch: Mapping[str, Any], d_active_subspace: int) -> None:
        """Put decoder rows into the directions of most variance of the (normalised) labels."""
        raise NotImplementedError(f"{type(self).__name__}: has no one decoder matrix")

    def init_tc_with_mlp(self, batch: Mapping[str, Any], mlp: Callable[[Tensor], Tensor]) -> None:
        """Start a transcoder's decoder from what the model's own MLP makes of the encoder's directions (raw batch)."""
        raise NotImplementedError(f"{type(self).__name__}: is no transcoder, so no MLP stands between its hook points")

    def init_lorsa_with_mhsa(self, mhsa: AttentionWeights) -> None:
        """Start from the queries and keys of a layer's own attention."""
        raise NotImplementedError(f"{type(self).__name__}: has no queries and keys that an attention's could be")

    def init_W_V_with_active_subspace_per_head(self, batch: Mapping[str, Any], mhsa: AttentionWeights) -> None:
        """Put each head's values where one of an attention's heads reads most (normalised batch)."""
        raise NotImplementedError(f"{type(self).__name__}: has no heads that could read what an attention's read")
