"""The one forward pass of all kinds: from a batch to a code, and from the code to a reconstruction.

A kind says how activations become a code (`_encode_rows`) and how a code becomes activations (`_decode_code`).

Letters: N tokens, G sites that are read or written (1 for an autoencoder), R rows and S sites of a code, F latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lm_saes.dictionaries.activation import Selecting
from lm_saes.dictionaries.normalization import Normalizing
from lm_saes.dictionaries.rows import flat_mask
from lm_saes.latents.codes import Code
from lm_saes.latents.record import Record


class ForwardPass(Selecting, Normalizing):
    """The part of a dictionary that encodes and decodes."""

    @abstractmethod
    def prepare_input(self, batch: Mapping[str, Any]) -> Tensor:
        """The input that `encode` takes, from a (normalised) batch."""

    @abstractmethod
    def prepare_label(self, batch: Mapping[str, Any]) -> Tensor:
        """What `decode` is to reconstruct, from a (normalised) batch."""

    @abstractmethod
    def rows_of(self, x: Tensor) -> Tensor:
        """Activations as `prepare_input` or `prepare_label` gives them, by site and token: `[G, N, d]`."""

    @abstractmethod
    def latents_of(self, latents_RF: Tensor, x: Tensor) -> Tensor:
        """Dense latents of a code's rows, with the dimensions that those of `x` have."""

    @abstractmethod
    def _encode_rows(self, x: Tensor, mask_N: Tensor | None, norm: Tensor) -> Code:
        """The latents of normalised activations as a code: rows are (token, site), token-major.

        Args:
            mask_N: valid tokens; only batch-wide selection looks at it.
            norm: what `decoder_norm` gives.
        """

    @abstractmethod
    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        """The (normalised) reconstruction of a code, `[G, N, d]`; `x` is what was encoded."""

    @abstractmethod
    def hidden_pre(self, x: Tensor) -> Tensor:
        """Dense pre-activations `h`, `[..., F]`."""

    @abstractmethod
    def decode(self, feature_acts: Tensor) -> Tensor:
        """The (normalised) reconstruction of dense latents."""

    def encode(self, x: Tensor, return_hidden_pre: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Dense latents of normalised activations (and the dense pre-activations `h`)."""
        latents = self.latents_of(self.encode_sparse(x).dense(), x)
        return (latents, self.hidden_pre(x)) if return_hidden_pre else latents

    def encode_sparse(self, x: Tensor, mask: Tensor | None = None) -> Code:
        """The latents of normalised activations as a code; only batch-wide selection looks at the mask."""
        return self._encode_rows(x, flat_mask(mask), self.decoder_norm())

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct normalised activations: normalised in, normalised out."""
        return self._decode_code(self.encode_sparse(x), x).reshape(x.shape)

    def record(self, batch: Mapping[str, Any]) -> Record:
        """One forward pass over raw activations."""
        return self.make_record(self.normalize_activations(batch))

    def make_record(self, batch: Mapping[str, Any]) -> Record:
        """One forward pass over a normalised batch."""
        x = self.prepare_input(batch)
        x_GND = y_GND = self.rows_of(x)
        if self.cfg.hook_points_read != self.cfg.hook_points_written:
            y_GND = self.rows_of(self.prepare_label(batch))
        mask_N, norm = flat_mask(batch.get("mask")), self.decoder_norm()
        code = self._encode_rows(x, mask_N, norm)
        y_hat_GND, norm_SF = self._decode_code(code, x), norm.view(code.n_sites, -1)
        return Record(x_GND, y_GND, code, y_hat_GND, mask_N, norm_SF, code.n_sites, self.axes)

    def reconstruct(self, batch: Mapping[str, Any]) -> Tensor:
        """Raw activations in, raw reconstruction out, in every mode; of `batch` only what is read needs to be there."""
        x = self.prepare_input(self.normalize_activations(batch))
        y_GND = self._decode_code(self.encode_sparse(x, batch.get("mask")), x)
        return self.denormalize_activations(batch, y_GND.reshape(x.shape))

    def denormalize_activations(self, batch: Mapping[str, Any], reconstruction: Tensor) -> Tensor:
        """Bring a reconstruction of the (raw) `batch` back to the raw scale."""
        return self.denormalize_sites(batch, reconstruction[None], self.cfg.hook_points_written)[0]
