"""The mixture of linear transforms against its unoptimised twin: forward, every loss term, every gradient."""

import pytest
import torch

from lm_saes.dictionaries.molt import MixtureOfLinearTransform
from lm_saes.latents.codes import DenseCode, SparseCode

from .comparing import EXACT, SPARSITY, dead_mask, every_term, garbled, losses, same_losses, same_term
from .molt_twin import MoltTwin, molt_config, random_molt
from .twin import ACT_FNS, IN, OUT, THETA, assert_same, assert_same_gradients, gradients, random_batch, valid

DEAD = [2, 3, 7, 9, 11, 17]  # of every rank


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("shape", "masked"), [((9,), False), ((4, 5), True)])
@pytest.mark.parametrize("hook_point_out", [IN, OUT])
@pytest.mark.parametrize("use_decoder_bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_forward_losses_and_gradients(
    path: str,
    act_fn: str,
    gated: bool,
    use_decoder_bias: bool,
    hook_point_out: str,
    shape: tuple[int, ...],
    masked: bool,
    dtype: torch.dtype,
) -> None:
    cfg = molt_config(
        act_fn=act_fn,
        sparsity_include_decoder_norm=gated,
        use_decoder_bias=use_decoder_bias,
        hook_point_out=hook_point_out,
        dtype=dtype,
    )
    molt, batch, tolerance = random_molt(cfg), random_batch(cfg, shape, masked), EXACT[dtype]
    twin = MoltTwin(molt)
    assert_same(molt.decoder_norm(), twin.norm_F, tolerance)

    result = losses(molt, batch, **every_term(act_fn), is_dead=dead_mask(molt, DEAD))
    assert isinstance(result.record.code, SparseCode if path == "sparse" else DenseCode)
    x_ND = valid(batch[IN], batch)
    h_NF = twin.hidden(x_ND)
    f_NF = twin.latents(h_NF)
    assert_same(valid(result["hidden_pre"], batch), h_NF, tolerance, "hidden_pre")
    assert_same(valid(result["feature_acts"], batch), f_NF, tolerance, "feature_acts")
    assert_same(valid(result["reconstructed"], batch), twin.decode(f_NF, x_ND), tolerance, "reconstructed")
    assert result["reconstructed"].shape == batch[cfg.hook_point_out].shape

    want = twin.losses(batch, dead=DEAD, k_aux=3)
    total = same_losses(result, want, tolerance)
    assert_same_gradients(gradients(molt, result["loss"]), twin.gradients(total), tolerance)


