"""What is a cross-layer transcoder's own: causality, layers of their own size, its initialisers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.latents.selection import selector

from .comparing import check_geometric_median
from .site_twin import ACT_FNS, INS, OUTS, SITES, D, F, clt_config, initialized, random_dictionary, skewed_batch
from .twin import THETA, assert_same, random_batch, valid


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("act_fn", [a for a in ACT_FNS if "layer" not in a])  # those let layers compete
def test_a_layer_depends_on_no_layer_above_it(act_fn: str, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "sparse_pays", lambda entries, places: sparse)
    cfg = clt_config(act_fn=act_fn)
    batch = random_batch(cfg, (4, 5), masked=True)  # type: ignore[arg-type]
    for changed in range(SITES):
        clt, other = random_dictionary(cfg), random_dictionary(cfg)
        with torch.no_grad():  # everything of that layer that could reach another: its input, encoder, thresholds
            other.W_E[changed] *= -1.5
            other.b_E[changed] += 0.3
            if act_fn == "jumprelu":
                other.activation_function.log_jumprelu_threshold[changed] -= 2
        moved = {**batch, INS[changed]: 2 * batch[INS[changed]] + 1}
        differs = (other.reconstruct(moved) - clt.reconstruct(batch)).flatten(1).abs().amax(1) > 0
        assert differs.tolist() == [layer >= changed for layer in range(SITES)]


def test_gradients_reach_only_what_writes_to_a_layer() -> None:
    clt = random_dictionary(clt_config())
    batch = random_batch(clt.cfg)
    clt.reconstruct(batch)[0].square().sum().backward()
    assert clt.W_E.grad[0].any() and not clt.W_E.grad[1:].any()
    assert clt.decoders[0].grad[:, 0].any() and not clt.decoders[0].grad[:, 1:].any()
    assert not any(d.grad is not None and d.grad.any() for d in list(clt.decoders)[1:])


def test_decoder_views_by_target_layer() -> None:
    clt = random_dictionary(clt_config())
    assert [tuple(W.shape) for W in clt.W_D] == [(layer + 1, F, D) for layer in range(SITES)]
    assert clt.cfg.n_decoders == sum(len(W) for W in clt.W_D) == 6
    assert all(D_FTD.is_contiguous() and D_FTD.shape == (F, SITES - i, D) for i, D_FTD in enumerate(clt.decoders))
    state = clt.full_state_dict()
    for source in range(SITES):
        for target in range(source, SITES):
            assert torch.equal(state[f"W_D.{target}"][source], clt.decoders[source][:, target - source])


def test_norms_are_joint_over_target_layers() -> None:
    clt = random_dictionary(clt_config())
    want = torch.stack([
        torch.stack([clt.W_D[to][i].square().sum(1) for to in range(i, SITES)]).sum(0).sqrt() for i in range(SITES)
    ])  # fmt: skip
    assert_same(clt.decoder_norm(), want, 1e-6)
    assert clt.decoder_norm(keepdim=True).shape == (SITES, F, 1)
    assert clt.encoder_norm().shape == (SITES, F)
    assert clt.encoder_norm(keepdim=True).shape == (SITES, 1, F)
    assert_same(clt.decoder_bias_norm(), torch.stack([b.norm() for b in clt.b_D]).mean(), 1e-6)
    assert float(random_dictionary(clt_config(use_decoder_bias=False)).decoder_bias_norm()) == 0


# -- initialisation ------------------------------------------------------------------------------------------------


def test_fresh_weights_fill_their_ranges() -> None:
    cfg = clt_config(act_fn="jumprelu", expansion_factor=100.0)
    clt = initialized(cfg, init_log_jumprelu_threshold_value=-0.5)
    for name, parameter in clt.named_parameters():
        if name == THETA:
            assert parameter.shape == (SITES, 600) and (parameter == -0.5).all()
        elif name.startswith("b_"):
            assert not parameter.any()
        else:
            bound = 600**-0.5 if name == "W_E" else (SITES * D) ** -0.5
            assert 0.99 * bound < float(parameter.detach().abs().max()) <= bound, name
            assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_cross_layer_decoders_may_start_at_zero() -> None:
    for off in (True, False):
        clt = initialized(clt_config(init_cross_layer_decoder_all_zero=off))
        for target, W in enumerate(clt.W_D):
            assert W[target].any()
            assert not off or not W[:target].any()
            assert off or all(w.any() for w in W)


def test_tying_and_thresholds_are_refused() -> None:
    with pytest.raises(ConfigError, match="init_encoder_with_decoder_transpose"):
        initialized(clt_config(), init_encoder_with_decoder_transpose=True)
    with pytest.raises(ConfigError, match="init_log_jumprelu_threshold_value"):
        initialized(clt_config(act_fn="jumprelu"))


@pytest.fixture
def batch() -> dict[str, Any]:
    return skewed_batch(clt_config())


def test_decoder_biases_are_geometric_medians(batch: dict[str, Any]) -> None:
    clt = initialized(clt_config(), batch, bias_init_method="geometric_median")
    for b_D, hook in zip(clt.b_D, OUTS, strict=True):
        check_geometric_median(b_D.detach(), valid(batch[hook], batch))
    without = random_dictionary(clt_config(use_decoder_bias=False))
    with pytest.raises(ConfigError, match="use_decoder_bias is off"):
        without.init_decoder_bias_with_geometric_median(batch)


def test_encoder_biases_centre_the_pre_activations(batch: dict[str, Any]) -> None:
    clt = initialized(clt_config(), batch, init_encoder_bias_with_mean_hidden_pre=True)
    h = valid(clt.hidden_pre(clt.prepare_input(batch)), batch)
    assert_same(h.mean(0) + 1, torch.ones(SITES, F), 1e-5)
    assert clt.b_E.any()


@pytest.mark.parametrize("zero", [False, True])
def test_decoders_in_the_active_subspace_of_their_target(batch: dict[str, Any], zero: bool) -> None:
    cfg = clt_config(init_cross_layer_decoder_all_zero=zero)
    fresh = initialized(cfg)
    clt = initialized(cfg, batch, initialize_W_D_with_active_subspace=True, d_active_subspace=2)
    for target, (W, old) in enumerate(zip(clt.W_D, fresh.W_D, strict=True)):
        rows = valid(batch[OUTS[target]], batch).double()
        U = torch.linalg.eigh(torch.cov(rows.T)).eigenvectors[:, -2:].flip(1)  # by variance, descending
        assert_same(W.double() @ (U @ U.T), W.double(), 1e-4, "in the subspace")
        # W[:, :2] U^T up to the sign of each direction
        assert_same((W.double() @ U).abs(), old.double()[..., :2].abs(), 1e-4, "coordinates")
        assert not zero or not W[:target].any()


def test_grid_search_sets_the_joint_norm(batch: dict[str, Any]) -> None:
    clt = initialized(clt_config(), batch, grid_search_init_norm=True)
    norm: Tensor = clt.decoder_norm()
    assert_same(norm, norm[0, 0].expand_as(norm), 1e-5)

    def loss(value: float) -> float:
        clt.set_decoder_to_fixed_norm(value, force_exact=True)
        return float(clt.compute_loss(batch)["l_rec"].detach())  # type: ignore[index]

    best = float(norm[0, 0].detach())
    assert loss(best) <= min(loss(0.1 * i) for i in range(1, 51)) * (1 + 1e-6)
