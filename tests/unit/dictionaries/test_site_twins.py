"""Cross-layer transcoder and crosscoder against their unoptimised twins: forward, losses, gradients, thresholds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.latents.codes import DenseCode, SparseCode
from lm_saes.latents.selection import selector

from .comparing import EXACT, SPARSITY, every_term, garbled, losses, same_losses
from .site_twin import (
    CONFIGS,
    SITES,
    THRESHOLD,
    batch_for,
    both_gatings,
    by_site,
    dead_latents,
    every_act_fn,
    every_kind,
    file_gradients,
    made,
    random_dictionary,
    tokens_of,
    twin_of,
)
from .twin import THETA, assert_same, assert_same_gradients, random_batch, valid


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("shape", "masked"), [((9,), False), ((8,), True), ((4, 5), False), ((4, 5), True)])
@pytest.mark.parametrize("use_decoder_bias", [False, True])
@both_gatings
@every_act_fn
@every_kind
def test_forward_losses_and_gradients(
    path: str,
    kind: str,
    act_fn: str,
    gated: bool,
    use_decoder_bias: bool,
    shape: tuple[int, ...],
    masked: bool,
    dtype: torch.dtype,
) -> None:
    settings = {"sparsity_include_decoder_norm": gated, "use_decoder_bias": use_decoder_bias, "dtype": dtype}
    dictionary = made(kind, act_fn=act_fn, **settings)
    batch, tolerance = batch_for(dictionary, shape, masked), EXACT[dtype]
    twin, dead = twin_of(dictionary), dead_latents(dictionary)

    result = losses(dictionary, batch, **every_term(act_fn), is_dead=dead)
    assert isinstance(result.record.code, SparseCode if path == "sparse" else DenseCode)
    _, h, f, y_hat = twin.forward(batch)
    hidden = h if kind == "clt" else h[:, 0]  # a crosscoder's heads share one
    assert_same(valid(result["hidden_pre"], batch), hidden, tolerance, "hidden_pre")
    assert_same(valid(result["feature_acts"], batch), f, tolerance, "feature_acts")
    assert_same(valid(result["reconstructed"].movedim(0, -2), batch).movedim(0, 1), y_hat, tolerance, "reconstructed")
    assert result["feature_acts"].shape == (*shape, SITES, dictionary.cfg.d_sae)
    assert result["reconstructed"].shape == result["label"].shape == (SITES, *shape, dictionary.cfg.d_model)
    assert int(result["n_tokens"]) == tokens_of(batch)
    assert 0 < int((f > 0).sum()) < f.numel()

    want = twin.losses(batch, dead_SF=by_site(dead, SITES), k_aux=3)
    total = same_losses(result, want, tolerance)
    assert_same_gradients(file_gradients(dictionary, result["loss"]), twin.gradients(total), tolerance)


@both_gatings
@pytest.mark.parametrize("act_fn", ["layertopk", "batchlayertopk"])
@every_kind
def test_more_latents_than_one_site_has(path: str, kind: str, act_fn: str, gated: bool) -> None:
    """Sites that compete may share a k above the 24 latents of each."""
    dictionary = made(kind, act_fn=act_fn, top_k=30, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    batch, twin = batch_for(dictionary, (40,), masked=True), twin_of(dictionary)
    _, h, f, _ = twin.forward(batch)
    assert_same(valid(losses(dictionary, batch)["feature_acts"], batch), f, 1e-9)
    assert 0 < int((f > 0).sum()) < int((h > 0).sum())  # some of the positive ones are not among them


@pytest.mark.parametrize(("loss", "p"), SPARSITY)
@both_gatings
@every_act_fn
@every_kind
def test_each_sparsity_loss(path: str, kind: str, act_fn: str, gated: bool, loss: str, p: float) -> None:
    dictionary = made(kind, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    batch = batch_for(dictionary, (3, 5), masked=True)
    twin = twin_of(dictionary)
    got = losses(dictionary, batch, sparsity_loss_type=loss, p=p, l1_coefficient=0.3)["l_s"]
    want = 0.3 * twin.losses(batch, sparsity=(loss, p))["l_s"]
    assert_same(got, want, 1e-12, loss)
    found = file_gradients(dictionary, got)
    assert_same_gradients(found, twin.gradients(want), 1e-9)
    decoders = [g for name, g in found.items() if name.startswith("W_D")]
    assert all(float(g.abs().sum()) > 0 for g in decoders)  # gradients reach the norms


@every_kind
def test_the_constants_of_tanh_and_tanh_quad(kind: str) -> None:
    dictionary = made(kind, dtype=torch.float64)
    batch = batch_for(dictionary)
    twin = twin_of(dictionary)
    f = twin.forward(batch)[2]
    for loss in ("tanh", "tanh-quad"):
        settings = {"tanh_stretch_coefficient": 0.7, "frequency_scale": 0.2}
        got = losses(dictionary, batch, sparsity_loss_type=loss, **settings)["l_s"]
        assert_same(got, twin.sparsity(f, loss, c=0.7, s=0.2), 1e-12, loss)


@both_gatings
@every_kind
def test_pre_activation_loss(kind: str, gated: bool) -> None:
    dictionary = made(kind, act_fn="jumprelu", sparsity_include_decoder_norm=gated, dtype=torch.float64)
    batch = batch_for(dictionary, (3, 5), masked=True)
    twin = twin_of(dictionary)
    got, want = losses(dictionary, batch, lp_coefficient=0.2)["l_p"], 0.2 * twin.losses(batch)["l_p"]
    assert_same(got, want, 1e-12)
    found = file_gradients(dictionary, got)
    assert_same_gradients(found, twin.gradients(want), 1e-9)
    assert all(float(g.abs().sum()) > 0 for name, g in found.items() if not name.startswith("b_D"))


@pytest.mark.parametrize("act_fn", ["relu", "topk"])
@every_kind
def test_pre_activation_loss_without_thresholds_is_refused(kind: str, act_fn: str) -> None:
    dictionary = made(kind, act_fn=act_fn)
    with pytest.raises(ConfigError, match=r"lp_coefficient.*jumprelu"):
        losses(dictionary, batch_for(dictionary), lp_coefficient=0.1)


# -- AuxK ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k_aux", [1, 4, 100])  # 100: more than there are dead latents
@both_gatings
@every_act_fn
@every_kind
def test_auxk_alone(kind: str, act_fn: str, gated: bool, k_aux: int) -> None:
    dictionary = made(kind, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    batch, dead = batch_for(dictionary, (3, 4), masked=True), dead_latents(dictionary)
    twin = twin_of(dictionary)
    got = losses(dictionary, batch, is_dead=dead, auxk_coefficient=0.5, k_aux=k_aux)["l_aux"]
    want = 0.5 * twin.losses(batch, dead_SF=by_site(dead, SITES), k_aux=k_aux)["l_aux"]
    assert_same(got, want, 1e-12)
    found = file_gradients(dictionary, got)
    assert_same_gradients(found, twin.gradients(want), 1e-9)
    b_E = found["b_E"].abs() > 0
    assert b_E.any() and not (b_E & ~by_site(dead, SITES)).any()  # of dead latents only: the error is detached
    assert float(found["W_E"].abs().sum()) > 0
    assert all(float(g.abs().sum()) == 0 for name, g in found.items() if name.startswith("b_D"))


@pytest.mark.parametrize("some", [False, True])
@every_kind
def test_auxk_is_zero_when_nothing_is_dead(kind: str, some: bool) -> None:
    dictionary = made(kind)
    none = torch.zeros(dictionary.dead_shape, dtype=torch.bool) if some else None
    result = losses(dictionary, batch_for(dictionary), auxk_coefficient=1.0, is_dead=none)
    assert not result["l_aux"].any()
    assert torch.equal(result["loss"], result["l_rec"])


# -- JumpReLU's window ---------------------------------------------------------------------------------------------


@both_gatings
@every_kind
def test_threshold_gradient_by_the_rule(path: str, kind: str, gated: bool) -> None:
    """`dL/d log theta = -(theta^2 / window) g` summed over the window, g the gradient in the units of s."""
    window = 0.7
    dictionary = made(
        kind, act_fn="jumprelu", jumprelu_threshold_window=window, sparsity_include_decoder_norm=gated,
        dtype=torch.float64,
    )  # fmt: skip
    batch = batch_for(dictionary, (40,))
    twin = twin_of(dictionary)
    y, h, f, y_hat = twin.forward(batch)
    got = file_gradients(dictionary, losses(dictionary, batch)["loss"])[THETA]

    error = 2 * (y_hat - y).detach() / (len(h) * SITES)
    (g_h,) = torch.autograd.grad(twin.decode(leaf := f.detach().requires_grad_()), leaf, error)
    scale = twin.norm_SF.detach() if gated else torch.ones_like(twin.norm_SF)
    s, theta = (h * scale).detach(), dictionary.activation_function.log_threshold.detach().exp().double()
    near = ((s - theta).abs() < window / 2) & (s > 0)
    assert (near & (s <= theta)).any() and (near & (s > theta)).any()  # unkept and kept
    assert (~near & (s > theta)).any()
    want = -(theta**2) / window * (near * g_h / scale).sum(0)
    assert got.shape == dictionary.cfg.threshold_shape
    assert_same(got, want if kind == "clt" else want.sum(0), 1e-6)


# -- running thresholds --------------------------------------------------------------------------------------------


@both_gatings
@pytest.mark.parametrize("act_fn", ["batchtopk", "batchlayertopk"])
@every_kind
def test_running_thresholds(path: str, kind: str, act_fn: str, gated: bool) -> None:
    """First value as is, then decay 0.99; in evaluation `s > threshold`; a CLT's layers have one each."""
    dictionary = made(kind, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    twin = twin_of(dictionary)
    per_layer = (kind, act_fn) == ("clt", "batchtopk")

    def smallest(batch: dict[str, Any]) -> Tensor:
        _, h, f, _ = twin.forward(batch)
        s = torch.where(f > 0, h * twin.scale(), torch.inf)
        return (s.amin((0, 2)) if per_layer else s.amin()).detach().float()

    batches = [batch_for(dictionary, (3, 5), masked=True, seed=seed, scale=1 + seed) for seed in range(4)]
    want = smallest(batches[0])
    threshold = dict(dictionary.named_buffers())[THRESHOLD]
    assert threshold.dtype == torch.float32
    assert threshold.shape == ((SITES,) if per_layer else ())
    for step, batch in enumerate(batches):
        if step:
            want = 0.99 * want + 0.01 * smallest(batch)
        losses(dictionary, batch)
        assert_same(threshold, want, 1e-6, f"step {step}")
    if per_layer:
        assert len(set(want.tolist())) == SITES

    dictionary.eval()
    before = threshold.clone()
    result = losses(dictionary, batches[0] | {"mask": torch.ones(3, 5, dtype=torch.bool)})
    h = twin.forward({k: v for k, v in batches[0].items() if k != "mask"})[1]
    cut = before.double().view(-1, 1) if per_layer else before.double()
    kept = h * twin.scale() > cut
    assert_same(result["feature_acts"].flatten(0, 1), torch.where(kept, h, 0), 1e-9)
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(threshold, before)  # evaluation moves nothing


@both_gatings
@pytest.mark.parametrize("act_fn", ["batchtopk", "batchlayertopk"])
@every_kind
def test_batchwide_selection_keeps_exactly_its_budget_through_misses(kind: str, act_fn: str, gated: bool) -> None:
    """After batches of large activations the floor under candidates is far too high for a batch of small ones."""
    dictionary = made(kind, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    with torch.no_grad():
        dictionary.b_E.zero_()
    twin = twin_of(dictionary)
    sparse = pytest.MonkeyPatch()
    sparse.setattr(selector, "sparse_pays", lambda entries, places: True)
    try:
        losses(dictionary, batch_for(dictionary, (50,), scale=100.0))
        batch = batch_for(dictionary, (8,), masked=True, scale=0.01)
        result = losses(dictionary, batch)
    finally:
        sparse.undo()
    f = twin.forward(batch)[2]
    assert_same(valid(result["feature_acts"], batch), f, 1e-9)
    pools = SITES if act_fn == "batchtopk" else 1
    assert int((f > 0).sum()) == 3 * tokens_of(batch) * pools
    if (kind, act_fn) == ("clt", "batchtopk"):
        assert (f > 0).sum((0, 2)).tolist() == [3 * tokens_of(batch)] * SITES


@pytest.mark.parametrize(("act_fn", "per_token"), [("topk", 6), ("layertopk", 2)])
@every_kind
def test_current_k_is_what_counts(path: str, kind: str, act_fn: str, per_token: int) -> None:
    dictionary = made(kind, act_fn=act_fn)
    with torch.no_grad():
        dictionary.b_E.fill_(100.0)  # everything positive
    dictionary.set_current_k(2)
    f = losses(dictionary, batch_for(dictionary))["feature_acts"]
    assert ((f > 0).sum((1, 2)) == per_token).all()


@pytest.mark.parametrize("act_fn", ["layertopk", "batchlayertopk", "batchtopk"])
def test_ungated_heads_tie_and_exactly_k_are_kept(act_fn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads of a crosscoder select on the same h: 5 of them are not a whole number of latents."""
    kept = []
    for sparse in (True, False, True):
        monkeypatch.setattr(selector, "sparse_pays", lambda entries, places, sparse=sparse: sparse)
        dictionary = made("crosscoder", act_fn=act_fn, sparsity_include_decoder_norm=False, top_k=5)
        with torch.no_grad():
            dictionary.b_E.fill_(100.0)
        f = losses(dictionary, batch_for(dictionary, (7,)))["feature_acts"] > 0
        assert int(f.sum()) == 5 * 7 * (SITES if act_fn == "batchtopk" else 1)
        kept.append(f)
    assert torch.equal(kept[0], kept[2])
    if act_fn != "batchlayertopk":  # there the two paths break one tie of the whole batch each in its own way
        assert torch.equal(kept[0], kept[1])


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_activation", ["inference", "batch-wise", "token-wise"])
@every_act_fn
@every_kind
def test_what_masked_tokens_hold_changes_nothing(path: str, kind: str, act_fn: str, norm_activation: str) -> None:
    cfg = CONFIGS[kind](act_fn=act_fn, norm_activation=norm_activation)
    batch = random_batch(cfg, (4, 5), masked=True)
    other = garbled(batch, cfg.associated_hook_points)
    found = []
    for given in (batch, other, other | {"mask": batch["mask"].long()}):  # a mask may hold 0 and 1
        dictionary = random_dictionary(cfg)
        result = losses(
            dictionary,
            dictionary.normalize_activations(given),
            sparsity_loss_type="tanh-quad",
            lp_coefficient=0.1 if act_fn == "jumprelu" else 0.0,
            auxk_coefficient=0.1,
            is_dead=dead_latents(dictionary),
        )
        grads = file_gradients(dictionary, result["loss"])
        found.append((result["loss"], dictionary.latent_counts(result.record), grads, dict(dictionary.named_buffers())))
    for loss, counts, grads, buffers in found[1:]:
        assert_same(loss, found[0][0], 1e-6)
        assert torch.equal(counts, found[0][1])
        assert_same_gradients(grads, found[0][2], 1e-5)  # products of a matrix differ in rounding with what is in it
        assert all(torch.equal(b, found[0][3][name]) for name, b in buffers.items() if b is not None)


# -- forward, decode, shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9,), (4, 5)])
@every_act_fn
@every_kind
def test_decode_of_encode_is_the_reconstruction(path: str, kind: str, act_fn: str, shape: tuple[int, ...]) -> None:
    dictionary = made(kind, act_fn=act_fn)
    batch = batch_for(dictionary, shape)
    losses(dictionary, batch)  # running thresholds
    dictionary.eval()
    with torch.no_grad():
        x = dictionary.prepare_input(batch)
        assert x.shape == (SITES, *shape, 6)
        latents, h = dictionary.encode(x, return_hidden_pre=True)
        assert latents.shape == (*shape, SITES, 24)
        assert h.shape == ((*shape, SITES, 24) if kind == "clt" else (*shape, 24))
        reconstruction = dictionary.reconstruct(batch)
        assert reconstruction.shape == x.shape
        assert_same(dictionary.decode(latents), reconstruction, 1e-6)
        assert_same(dictionary.forward(x), reconstruction, 1e-6)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk", "layertopk", "batchlayertopk"])
@both_gatings
@every_kind
def test_one_site_alone(path: str, kind: str, gated: bool, act_fn: str) -> None:
    """A CLT of one layer and a crosscoder of one head keep their shapes."""
    dictionary = made(kind, sites=1, act_fn=act_fn, sparsity_include_decoder_norm=gated, dtype=torch.float64)
    batch = batch_for(dictionary, (3, 5), masked=True)
    twin, dead = twin_of(dictionary), dead_latents(dictionary)
    result = losses(
        dictionary, batch, sparsity_loss_type="tanh-quad", auxk_coefficient=1.0, k_aux=2, is_dead=dead,
        lp_coefficient=1.0 if act_fn == "jumprelu" else 0.0,
    )  # fmt: skip
    want = twin.losses(batch, ("tanh-quad", 1), by_site(dead, 1), 2)
    f = twin.forward(batch)[2]
    assert result["feature_acts"].shape == (3, 5, 1, 24)
    assert_same(valid(result["feature_acts"], batch), f, 1e-9)
    counts = dictionary.latent_counts(result.record)
    assert counts.shape == dictionary.dead_shape
    assert counts.flatten().tolist() == (f > 0).sum((0, 1)).tolist()
    total = same_losses(result, want, 1e-9)
    assert_same_gradients(file_gradients(dictionary, result["loss"]), twin.gradients(total), 1e-9)
