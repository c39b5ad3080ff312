"""The public methods of the autoencoder: normalisation in every mode, the loss's mapping, what is refused."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.dictionaries.loss_result import LossResult
from lm_saes.errors import ConfigError, DataError

from .twin import ACT_FNS, IN, OUT, Twin, assert_same, random_batch, random_sae, sae_config

NORMS = {IN: 3.0, OUT: 5.0}
# Two tokens of norm 5 and 1 at the input, 2 and 10 at the output; the third is masked.
BATCH = {
    IN: torch.tensor([[3.0, 4.0, 0, 0], [0, 1, 0, 0], [100, 0, 0, 0]]),
    OUT: torch.tensor([[0.0, 2.0, 0, 0], [6, 0, 8, 0], [100, 0, 0, 0]]),
    "tokens": torch.zeros(3, dtype=torch.int64),
    "mask": torch.tensor([True, True, False]),
}


# -- normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "factor_in", "factor_out"),
    [
        ("token-wise", [2 / 5, 2.0, 2 / 100], [1.0, 2 / 10, 2 / 100]),  # sqrt(d) = 2 over each norm
        ("batch-wise", 2 / 3, 2 / 6),  # the mean norms of the valid tokens
        ("dataset-wise", 2 / 3, 2 / 5),
        ("inference", 1.0, 1.0),
    ],
)
def test_normalisation_by_hand(mode: str, factor_in: Any, factor_out: Any) -> None:
    sae = random_sae(sae_config(True, d_model=4, norm_activation=mode))
    sae.set_dataset_average_activation_norm(NORMS)
    scaled, factors = sae.normalize_activations(BATCH, return_scale_factor=True)
    for hook, factor in ((IN, factor_in), (OUT, factor_out)):
        assert torch.equal(factors[hook], sae.compute_norm_factor(BATCH[hook], hook, BATCH["mask"]))
        assert factors[hook].shape == ((3, 1) if mode == "token-wise" else ())
        assert factors[hook].flatten().tolist() == pytest.approx(factor if mode == "token-wise" else [factor])
        torch.testing.assert_close(scaled[hook], BATCH[hook] * factors[hook])
    assert set(scaled) == set(BATCH)
    back = sae.denormalize_activations(BATCH, scaled[OUT])
    torch.testing.assert_close(back, BATCH[OUT])
    assert sae.normalize_activations(BATCH).keys() == BATCH.keys()


@pytest.mark.parametrize("mode", ["token-wise", "batch-wise"])
def test_tokens_of_zeros_stay_zero(mode: str) -> None:
    sae = random_sae(sae_config(d_model=64, expansion_factor=1.0, norm_activation=mode))
    batch = {IN: torch.zeros(2, 64), "tokens": torch.zeros(2, dtype=torch.int64)}
    assert not sae.normalize_activations(batch)[IN].any()
    assert sae.reconstruct(batch).isfinite().all()


def test_activations_come_in_any_type_and_are_computed_with_in_that_of_the_parameters() -> None:
    sae = random_sae(sae_config(norm_activation="token-wise"))
    batch = random_batch(sae.cfg)
    for dtype in (torch.bfloat16, torch.float64):
        got = sae.normalize_activations(batch | {IN: batch[IN].to(dtype)})[IN]
        assert got.dtype == torch.float32
        assert got.norm(dim=-1).tolist() == pytest.approx([math.sqrt(6)] * 9)  # of what was rounded, exactly


def test_dataset_norms_have_to_be_known() -> None:
    sae = random_sae(sae_config(True, norm_activation="dataset-wise"))
    for use in (sae.reconstruct, sae.record, sae.normalize_activations):
        with pytest.raises(ConfigError, match=f"no average norm is known for '{IN}'.*set_dataset_average"):
            use(random_batch(sae.cfg))
    with pytest.raises(ConfigError, match="no average norm is known"):
        sae.standardize_parameters_of_dataset_norm()
    for norms in ({IN: 3.0}, {IN: 3.0, OUT: 0.0}, {IN: 3.0, OUT: math.nan}):
        with pytest.raises(DataError, match=f"'{OUT}' has no positive average norm"):
            sae.set_dataset_average_activation_norm(norms)


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("mode", ["token-wise", "batch-wise", "dataset-wise", "inference"])
@pytest.mark.parametrize(("shape", "masked"), [((9,), False), ((3, 4), True)])
def test_reconstruct_is_raw_in_raw_out(transcoder: bool, mode: str, shape: tuple[int, ...], masked: bool) -> None:
    sae = random_sae(sae_config(transcoder, norm_activation=mode))
    sae.set_dataset_average_activation_norm(NORMS)
    batch, twin, hook = random_batch(sae.cfg, shape, masked, scale=4.0), Twin(sae), sae.cfg.hook_point_out

    def factor(x: Tensor, hook: str) -> Tensor:
        norm = x.square().sum(-1, keepdim=True).sqrt()
        mask = batch.get("mask", torch.ones(shape, dtype=torch.bool))
        size = {
            "token-wise": norm,
            "batch-wise": norm[mask].mean(),
            "dataset-wise": torch.tensor(NORMS[hook]),
            "inference": torch.tensor(math.sqrt(6)),
        }
        return math.sqrt(6) / size[mode]

    x = batch[IN] * factor(batch[IN], IN)
    want = twin.decode(twin.latents(twin.hidden(x))) / factor(batch[hook], hook)
    got = sae.reconstruct(batch)
    assert got.shape == batch[hook].shape
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("mode", ["dataset-wise", "inference"])
def test_a_transcoder_reconstructs_from_its_input_alone(mode: str) -> None:
    sae = random_sae(sae_config(True, norm_activation=mode))
    sae.set_dataset_average_activation_norm(NORMS)
    batch = random_batch(sae.cfg)
    without = {key: value for key, value in batch.items() if key != OUT}
    assert torch.equal(sae.reconstruct(without), sae.reconstruct(batch))


@pytest.mark.parametrize("mode", ["token-wise", "batch-wise"])
def test_a_scale_that_is_not_there_is_missed(mode: str) -> None:
    sae = random_sae(sae_config(True, norm_activation=mode))
    batch = random_batch(sae.cfg)
    del batch[OUT]
    with pytest.raises(DataError, match=f"the scale of '{OUT}' comes from its own activations"):
        sae.reconstruct(batch)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_missing_hook_point() -> None:
    sae = random_sae(sae_config(True))
    batch = random_batch(sae.cfg)
    uses = {IN: (sae.reconstruct, sae.record, sae.compute_loss, sae.prepare_input), OUT: (sae.record, sae.compute_loss)}
    for hook, methods in uses.items():
        rest = {key: value for key, value in batch.items() if key != hook}
        for method in methods:
            with pytest.raises(DataError, match=f"hook point '{hook}' is missing; it has"):
                method(rest)


def test_a_wrong_width() -> None:
    sae = random_sae(sae_config(True))
    for hook in (IN, OUT):
        batch = random_batch(sae.cfg)
        batch[hook] = torch.zeros(9, 7)
        with pytest.raises(DataError, match=rf"{hook}: shape \(9, 7\), wanted \[..., 6\]"):
            sae.compute_loss(batch)


def test_loss_settings_that_cannot_work() -> None:
    sae = random_sae(sae_config())
    batch = random_batch(sae.cfg)
    with pytest.raises(ConfigError, match="lp_coefficient: needs learnt thresholds"):
        sae.compute_loss(batch, lp_coefficient=1.0)
    with pytest.raises(ConfigError, match="sparsity_loss_type='l1': not a sparsity loss; use one of power, tanh"):
        sae.compute_loss(batch, sparsity_loss_type="l1")
    with pytest.raises(ConfigError, match="p: must be greater than 0"):
        sae.compute_loss(batch, sparsity_loss_type="power", p=0)


def test_k_is_set_where_there_is_one() -> None:
    sae = random_sae(sae_config(act_fn="topk"))
    sae.set_current_k(5)
    assert (sae.current_k, sae.cfg.top_k) == (5, 3)
    latents = sae.encode(torch.randn(9, 6) + 50 * sae.W_E[:, 0])
    assert isinstance(latents, Tensor)
    assert int((latents > 0).sum(1).max()) == 5
    relu = random_sae(sae_config())
    assert relu.current_k is None
    with pytest.raises(ConfigError, match="act_fn='relu' has no k to set"):
        relu.set_current_k(5)


# -- the loss's mapping --------------------------------------------------------------------------------------------

KEYS = {
    "loss", "l_rec", "l_s", "l_p", "l_aux", "label", "mask", "n_tokens", "feature_acts", "reconstructed", "hidden_pre",
    "l1_coefficient", "lp_coefficient", "auxk_coefficient",
}  # fmt: skip


@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_the_mapping(act_fn: str) -> None:
    sae = random_sae(sae_config(True, act_fn=act_fn))
    batch = random_batch(sae.cfg, (3, 4), masked=True)
    result = sae.compute_loss(batch, sparsity_loss_type="tanh", l1_coefficient=0.25)
    assert isinstance(result, Mapping)
    assert set(result) == KEYS
    assert len(result) == len(KEYS)
    assert (result["l_p"], result["l_aux"]) == (None, None)
    coefficients = [result[name] for name in ("l1_coefficient", "lp_coefficient", "auxk_coefficient")]
    assert coefficients == [0.25, 0.0, 0.0]
    assert torch.equal(result["loss"], result["l_rec"] + result["l_s"])
    assert torch.equal(result["label"], batch[OUT])
    assert torch.equal(result["mask"], batch["mask"])
    assert int(result["n_tokens"]) == int(batch["mask"].sum())
    assert result["feature_acts"].shape == result["hidden_pre"].shape == (3, 4, 24)
    assert result["reconstructed"].shape == (3, 4, 6)
    with pytest.raises(KeyError):
        result["l_x"]


def test_the_loss_alone() -> None:
    sae = random_sae(sae_config())
    batch = random_batch(sae.cfg)
    got = sae.compute_loss(batch, return_aux_data=False)
    assert isinstance(got, Tensor)
    assert torch.equal(got, sae.compute_loss(batch)["loss"])  # type: ignore[index]


def test_dense_tensors_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae(sae_config(act_fn="topk", expansion_factor=100.0))
    made: list[str] = []
    hidden_pre, result = sae.hidden_pre, sae.compute_loss(random_batch(sae.cfg), sparsity_loss_type="power")
    assert isinstance(result, LossResult)
    code_dense = result.record.code.dense
    monkeypatch.setattr(sae, "hidden_pre", lambda x: made.append("hidden_pre") or hidden_pre(x))
    monkeypatch.setattr(result.record.code, "dense", lambda: made.append("feature_acts") or code_dense())
    for name in ("loss", "l_rec", "l_s", "reconstructed", "label", "n_tokens"):
        assert result[name] is not None
    assert made == []
    assert result["feature_acts"] is result["feature_acts"]
    assert result["hidden_pre"].shape == (9, 600)
    assert made == ["feature_acts", "hidden_pre"]


@pytest.mark.parametrize(("shape", "specs"), [((9,), ("batch", "sae")), ((3, 4), ("batch", "context", "sae"))])
def test_dead_statistics_are_updated_by_the_loss(shape: tuple[int, ...], specs: tuple[str, ...]) -> None:
    sae = random_sae(sae_config())
    batch = random_batch(sae.cfg, shape, masked=True)
    calls: list[tuple[Tensor, Tensor | None, tuple[str, ...]]] = []

    def update(feature_acts: Tensor, mask: Tensor | None, names: tuple[str, ...]) -> Tensor:
        calls.append((feature_acts, mask, names))
        return torch.arange(24) < 5

    result = sae.compute_loss(batch, auxk_coefficient=1.0, update_dead_statistics=update)
    ((acts, mask, names),) = calls
    assert not acts.requires_grad
    assert torch.equal(acts, result["feature_acts"])  # type: ignore[index]
    assert mask is batch["mask"]
    assert names == specs
    want = sae.compute_loss(batch, auxk_coefficient=1.0, is_dead=torch.arange(24) < 5)
    assert torch.equal(result["l_aux"], want["l_aux"])  # type: ignore[index]
    assert result["l_aux"].any()  # type: ignore[index]


# -- the rest of the surface ---------------------------------------------------------------------------------------


def test_norms_by_hand() -> None:
    sae = random_sae(sae_config(d_model=2, expansion_factor=1.0))
    with torch.no_grad():
        sae.W_E.copy_(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        sae.W_D.copy_(torch.tensor([[5.0, 12.0], [0.0, 1.0]]))
        sae.b_D.copy_(torch.tensor([6.0, 8.0]))  # type: ignore[union-attr]
    assert sae.encoder_norm().tolist() == [5.0, 2.0]
    assert sae.decoder_norm().tolist() == [13.0, 1.0]
    assert sae.decoder_norm(keepdim=True).shape == (2, 1)
    assert sae.encoder_norm(keepdim=True).shape == (1, 2)
    assert float(sae.decoder_bias_norm().detach()) == 10.0
    assert float(random_sae(sae_config(use_decoder_bias=False)).decoder_bias_norm()) == 0


def test_encode_gives_unscaled_pre_activations() -> None:
    sae = random_sae(sae_config())
    x = random_batch(sae.cfg, (3, 4))[IN]
    latents, h = sae.encode(x, return_hidden_pre=True)
    assert_same(h, x @ sae.W_E + sae.b_E, 1e-6)
    assert_same(latents, h.relu(), 1e-6)
    assert_same(sae(x), sae.decode(latents), 1e-6)
    assert torch.equal(sae.encode(x), latents)  # type: ignore[arg-type]