@pytest.mark.parametrize(("kind", "p"), SPARSITY)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_each_sparsity_loss(path: str, act_fn: str, gated: bool, kind: str, p: float) -> None:
    cfg = molt_config(act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    molt, batch = random_molt(cfg), random_batch(cfg, (3, 5), masked=True)
    twin = MoltTwin(molt)
    got = losses(molt, batch, sparsity_loss_type=kind, p=p, l1_coefficient=0.3)["l_s"]
    want = 0.3 * twin.losses(batch, sparsity=(kind, p))["l_s"]
    found = same_term(molt, twin, got, want, 1e-9)
    for side in "UV":  # gradients reach the norms
        assert any(bool(found[f"{side}_matrices.{rank}"].any()) for rank in cfg.ranks)


@pytest.mark.parametrize("gated", [False, True])
def test_pre_activation_loss(gated: bool) -> None:
    cfg = molt_config(act_fn="jumprelu", sparsity_include_decoder_norm=gated, dtype=torch.float64)
    molt, batch = random_molt(cfg), random_batch(cfg, (3, 5), masked=True)
    twin = MoltTwin(molt)
    got, want = losses(molt, batch, lp_coefficient=0.2)["l_p"], 0.2 * twin.losses(batch)["l_p"]
    found = same_term(molt, twin, got, want, 1e-9)
    assert all(found[name].any() for name in ("W_E", "b_E", "U_matrices.1", "V_matrices.9", THETA))


@pytest.mark.parametrize("k_aux", [1, 4, 100])  # 100: more than there are dead latents
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_auxk_alone(path: str, act_fn: str, gated: bool, k_aux: int) -> None:
    cfg = molt_config(act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    molt, batch = random_molt(cfg), random_batch(cfg, (3, 4), masked=True)
    twin = MoltTwin(molt)
    got = losses(molt, batch, is_dead=dead_mask(molt, DEAD), auxk_coefficient=0.5, k_aux=k_aux)["l_aux"]
    want = 0.5 * twin.losses(batch, dead=DEAD, k_aux=k_aux)["l_aux"]
    found = same_term(molt, twin, got, want, 1e-9)
    alive = ~dead_mask(molt, DEAD)
    touched = {
        "W_E": found["W_E"].abs().sum(0) > 0,
        "U": torch.cat([found[f"U_matrices.{rank}"].abs().sum((1, 2)) > 0 for rank in cfg.ranks]),
        "V": torch.cat([found[f"V_matrices.{rank}"].abs().sum((1, 2)) > 0 for rank in cfg.ranks]),
    }
    for name, latents in touched.items():
        assert latents.any(), name  # the gradient reaches encoder and decoder
        assert not latents[alive].any(), name  # of dead latents only: the error is detached
    assert not found["b_D"].any()  # neither through the error nor through the decoding


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_what_masked_tokens_hold_changes_nothing(path: str, act_fn: str) -> None:
    cfg = molt_config(act_fn=act_fn, norm_activation="batch-wise")
    batch = random_batch(cfg, (4, 5), masked=True)
    found = []
    for given in (batch, garbled(batch, (IN, OUT))):
        molt = random_molt(cfg)
        settings = {"auxk_coefficient": 0.1, "lp_coefficient": 0.1 if act_fn == "jumprelu" else 0.0}
        dead, given = dead_mask(molt, DEAD), molt.normalize_activations(given)
        result = losses(molt, given, sparsity_loss_type="tanh-quad", is_dead=dead, **settings)
        found.append((result["loss"], result.record.counts, gradients(molt, result["loss"])))
    assert_same(found[1][0], found[0][0], 1e-6)  # products of a matrix differ in rounding with what is in it
    assert torch.equal(found[1][1], found[0][1])
    assert_same_gradients(found[1][2], found[0][2], 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_latents_of_a_decoder_that_is_zero_have_finite_gradients(path: str, gated: bool) -> None:
    molt = MixtureOfLinearTransform(molt_config(sparsity_include_decoder_norm=gated))
    with torch.no_grad():
        molt.W_E.normal_()
    batch = random_batch(molt.cfg)
    result = losses(molt, batch, sparsity_loss_type="power", p=2, auxk_coefficient=1.0, is_dead=dead_mask(molt, DEAD))
    assert all(bool(g.isfinite().all()) for g in gradients(molt, result["loss"]).values())


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_half_precision_parameters_give_losses_in_float32(path: str, act_fn: str) -> None:
    cfg = molt_config(act_fn=act_fn, dtype=torch.bfloat16)
    molt, batch = random_molt(cfg), random_batch(cfg, (1000,))
    result = losses(molt, batch, sparsity_loss_type="power", auxk_coefficient=1.0, is_dead=dead_mask(molt, DEAD))
    assert {result[name].dtype for name in ("loss", "l_rec", "l_s", "l_aux")} == {torch.float32}
    whole = MixtureOfLinearTransform(cfg.model_copy(update={"dtype": torch.float32}))
    whole.load_full_state_dict(molt.full_state_dict())
    want = losses(whole, {name: x.float() for name, x in batch.items()}, sparsity_loss_type="power")
    for name in ("l_rec", "l_s"):
        assert_same(result[name], want[name], 1e-2, name)
    assert {g.dtype for name, g in gradients(molt, result["loss"]).items() if name != THETA} == {torch.bfloat16}


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_autocast_changes_rounding_only(path: str, act_fn: str) -> None:
    cfg = molt_config(act_fn=act_fn)
    molt, batch = random_molt(cfg), random_batch(cfg, (300,))
    want = losses(molt, batch, sparsity_loss_type="power")
    exact = gradients(molt, want["loss"])
    molt = random_molt(cfg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses(molt, batch, sparsity_loss_type="power")
    found = gradients(molt, got["loss"])
    assert got["l_rec"].dtype == torch.float32
    assert_same(got["loss"], want["loss"], 1e-2)  # bfloat16 keeps 8 bits
    for name in ("W_E", "b_E", "U_matrices.9", "V_matrices.1", "b_D"):
        assert found[name].dtype == torch.float32
        assert float((found[name] - exact[name]).norm() / exact[name].norm()) < 0.05, name
