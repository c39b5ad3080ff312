"""What is a crosscoder's own: heads that share latents, its initialisers."""

from typing import Any

import pytest
import torch

from lm_saes import CrossCoder
from lm_saes.errors import ConfigError

from .comparing import check_geometric_median
from .site_twin import HOOKS, SITES, D, F, crosscoder_config, initialized, random_dictionary, skewed_batch
from .twin import THETA, assert_same, random_batch, valid


def test_heads_keep_one_value_and_select_by_their_own_norms() -> None:
    cfg = crosscoder_config(act_fn="jumprelu", dtype=torch.float64)
    crosscoder = random_dictionary(cfg)
    batch = random_batch(cfg, (30,))  # type: ignore[arg-type]
    f, h = crosscoder.encode(crosscoder.prepare_input(batch), return_hidden_pre=True)
    theta = crosscoder.activation_function.log_threshold.exp().double()
    for head in range(SITES):
        kept = h * crosscoder.W_D[head].norm(dim=1) > theta
        assert torch.equal(f[:, head] != 0, kept)
        assert_same(f[:, head][kept], h[kept], 1e-12)
    some = (f != 0).any(1) & ~(f != 0).all(1)
    assert some.any()  # heads differ


def test_every_head_writes_only_its_own_hook_point() -> None:
    crosscoder, other = random_dictionary(crosscoder_config()), random_dictionary(crosscoder_config())
    batch = random_batch(crosscoder.cfg)
    with torch.no_grad():
        other.W_D[1] *= -1  # the same norms, so the same selection
        differs = (other.reconstruct(batch) - crosscoder.reconstruct(batch)).flatten(1).abs().amax(1) > 0
    assert differs.tolist() == [False, True, False]
    moved = {**batch, HOOKS[2]: 2 * batch[HOOKS[2]]}
    with torch.no_grad():
        differs = (crosscoder.reconstruct(moved) - crosscoder.reconstruct(batch)).flatten(1).abs().amax(1) > 0
    assert differs.all()  # but every head reads all


def test_only_the_sum_of_encoder_biases_counts() -> None:
    crosscoder = random_dictionary(crosscoder_config(dtype=torch.float64))
    batch = random_batch(crosscoder.cfg)
    want = crosscoder.reconstruct(batch)
    with torch.no_grad():
        crosscoder.b_E[0] += 3
        crosscoder.b_E[2] -= 3
    assert_same(crosscoder.reconstruct(batch), want, 1e-12)


def test_a_latent_is_active_if_any_head_is() -> None:
    """Heads with norms 2 and 1/2 and h = theta = 1: the first keeps what the second does not."""
    cfg = crosscoder_config(2, act_fn="jumprelu")
    crosscoder = CrossCoder(cfg)
    with torch.no_grad():
        crosscoder.W_D[0, :, 0], crosscoder.W_D[1, :, 0] = 2.0, 0.5
        crosscoder.b_E[0, :7] = 1.0
    batch = random_batch(cfg, (6,), masked=True)  # type: ignore[arg-type]
    record = crosscoder.make_record(batch)
    n = int(batch["mask"].sum())
    assert crosscoder.latent_counts(record).tolist() == [n] * 7 + [0] * (F - 7)
    assert record.code.dense().count_nonzero() == 7 * 6  # of one head


def test_norms_are_by_head() -> None:
    crosscoder = random_dictionary(crosscoder_config())
    assert_same(crosscoder.decoder_norm(), crosscoder.W_D.square().sum(2).sqrt(), 1e-6)
    assert_same(crosscoder.encoder_norm(), crosscoder.W_E.square().sum(1).sqrt(), 1e-6)
    assert crosscoder.decoder_norm(keepdim=True).shape == (SITES, F, 1)
    assert crosscoder.encoder_norm(keepdim=True).shape == (SITES, 1, F)
    assert_same(crosscoder.decoder_bias_norm(), crosscoder.b_D.norm(dim=1).mean(), 1e-6)
    assert float(random_dictionary(crosscoder_config(use_decoder_bias=False)).decoder_bias_norm()) == 0
    with pytest.raises(NotImplementedError, match="share one encoder"):
        crosscoder.transform_to_unit_decoder_norm()


# -- initialisation ------------------------------------------------------------------------------------------------


