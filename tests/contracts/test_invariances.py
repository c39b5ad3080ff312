"""What every dictionary kind promises, whatever its mathematics."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig

from ..unit.dictionaries.twin import assert_same, gradients, random_batch
from .kinds import NORMS, VARIANTS, every_variant, example, example_config, new_order, own_latents

SAME = 1e-5
"""The same function in float32, its factors folded or not: rounding of a few products."""


def selected(dictionary: AbstractSparseAutoEncoder, batch: dict[str, Any]) -> Tensor:
    return dictionary.record(batch).code.dense() != 0


def test_every_kind_has_an_example() -> None:
    BaseSAEConfig.kind("sae")
    assert set(VARIANTS) == set(AbstractSparseAutoEncoder.kinds) == set(BaseSAEConfig.registry)


# -- saved = trained, folded = unfolded ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_activation", NORMS)
@every_variant
def test_saved_is_trained(tmp_path: Path, kind: str, variant: str, act_fn: str, norm_activation: str) -> None:
    trained, batch = example(kind, variant, act_fn, norm_activation)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    for step in range(3):
        trained.compute_loss(trained.normalize_activations(batch), return_aux_data=False).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        trained.save_pretrained(tmp_path / str(step))  # in training mode, between steps
        with torch.no_grad():
            want, active = trained.eval().reconstruct(batch), selected(trained, batch)
        trained.train()
        for fold in (True, False):
            loaded = AbstractSparseAutoEncoder.from_pretrained(tmp_path / str(step), fold_activation_scale=fold)
            assert type(loaded) is type(trained)
            assert not loaded.training
            folded = fold and norm_activation == "dataset-wise"
            assert loaded.cfg.norm_activation == ("inference" if folded else norm_activation)
            with torch.no_grad():
                assert_same(loaded.reconstruct(batch), want, SAME, f"step {step}, folded: {folded}")
                assert torch.equal(selected(loaded, batch), active)
    assert trained.cfg.norm_activation == norm_activation  # saving folds nothing in what is being trained


@every_variant
def test_folding_keeps_function_and_selection(kind: str, variant: str, act_fn: str) -> None:
    dictionary, _ = example(kind, variant, act_fn, "dataset-wise")
    settings = dictionary.cfg
    other = random_batch(settings, (2, 4), seed=5, scale=2.0)  # type: ignore[arg-type]
    with torch.no_grad():
        for mode in (dictionary.eval, dictionary.train):  # the running threshold and the budget both follow
            mode()
            want, active = dictionary.reconstruct(other), selected(dictionary, other)
            copy, _ = example(kind, variant, act_fn, "dataset-wise")
            copy.load_full_state_dict(dictionary.full_state_dict())
            copy.train(dictionary.training)
            copy.standardize_parameters_of_dataset_norm()
            assert copy.cfg.norm_activation == "inference"
            assert_same(copy.reconstruct(other), want, SAME)
            assert torch.equal(selected(copy, other), active)
            assert 0 < int(active.sum()) < active.numel()
    assert settings.norm_activation == "dataset-wise"  # the config that was given is the caller's


@pytest.mark.parametrize("norm_activation", ["token-wise", "batch-wise"])
@every_variant
def test_scales_that_depend_on_the_activations_cannot_be_folded(
    kind: str, variant: str, act_fn: str, norm_activation: str
) -> None:
    dictionary, _ = example(kind, variant, act_fn, norm_activation)
    with pytest.raises(NotImplementedError, match=f"{norm_activation}.*depends on the activations"):
        dictionary.standardize_parameters_of_dataset_norm()


# -- the same function in other coordinates ------------------------------------------------------------------------


@every_variant
def test_unit_decoder_norm_keeps_the_function(kind: str, variant: str, act_fn: str) -> None:
    dictionary, _ = example(kind, variant, act_fn, "dataset-wise")
    other = random_batch(dictionary.cfg, (2, 4), seed=5, scale=2.0)  # type: ignore[arg-type]
    dictionary.eval()
    with torch.no_grad():
        want, active = dictionary.reconstruct(other), selected(dictionary, other)
    if reason := no_unit_norm(kind, variant, act_fn):
        with pytest.raises(NotImplementedError, match=reason):
            dictionary.transform_to_unit_decoder_norm()
        return
    dictionary.transform_to_unit_decoder_norm()
    with torch.no_grad():
        assert_same(dictionary.decoder_norm(), torch.ones_like(dictionary.decoder_norm()), SAME)
        assert_same(dictionary.reconstruct(other), want, SAME)
        assert torch.equal(selected(dictionary, other), active)


def no_unit_norm(kind: str, variant: str, act_fn: str) -> str | None:
    """Why decoder norms cannot be moved into the encoder, where they cannot."""
    if kind in ("crosscoder", "tied"):
        return "share one encoder" if kind == "crosscoder" else "cannot take in"
    return "without gating" if variant == "ungated" and "topk" in act_fn else None


@every_variant
def test_permuted_latents_are_permuted_outputs(kind: str, variant: str, act_fn: str) -> None:
    if (kind, variant, act_fn) == ("crosscoder", "ungated", "layertopk"):
        return  # ungated heads select on the same h: which of two equal ones is the last of k depends on the order
    dictionary, batch = example(kind, variant, act_fn)
    permuted, _ = example(kind, variant, act_fn)
    order = new_order(dictionary)
    with torch.no_grad():
        for name, parameter in permuted.named_parameters():
            dim = dictionary.dim_maps()[name].get("model")
            if dim is not None:
                own = own_latents(dictionary, name)
                parameter.copy_(parameter.index_select(dim, order[own.start : own.stop] - own.start))
        for mode in ("train", "eval"):
            a, b = (getattr(d, mode)().record(batch) for d in (dictionary, permuted))
            assert_same(b.code.dense(), a.code.dense()[:, order], SAME)
            assert_same(b.reconstruction, a.reconstruction, SAME)


# -- sums over tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["power", "tanh"])
@every_variant
def test_two_micro_batches_are_one_batch(kind: str, variant: str, act_fn: str, sparsity: str) -> None:
    dictionary, batch = example(kind, variant, act_fn)
    if act_fn.startswith("batch"):  # in training it chooses within each micro-batch
        dictionary.eval()
    settings: dict[str, Any] = {
        "sparsity_loss_type": sparsity,
        "p": 2,
        "lp_coefficient": 0.3 if act_fn == "jumprelu" else 0.0,
        "auxk_coefficient": 0.2,
        "k_aux": 2,
        "is_dead": torch.arange(math.prod(dictionary.dead_shape)).view(dictionary.dead_shape) % 3 == 0,
    }

    def loss(given: dict[str, Any]) -> Tensor:
        found = dictionary.compute_loss(given, return_aux_data=False, **settings)
        assert isinstance(found, Tensor)
        return found

    parts = [{key: x[rows] for key, x in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    n_valid = [int(part["mask"].sum()) for part in parts]
    assert n_valid[0] * 3 != n_valid[1]  # not simply a mean of means
    together = (loss(parts[0]) * n_valid[0] + loss(parts[1]) * n_valid[1]) / sum(n_valid)
    whole = loss(batch)
    assert_same(together, whole, SAME)
    found, wanted = gradients(dictionary, together), gradients(dictionary, whole)  # type: ignore[arg-type]
    for name in wanted:
        assert_same(found[name], wanted[name], SAME, name)


# -- norms ---------------------------------------------------------------------------------------------------------


@every_variant
def test_fixed_norms(kind: str, variant: str, act_fn: str) -> None:
    dictionary, _ = example(kind, variant, act_fn)
    with torch.no_grad():
        before = dictionary.decoder_norm().clone()
        middle = float(before.median())
        dictionary.set_decoder_to_fixed_norm(middle, force_exact=False)
        assert_same(dictionary.decoder_norm(), before.clamp(max=middle), SAME)  # only shrinks what is above
        dictionary.set_decoder_to_fixed_norm(5.0, force_exact=True)
        assert_same(dictionary.decoder_norm(), torch.full_like(before, 5.0), SAME)
        if dictionary.has_encoder_norm:
            dictionary.set_encoder_to_fixed_norm(0.25)
            assert_same(dictionary.encoder_norm(), torch.full_like(dictionary.encoder_norm(), 0.25), SAME)


@every_variant
def test_a_zero_direction_stays_zero(kind: str, variant: str, act_fn: str) -> None:
    dictionary = AbstractSparseAutoEncoder.from_config(example_config(kind, variant, act_fn))
    before = {name: parameter.detach().clone() for name, parameter in dictionary.named_parameters()}
    dictionary.set_decoder_to_fixed_norm(5.0, force_exact=True)
    if dictionary.has_encoder_norm:
        dictionary.set_encoder_to_fixed_norm(5.0)
    if not no_unit_norm(kind, variant, act_fn):
        dictionary.transform_to_unit_decoder_norm()
    for name, parameter in dictionary.named_parameters():
        assert torch.equal(parameter, before[name]), name  # neither NaN nor anything else


# -- parameters ----------------------------------------------------------------------------------------------------


@every_variant
def test_parameters_are_named_cut_and_grouped(kind: str, variant: str, act_fn: str) -> None:
    dictionary, _ = example(kind, variant, act_fn)
    named = dict(dictionary.named_parameters())
    assert dictionary.dim_maps().keys() == named.keys()
    for name, cuts in dictionary.dim_maps().items():
        if "model" in cuts:
            assert named[name].shape[cuts["model"]] == len(own_latents(dictionary, name)), name
    groups = {group["name"]: group["params"] for group in dictionary.get_parameters()}
    assert set(groups) == ({"others", "jumprelu"} if act_fn == "jumprelu" else {"others"})
    grouped = [id(p) for params in groups.values() for p in params]
    assert sorted(grouped) == sorted(map(id, named.values()))  # each in one group
    thresholds = {id(p) for name, p in named.items() if name.endswith("log_jumprelu_threshold")}
    assert {id(p) for p in groups.get("jumprelu", [])} == thresholds
    assert all(named[n].dtype == torch.float32 for n in named)


@every_variant
def test_state_goes_round(kind: str, variant: str, act_fn: str) -> None:
    dictionary, _ = example(kind, variant, act_fn, "dataset-wise")
    state = dictionary.full_state_dict()
    own = set(dict(dictionary.named_parameters())) | set(dict(dictionary.named_buffers()))
    assert set(state) >= {name for name in own if not name.startswith("decoders.")}  # a CLT's have other names in files
    for hook in dictionary.cfg.associated_hook_points:
        assert state[f"dataset_average_activation_norm.{hook}"].shape == ()
    other = AbstractSparseAutoEncoder.from_config(dictionary.cfg)
    other.load_full_state_dict(state)
    assert other.dataset_average_activation_norm == dictionary.dataset_average_activation_norm
    for name, tensor in other.full_state_dict().items():
        assert torch.equal(tensor, state[name]), name


# -- raw in, raw out -----------------------------------------------------------------------------------------------


@every_variant
def test_scaling_the_activations_scales_the_reconstruction(kind: str, variant: str, act_fn: str) -> None:
    """Token-wise and batch-wise factors take a scale out and put it back: raw in, raw out."""
    for norm_activation in ("token-wise", "batch-wise"):
        dictionary, batch = example(kind, variant, act_fn, norm_activation)
        dictionary.eval()
        larger = dict(batch)
        for hook in dictionary.cfg.associated_hook_points:
            larger[hook] = 16 * batch[hook]
        with torch.no_grad():
            want = 16 * dictionary.reconstruct(batch)
            assert_same(dictionary.reconstruct(larger), want, SAME, norm_activation)
        assert math.isfinite(float(want.sum()))


@pytest.mark.parametrize("norm_activation", NORMS)
@every_variant
def test_reconstruct_is_the_record_brought_back_to_the_raw_scale(
    kind: str, variant: str, act_fn: str, norm_activation: str
) -> None:
    dictionary, batch = example(kind, variant, act_fn, norm_activation)
    dictionary.eval()
    with torch.no_grad():
        record, raw = dictionary.record(batch), dictionary.reconstruct(batch)
        # How far the reconstruction is off, measured in the label's norm, is the same on either scale.
        label = dictionary.prepare_label(batch).reshape(record.label.shape)
        off = (raw.reshape(label.shape) - label).norm(dim=-1) / label.norm(dim=-1)
        assert_same(off, (record.reconstruction - record.label).norm(dim=-1) / record.label.norm(dim=-1), SAME)
        x = dictionary.prepare_input(dictionary.normalize_activations(batch))
        latents, h = dictionary.encode(x, return_hidden_pre=True)
        assert_same(latents.reshape(record.code.dense().shape), record.code.dense(), SAME)  # type: ignore[union-attr]
        assert_same(h, dictionary.hidden_pre(x), SAME)  # type: ignore[arg-type]
        assert_same(dictionary.forward(x).reshape(record.reconstruction.shape), record.reconstruction, SAME)
        decoded = dictionary.decode(latents, x) if kind == "molt" else dictionary.decode(latents)  # type: ignore[arg-type, call-arg]
        assert_same(decoded, dictionary.forward(x), SAME)
