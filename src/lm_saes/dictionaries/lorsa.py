"""Low-rank sparse attention (Lorsa): attention of many heads that each move one number, few of them active at a token.

    q, k = x W_Q + b_Q, x W_K + b_K         per query-key head; then QK norm and rotary embedding, if there are any
    v = x W_V^T + b_V                       a scalar per head and position
    h = causal softmax(q k / attn_scale) v  head i attends as query-key head i // (F / G) does
    f = h where selected, else 0
    y_hat = f W_O + b_D

Source: He et al. 2025, "Towards understanding the nature of attention with low-rank sparse decomposition".

Letters: B contexts, S positions, N = B * S tokens, G query-key heads, E their width, D width, F heads (latents).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_saes.dictionaries.lorsa_config import LorsaConfig
from lm_saes.dictionaries.rows import active_directions, scale_to, valid_rows
from lm_saes.dictionaries.single import SingleDictionary
from lm_saes.errors import ConfigError, DataError
from lm_saes.latents.attention import HeadNorm, attend, contexts, pattern, project, refuse_left_padding
from lm_saes.latents.codes import Code
from lm_saes.latents.encode.given import select
from lm_saes.latents.encode.hidden import Hidden
from lm_saes.latents.gradients.rows import chosen_rows
from lm_saes.latents.record import Record
from lm_saes.losses.dead_latents import DeadList, auxk

if TYPE_CHECKING:
    from lm_saes.models.attention_weights import AttentionWeights

_OLD_BUFFERS = frozenset({"mask", "IGNORE", "rotary_sin", "rotary_cos"})


class LowRankSparseAttention(SingleDictionary):
    """A low-rank sparse attention layer. It reads whole contexts, `[batch, seq, d]`.

    Attention is causal and padding stands on the right, so no mask ever changes it: masked tokens count nowhere, but
    later tokens attend to them (to a masked BOS, say).
    """

    config_class = LorsaConfig
    reads_uniform_bounds = False
    has_encoder_norm = False
    cfg: LorsaConfig  # type: ignore[assignment]

    def __init__(self, cfg: LorsaConfig) -> None:
        super().__init__(cfg)
        G, E, D, F = cfg.n_qk_heads, cfg.d_qk_head, cfg.d_model, cfg.d_sae
        self.W_Q = nn.Parameter(torch.zeros(G, E, D, dtype=cfg.dtype).transpose(1, 2))
        self.W_K = nn.Parameter(torch.zeros(G, E, D, dtype=cfg.dtype).transpose(1, 2))
        self.b_Q = nn.Parameter(torch.zeros(G, E, dtype=cfg.dtype))
        self.b_K = nn.Parameter(torch.zeros(G, E, dtype=cfg.dtype))
        self.W_V = nn.Parameter(torch.zeros(F, D, dtype=cfg.dtype))
        self.b_V = nn.Parameter(torch.zeros(F, dtype=cfg.dtype))
        self.W_O = nn.Parameter(torch.zeros(F, D, dtype=cfg.dtype))
        self.b_D = nn.Parameter(torch.zeros(D, dtype=cfg.dtype)) if cfg.use_decoder_bias else None
        if cfg.use_post_qk_ln and cfg.normalization_type is not None:
            self.ln_q = HeadNorm(G, E, cfg.normalization_type, cfg.eps, cfg.dtype)
            self.ln_k = HeadNorm(G, E, cfg.normalization_type, cfg.eps, cfg.dtype)

    # -- forward ---------------------------------------------------------------------------------------------------

    def prepare_input(self, batch: Mapping[str, Any]) -> Tensor:
        return contexts(super().prepare_input(batch), self.cfg.n_ctx, self.cfg.hook_point_in)

    def prepare_label(self, batch: Mapping[str, Any]) -> Tensor:
        return contexts(super().prepare_label(batch), self.cfg.n_ctx, self.cfg.hook_point_out)

    def _queries_and_keys(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        q, k = project(x_BSD, self.W_Q, self.b_Q), project(x_BSD, self.W_K, self.b_K)
        if self.cfg.use_post_qk_ln:
            q, k = self.ln_q(q), self.ln_k(k)
        rotary = self.cfg.rotary
        return (q, k) if rotary is None else (rotary.turn(q), rotary.turn(k))

    def hidden_pre(self, x: Tensor) -> Tensor:
        x = self.axes.latents.enter(contexts(x, self.cfg.n_ctx))
        v = nn.functional.linear(x, self.W_V, self.b_V)
        return attend(*self._queries_and_keys(x), v, self.cfg.score_scale).to(self.b_V.dtype)

    def attention_pattern(self, x: Tensor) -> Tensor:
        """How much each query-key head attends, `[batch, n_qk_heads, seq, seq]` (to, from), for normalised `x`."""
        return pattern(*self._queries_and_keys(contexts(x, self.cfg.n_ctx)), self.cfg.score_scale)

    def _encode_rows(self, x: Tensor, mask_N: Tensor | None, norm: Tensor) -> Code:
        """The code keeps its pre-activations: making them again would be the whole attention again."""
        h_NF = self.hidden_pre(x).flatten(0, 1)
        code = select(h_NF, self.selector, self.selection_scale(norm), mask_N)
        code.hidden = Hidden.around(h_NF)
        return code

    def _decode_code(self, code: Code, x: Tensor) -> Tensor:
        return self._add_up(code.decode(self.W_O))

    def make_record(self, batch: Mapping[str, Any]) -> Record:
        refuse_left_padding(batch["tokens"], batch.get("mask"))
        return super().make_record(batch)

    # -- losses ----------------------------------------------------------------------------------------------------

    def pre_activation_loss(self, record: Record) -> Tensor:
        """Gated `sum_i relu(theta_i - h_i norm_i)`, else `sum_i relu(theta_i - h_i) norm_i`; mean over tokens."""
        hidden = _hidden(record)
        return record.row_mean_of_sum(self.axes.latents.leave(self.shortfall(hidden, record.norm[0], record.mask)))

    def dead_latent_loss(self, record: Record, dead: Sequence[DeadList], k_aux: int) -> Tensor:
        scale_X, latents = dead[0].scale(self.selection_scale(record.norm[0])), dead[0].latents
        h_NX = _hidden(record).values.index_select(1, latents)
        return auxk(record, h_NX, scale_X, chosen_rows(self.W_O, self.W_O, latents), k_aux)

    # -- norms, folding --------------------------------------------------------------------------------------------

    def encoder_norm(self, keepdim: bool = False) -> Tensor:
        raise NotImplementedError(
            "a Lorsa head encodes by queries, keys and values together: no one direction has a norm"
        )

    def decoder_norm(self, keepdim: bool = False) -> Tensor:
        return torch.linalg.vector_norm(self.W_O, dim=1, keepdim=keepdim)

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool) -> None:
        self.W_O.mul_(scale_to(value, self.decoder_norm(keepdim=True), force_exact))

    def set_encoder_to_fixed_norm(self, value: float) -> None:
        raise NotImplementedError("a Lorsa head encodes by queries, keys and values together: no one norm can be fixed")

    @torch.no_grad()
    def transform_to_unit_decoder_norm(self) -> None:
        """Scale each row of `W_O` to norm 1 and its head's values by the old norm: the same function.

        Raises:
            NotImplementedError: ungated top-k selection, where it would change which latents are selected.
        """
        norm_F = self.unit_norm_factors()
        self.W_O.div_(norm_F[:, None])
        self.W_V.mul_(norm_F[:, None])
        self.b_V.mul_(norm_F)

    def fold_factors(self) -> None:
        """Patterns stay: queries and keys come out as before, so neither their norms' `eps` nor biases matter."""
        factor_in, factor_out = self.norm_factors(self.W_O)
        for W in (self.W_Q, self.W_K, self.W_V):
            W.mul_(factor_in)
        self.W_O.div_(factor_out)
        self.fold_beside_weights(factor_out, growth=1 / factor_out)

    def load_full_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        super().load_full_state_dict({name: t for name, t in state.items() if name not in _OLD_BUFFERS}, strict)

    def dim_maps(self) -> dict[str, dict[str, int]]:
        return {name: {} if name == "b_D" else {"model": 0} for name, _ in self.named_parameters()}

    # -- initialisation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, *, encoder_uniform_bound: float, decoder_uniform_bound: float,
                        init_log_jumprelu_threshold_value: float | None = None) -> None:  # fmt: skip
        """Each head's `W_Q`, `W_K` Xavier uniform, `W_V` N(0, 1/F), `W_O` N(0, 1/D); biases 0 (bounds are not used)."""
        for name, parameter in self.named_parameters():
            if name.endswith(".w"):
                parameter.fill_(1)
            elif name.startswith("b_"):
                parameter.zero_()
        cfg, draw = self.cfg, self.axes.latents.draw
        bound = (6 / (cfg.d_model + cfg.d_qk_head)) ** 0.5
        for W_GDE in (self.W_Q, self.W_K):
            draw(W_GDE.transpose(1, 2), lambda block: block.uniform_(-bound, bound))
        draw(self.W_V, lambda block: block.normal_(std=cfg.d_sae**-0.5))
        draw(self.W_O, lambda block: block.normal_(std=cfg.d_model**-0.5))
        self.init_thresholds(init_log_jumprelu_threshold_value)

    @torch.no_grad()
    def init_encoder_bias_with_mean_hidden_pre(self, batch: Mapping[str, Any]) -> None:
        """`b_V = -` the mean over valid tokens of `h` without it: as attention weights add up to 1, it adds to `h`."""
        self.b_V.zero_()
        self.b_V.copy_(-valid_rows(self.hidden_pre(self.prepare_input(batch)), batch).mean(0))

    @torch.no_grad()
    def init_lorsa_with_mhsa(self, mhsa: AttentionWeights) -> None:
        """Start from a layer's queries and keys: raw inputs then give that layer's own attention patterns.

        Each original head's `W_Q`, `W_K`, biases and norms are repeated over `n_qk_heads / n_heads` query-key heads;
        keys that several heads share go to each of them.

        Raises:
            ConfigError: this Lorsa attends in another way than the layer.
        """
        self.cfg.check_attends_like(mhsa)
        mhsa, factor = mhsa.reading(self.cfg.hook_point_in), self._input_factor()
        heads = self._own(mhsa.spread(self.cfg.n_qk_heads, "n_qk_heads"))
        keys = mhsa.keys_of(heads)
        for own, theirs in ((self.W_Q, mhsa.W_Q[heads] / factor), (self.W_K, mhsa.W_K[keys] / factor),
                            (self.b_Q, mhsa.b_Q[heads]), (self.b_K, mhsa.b_K[keys])):  # fmt: skip
            own.copy_(theirs)
        if mhsa.norm_w_Q is not None and mhsa.norm_w_K is not None:
            self.ln_q.w.copy_(mhsa.norm_w_Q.expand_as(self.ln_q.w))
            self.ln_k.w.copy_(mhsa.norm_w_K.expand_as(self.ln_k.w))

    @torch.no_grad()
    def init_W_V_with_active_subspace_per_head(self, batch: Mapping[str, Any], mhsa: AttentionWeights) -> None:
        """Put each head's values where one of a layer's heads reads most, and its output where that head writes them.

        Per original head with value matrix `V` and output matrix `O`: `W_V <- W_V[:, :m] U^T` with `U` the m =
        `d_qk_head` directions of most variance of `x V V^T` over the valid tokens; `W_O = W_V V O`; rows normalised.
        """
        mhsa = mhsa.reading(self.cfg.hook_point_in)
        owners_F = self._own(mhsa.spread(self.cfg.d_sae, "d_sae"))
        x_ND = valid_rows(self.prepare_input(batch), batch).float()
        m = min(self.cfg.d_qk_head, mhsa.W_V.shape[2])
        for head in owners_F.unique():
            own, V_DE = owners_F == head, mhsa.W_V[mhsa.keys_of(head)]
            U_MD = active_directions(x_ND @ V_DE @ V_DE.T, m)
            W_XD = self.W_V[own][:, :m].float() @ U_MD
            for W_FD, rows_XD in ((self.W_V, W_XD), (self.W_O, W_XD @ V_DE @ mhsa.W_O[head])):
                W_FD[own] = nn.functional.normalize(rows_XD, dim=1).to(W_FD.dtype)

    def _own(self, of_all: Tensor) -> Tensor:
        """This process's part of what each (query-key) head has one of."""
        return of_all.chunk(self.axes.latents.size)[self.axes.latents.place]

    def _input_factor(self) -> Tensor:
        if self.cfg.norm_activation not in ("dataset-wise", "inference"):
            raise ConfigError(
                f"norm_activation={self.cfg.norm_activation!r}: the model's weights can be scaled by a constant only; "
                "use 'dataset-wise'"
            )
        return self.compute_norm_factor(self.W_Q, self.cfg.hook_point_in)


def _hidden(record: Record) -> Hidden:
    """The pre-activations that `_encode_rows` kept."""
    if record.code.hidden is None:
        raise DataError("this record is not one of a Lorsa: it has no pre-activations")
    return record.code.hidden