def test_fresh_weights_are_one_head_copied_to_all() -> None:
    cfg = crosscoder_config(act_fn="jumprelu", expansion_factor=100.0)
    bounds: dict[str, Any] = {
        "encoder_uniform_bound": 0.3,
        "decoder_uniform_bound": 0.7,
        "init_log_jumprelu_threshold_value": -0.5,
    }
    for tied in (False, True):
        crosscoder = initialized(cfg, **bounds, init_encoder_with_decoder_transpose=tied)
        for name, bound in {"W_E": 0.7 if tied else 0.3, "W_D": 0.7}.items():
            W = dict(crosscoder.named_parameters())[name].detach()
            assert all(torch.equal(W[0], head) for head in W)
            assert 0.99 * bound < float(W.abs().max()) <= bound
            assert float(W.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert torch.equal(crosscoder.W_E, crosscoder.W_D.transpose(1, 2)) == tied
        assert not crosscoder.b_E.any() and not crosscoder.b_D.any()  # type: ignore[union-attr]
        assert (dict(crosscoder.named_parameters())[THETA] == -0.5).all()
        assert crosscoder.W_E.permute(2, 0, 1).is_contiguous()  # latent-major, as it is read


def test_the_tie_has_a_factor() -> None:
    crosscoder = initialized(crosscoder_config(), init_encoder_with_decoder_transpose_factor=0.5)
    assert_same(crosscoder.W_E, 0.5 * crosscoder.W_D.transpose(1, 2), 1e-7)


@pytest.fixture
def batch() -> dict[str, Any]:
    return skewed_batch(crosscoder_config())


def test_decoder_biases_are_geometric_medians(batch: dict[str, Any]) -> None:
    crosscoder = initialized(crosscoder_config(), batch, bias_init_method="geometric_median")
    assert crosscoder.b_D is not None
    for b_D, hook in zip(crosscoder.b_D, HOOKS, strict=True):
        check_geometric_median(b_D.detach(), valid(batch[hook], batch))
    without = random_dictionary(crosscoder_config(use_decoder_bias=False))
    with pytest.raises(ConfigError, match="use_decoder_bias is off"):
        without.init_decoder_bias_with_geometric_median(batch)


def test_encoder_biases_centre_the_pre_activations(batch: dict[str, Any]) -> None:
    crosscoder = initialized(crosscoder_config(), batch, init_encoder_bias_with_mean_hidden_pre=True)
    h = valid(crosscoder.hidden_pre(crosscoder.prepare_input(batch)), batch)
    assert float(h.detach().mean(0).abs().max()) < 1e-4
    for b_F, hook, W in zip(crosscoder.b_E, HOOKS, crosscoder.W_E, strict=True):  # each head centres its own part
        assert_same(b_F, -(valid(batch[hook], batch) @ W).mean(0), 1e-4)


def test_decoders_in_the_active_subspace_of_their_head(batch: dict[str, Any]) -> None:
    fresh = initialized(crosscoder_config())
    crosscoder = initialized(crosscoder_config(), batch, initialize_W_D_with_active_subspace=True, d_active_subspace=2)
    for head, (hook, W, old) in enumerate(zip(HOOKS, crosscoder.W_D, fresh.W_D.double()[..., :2], strict=True)):
        rows = valid(batch[hook], batch).double()
        U = torch.linalg.eigh(torch.cov(rows.T)).eigenvectors[:, -2:].flip(1)
        assert_same(W.double() @ (U @ U.T), W.double(), 1e-4, "in the subspace")
        assert_same(W.double() @ W.double().T, old @ old.T, 1e-4, "coordinates, up to a rotation")
        if head == 0:
            assert_same((W.double() @ U).abs(), old.abs(), 1e-4, "coordinates")
    assert torch.equal(crosscoder.W_E, crosscoder.W_D.transpose(1, 2))  # tied again
    assert crosscoder.W_D.shape == (SITES, F, D)


def test_active_subspaces_of_heads_go_together(batch: dict[str, Any]) -> None:
    """What differs between heads by a rotation alone, decoders write rotated: a latent means the same in each."""
    Q = torch.linalg.qr(torch.randn(D, D)).Q
    rotated = {**batch, HOOKS[1]: batch[HOOKS[0]] @ Q + torch.randn(D), HOOKS[2]: -batch[HOOKS[0]]}
    cfg = crosscoder_config(norm_activation="inference")
    W_D = initialized(cfg, rotated, initialize_W_D_with_active_subspace=True, d_active_subspace=3).W_D.detach()
    assert_same(W_D[1], W_D[0] @ Q, 1e-3)
    assert_same(W_D[2], -W_D[0], 1e-3)


def test_grid_search_sets_every_head_to_the_best_norm(batch: dict[str, Any]) -> None:
    crosscoder = initialized(crosscoder_config(), batch, grid_search_init_norm=True)
    norm = crosscoder.decoder_norm().detach()
    assert_same(norm, norm[0, 0].expand_as(norm), 1e-5)
    assert torch.equal(crosscoder.W_E, crosscoder.W_D.transpose(1, 2))
