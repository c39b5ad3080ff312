"""The sparse autoencoder against its unoptimised twin: forward, every loss term, every gradient."""

import pytest
import torch
from torch import Tensor

from lm_saes.latents.codes import DenseCode, SparseCode

from .comparing import EXACT, SPARSITY, dead_mask, every_term, garbled, losses, same_losses, same_term
from .twin import (
    ACT_FNS,
    IN,
    OUT,
    THETA,
    Twin,
    assert_same,
    assert_same_gradients,
    gradients,
    random_batch,
    random_sae,
    sae_config,
    valid,
)

DEAD = [2, 3, 7, 11, 20]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("shape", "masked"), [((9,), False), ((4, 5), True)])
@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("use_decoder_bias", [False, True])
@pytest.mark.parametrize("use_glu_encoder", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_forward_losses_and_gradients(
    path: str,
    act_fn: str,
    gated: bool,
    use_glu_encoder: bool,
    use_decoder_bias: bool,
    transcoder: bool,
    shape: tuple[int, ...],
    masked: bool,
    dtype: torch.dtype,
) -> None:
    cfg = sae_config(
        transcoder,
        act_fn=act_fn,
        sparsity_include_decoder_norm=gated,
        use_glu_encoder=use_glu_encoder,
        use_decoder_bias=use_decoder_bias,
        dtype=dtype,
    )
    sae, batch, tolerance = random_sae(cfg), random_batch(cfg, shape, masked), EXACT[dtype]
    twin = Twin(sae)

    result = losses(sae, batch, **every_term(act_fn), is_dead=dead_mask(sae, DEAD))
    assert isinstance(result.record.code, SparseCode if path == "sparse" else DenseCode)
    h_NF = twin.hidden(valid(batch[IN], batch))
    assert_same(valid(result["hidden_pre"], batch), h_NF, tolerance, "hidden_pre")
    assert_same(valid(result["feature_acts"], batch), twin.latents(h_NF), tolerance, "feature_acts")
    assert_same(valid(result["reconstructed"], batch), twin.decode(twin.latents(h_NF)), tolerance, "reconstructed")
    assert result["reconstructed"].shape == batch[cfg.hook_point_out].shape
    assert int(result["n_tokens"]) == len(h_NF)

    want = twin.losses(batch, dead=DEAD, k_aux=3)
    total = same_losses(result, want, tolerance)
    assert_same_gradients(gradients(sae, result["loss"]), twin.gradients(total), tolerance)


@pytest.mark.parametrize(("kind", "p"), SPARSITY)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_each_sparsity_loss(path: str, act_fn: str, gated: bool, kind: str, p: float) -> None:
    cfg = sae_config(act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    sae, batch = random_sae(cfg), random_batch(cfg, (3, 5), masked=True)
    twin = Twin(sae)
    got = losses(sae, batch, sparsity_loss_type=kind, p=p, l1_coefficient=0.3)["l_s"]
    want = 0.3 * twin.losses(batch, sparsity=(kind, p))["l_s"]
    found = same_term(sae, twin, got, want, 1e-12)
    assert found["W_D"].abs().sum() > 0  # gradients reach the norms


def test_the_constants_of_tanh_and_tanh_quad() -> None:
    cfg = sae_config(dtype=torch.float64)
    sae, batch = random_sae(cfg), random_batch(cfg)
    twin = Twin(sae)
    f_NF = twin.latents(twin.hidden(batch[IN]))
    for kind in ("tanh", "tanh-quad"):
        settings = {"tanh_stretch_coefficient": 0.7, "frequency_scale": 0.2}
        got = losses(sae, batch, sparsity_loss_type=kind, **settings)["l_s"]
        assert_same(got, twin.sparsity(f_NF, kind, c=0.7, s=0.2), 1e-12, kind)


def test_sparsity_loss_of_tokens_without_latents_has_no_gradient(path: str) -> None:
    cfg = sae_config(dtype=torch.float64)
    sae, batch = random_sae(cfg), random_batch(cfg)
    with torch.no_grad():
        sae.b_E.fill_(-100)
    for p in (0.5, 1, 2):
        got = losses(sae, batch, sparsity_loss_type="power", p=p)["l_s"]
        assert not got.any()
        assert all(float(g.abs().sum()) == 0 for g in gradients(sae, got).values())


@pytest.mark.parametrize("gated", [False, True])
def test_pre_activation_loss(gated: bool) -> None:
    cfg = sae_config(act_fn="jumprelu", sparsity_include_decoder_norm=gated, dtype=torch.float64)
    sae, batch = random_sae(cfg), random_batch(cfg, (3, 5), masked=True)
    twin = Twin(sae)
    got, want = losses(sae, batch, lp_coefficient=0.2)["l_p"], 0.2 * twin.losses(batch)["l_p"]
    found = same_term(sae, twin, got, want, 1e-12)
    assert all(float(found[name].abs().sum()) > 0 for name in ("W_E", "b_E", "W_D", THETA))


# -- AuxK ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k_aux", [1, 4, 100])  # 100: more than there are dead latents
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_auxk_alone(act_fn: str, gated: bool, k_aux: int) -> None:
    cfg = sae_config(True, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    sae, batch = random_sae(cfg), random_batch(cfg, (3, 4), masked=True)
    twin = Twin(sae)
    settings = {"auxk_coefficient": 0.5, "k_aux": k_aux}
    got = losses(sae, batch, is_dead=dead_mask(sae, DEAD), **settings)["l_aux"]
    want = 0.5 * twin.losses(batch, dead=DEAD, k_aux=k_aux)["l_aux"]
    found = same_term(sae, twin, got, want, 1e-12)
    alive = ~dead_mask(sae, DEAD)
    for name, dim in {"W_E": 1, "b_E": 0, "W_D": 0}.items():
        touched = found[name].movedim(dim, 0).abs().reshape(cfg.d_sae, -1).sum(1) > 0
        assert touched.any(), name  # the gradient reaches encoder and decoder
        assert not touched[alive].any(), name  # of dead latents only: the error is detached
    assert float(found["b_D"].abs().sum()) == 0  # neither through the error nor through the decoding


def test_auxk_decodes_without_the_decoder_bias() -> None:
    cfg = sae_config(dtype=torch.float64)
    sae, batch = random_sae(cfg), random_batch(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.b_D.fill_(2.0)  # type: ignore[union-attr]
    got = losses(sae, batch, auxk_coefficient=1.0, is_dead=dead_mask(sae, DEAD))["l_aux"]
    assert_same(got, (batch[IN] - 2.0).square().sum(-1).mean(), 1e-12)  # e alone: nothing explains any of it


@pytest.mark.parametrize("is_dead", [None, torch.zeros(24, dtype=torch.bool)])
def test_auxk_is_zero_when_nothing_is_dead(is_dead: Tensor | None) -> None:
    cfg = sae_config()
    sae, batch = random_sae(cfg), random_batch(cfg)
    result = losses(sae, batch, auxk_coefficient=1.0, is_dead=is_dead)
    assert not result["l_aux"].any()
    assert torch.equal(result["loss"], result["l_rec"])


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_activation", ["inference", "batch-wise", "token-wise"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_what_masked_tokens_hold_changes_nothing(path: str, act_fn: str, norm_activation: str) -> None:
    cfg = sae_config(True, act_fn=act_fn, norm_activation=norm_activation)
    batch = random_batch(cfg, (4, 5), masked=True)
    other = garbled(batch, (IN, OUT))
    found = []
    for given in (batch, other, other | {"mask": batch["mask"].long()}):  # a mask may hold 0 and 1
        sae = random_sae(cfg)
        result = losses(
            sae,
            sae.normalize_activations(given),
            sparsity_loss_type="tanh-quad",
            lp_coefficient=0.1 if act_fn == "jumprelu" else 0.0,
            auxk_coefficient=0.1,
            is_dead=dead_mask(sae, DEAD),
        )
        grads = gradients(sae, result["loss"])
        found.append((result["loss"], result.record.counts, grads, dict(sae.named_buffers())))
    for loss, counts, grads, buffers in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(counts, found[0][1])
        assert_same_gradients(grads, found[0][2], 1e-6)  # products of a matrix differ in rounding with what is in it
        assert all(torch.equal(b, found[0][3][name]) for name, b in buffers.items())


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_half_precision_parameters_give_losses_in_float32(path: str, act_fn: str) -> None:
    cfg = sae_config(act_fn=act_fn, dtype=torch.bfloat16)
    sae, batch = random_sae(cfg), random_batch(cfg, (1000,))
    result = losses(sae, batch, sparsity_loss_type="power", auxk_coefficient=1.0, is_dead=dead_mask(sae, DEAD))
    assert int(result["n_tokens"]) == 1000
    assert {result[name].dtype for name in ("loss", "l_rec", "l_s", "l_aux")} == {torch.float32}
    record = result.record
    difference = (record.reconstruction - record.label)[0].detach().double()
    assert_same(result["l_rec"].detach().double(), difference.square().sum(1).mean(), 1e-5, "l_rec")
    weighed = (record.code.dense() * record.norm[0]).detach().double()
    assert_same(result["l_s"].detach().double(), weighed.sum(1).mean(), 1e-5, "l_s")
    gradients(sae, result["loss"])


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_autocast_changes_rounding_only(path: str, act_fn: str) -> None:
    cfg = sae_config(act_fn=act_fn)
    sae, batch = random_sae(cfg), random_batch(cfg, (300,))
    want = losses(sae, batch, sparsity_loss_type="power")
    exact = gradients(sae, want["loss"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses(random_sae(cfg), batch, sparsity_loss_type="power")
        sae = random_sae(cfg)
        found = gradients(sae, losses(sae, batch, sparsity_loss_type="power")["loss"])
    assert got["l_rec"].dtype == torch.float32
    assert_same(got["loss"], want["loss"], 1e-2)  # bfloat16 keeps 8 bits
    for name in ("W_E", "b_E", "W_D", "b_D"):
        assert found[name].dtype == torch.float32
        assert float((found[name] - exact[name]).norm() / exact[name].norm()) < 0.05, name
