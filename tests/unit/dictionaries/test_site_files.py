"""Cross-layer transcoder and crosscoder: folding, files, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.errors import CheckpointError, ConfigError, DataError

from .comparing import losses
from .site_twin import CONFIGS, batch_for, both_gatings, every_act_fn, every_kind, made, twin_of
from .twin import THETA, assert_same

# -- folding, saving -----------------------------------------------------------------------------------------------


def with_norms(kind: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A dictionary of dataset-wise norms that differ by hook point, and a raw batch."""
    dictionary = made(kind, norm_activation="dataset-wise", dtype=torch.float64, **settings)
    hooks = dictionary.cfg.associated_hook_points
    dictionary.set_dataset_average_activation_norm({hook: 0.7 + 1.9 * i for i, hook in enumerate(hooks)})
    batch = batch_for(dictionary, (40,))
    for i, hook in enumerate(hooks):
        batch[hook] = batch[hook] * (0.5 + i)
    losses(dictionary, dictionary.normalize_activations(batch))
    return dictionary, batch


@both_gatings
@every_act_fn
@every_kind
def test_folded_is_unfolded(path: str, kind: str, act_fn: str, gated: bool, tmp_path: Path) -> None:
    dictionary, batch = with_norms(kind, act_fn=act_fn, sparsity_include_decoder_norm=gated)
    dictionary.save_pretrained(tmp_path)
    dictionary.eval()
    trained_norm = dictionary.decoder_norm().detach().clone()
    want, active = dictionary.reconstruct(batch), dictionary.record(batch).code.dense() > 0
    dictionary.standardize_parameters_of_dataset_norm()
    assert (dictionary.selection_norm is not None) == gated
    if gated:
        assert_same(dictionary.selection_norm, trained_norm, 1e-12)
        ratio = dictionary.decoder_norm().detach() / trained_norm
        assert float(ratio.max() / ratio.min()) > 1.3  # no common factor could have replaced the buffer
    loaded = AbstractSparseAutoEncoder.from_pretrained(tmp_path)
    for folded in (dictionary, loaded):
        assert folded.cfg.norm_activation == "inference"
        assert_same(folded.reconstruct(batch), want, 1e-9)
        assert torch.equal(folded.record(batch).code.dense() > 0, active)
    dictionary.save_pretrained(tmp_path / "folded")  # `selection_norm` is in the files
    again = AbstractSparseAutoEncoder.from_pretrained(tmp_path / "folded")
    assert ("selection_norm" in load_file(tmp_path / "folded" / "sae_weights.safetensors")) == gated
    assert torch.equal(again.reconstruct(batch), dictionary.reconstruct(batch))


@both_gatings
@every_act_fn
def test_unit_norms_of_a_folded_clt(act_fn: str, gated: bool) -> None:
    if not gated and "topk" in act_fn:
        return  # refused, see the contracts
    dictionary, batch = with_norms("clt", act_fn=act_fn, sparsity_include_decoder_norm=gated)
    dictionary.eval()
    dictionary.standardize_parameters_of_dataset_norm()
    want, before = dictionary.reconstruct(batch), dictionary.record(batch).code.dense()
    dictionary.transform_to_unit_decoder_norm()
    assert torch.equal(dictionary.record(batch).code.dense() > 0, before > 0)
    assert_same(dictionary.decoder_norm(), torch.ones_like(dictionary.decoder_norm()), 1e-9)
    assert_same(dictionary.reconstruct(batch), want, 1e-6)


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "clt": {
        "W_E": (3, 6, 24),
        "b_E": (3, 24),
        **{f"W_D.{to}": (to + 1, 24, 6) for to in range(3)},
        **{f"b_D.{to}": (6,) for to in range(3)},
        THETA: (3, 24),
    },
    "crosscoder": {"W_E": (3, 6, 24), "b_E": (3, 24), "W_D": (3, 24, 6), "b_D": (3, 6), THETA: (24,)},
}


@every_kind
def test_files_have_the_names_and_shapes_of_the_specification(kind: str, tmp_path: Path) -> None:
    dictionary = made(kind, act_fn="jumprelu")
    dictionary.save_pretrained(tmp_path)
    files = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in files.items()} == SHAPES[kind]


@every_kind
def test_a_file_written_by_hand_loads(kind: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES[kind].items()}
    dictionary = AbstractSparseAutoEncoder.from_config(CONFIGS[kind](act_fn="jumprelu"))
    dictionary.load_full_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in dictionary.full_state_dict().items())
    strides = {name: p.stride() for name, p in made(kind, act_fn="jumprelu").named_parameters()}
    assert {name: p.stride() for name, p in dictionary.named_parameters()} == strides  # latent-major as ever
    batch = batch_for(dictionary)
    twin = twin_of(dictionary)
    with torch.no_grad():
        for name in twin.p:
            twin.p[name].copy_(state[name])
    assert_same(losses(dictionary, batch)["l_rec"], twin.losses(batch)["l_rec"], 1e-5)


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape", "width"])
@every_kind
def test_files_that_do_not_fit_are_refused_by_their_names(kind: str, wrong: str) -> None:
    dictionary = made(kind, act_fn="jumprelu")
    state = dict(dictionary.full_state_dict())
    name = "W_D.1" if kind == "clt" else "W_D"
    match wrong:
        case "missing":
            del state[name]
        case "unexpected":
            name = "W_D.3"
            state[name] = torch.zeros(4, 24, 6)
        case "shape":
            state[name] = state[name][:1]
        case "width":
            state[name] = state[name][..., :5]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        dictionary.load_full_state_dict(state)


# -- widths, config ------------------------------------------------------------------------------------------------


@every_kind
def test_different_widths_are_refused_in_one_line(kind: str) -> None:
    dictionary = made(kind)
    batch = batch_for(dictionary)
    wrong = dictionary.cfg.associated_hook_points[1]
    batch[wrong] = torch.randn(9, 8)
    calls: list[Callable[[], Any]] = [lambda: losses(dictionary, batch), lambda: dictionary.reconstruct(batch)]
    for call in calls:
        with pytest.raises(DataError) as refused:
            call()
        message = str(refused.value)
        assert wrong in message and "(9, 8)" in message and "6" in message and "\n" not in message
    with pytest.raises(DataError, match="missing"):
        losses(dictionary, {k: v for k, v in batch.items() if k != wrong})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("clt", {"hook_points_in": ["a", "b"], "hook_points_out": ["c"]}, "2 and 1"),
        ("clt", {"hook_points_in": [], "hook_points_out": []}, "hook_points_in"),
        ("clt", {"act_fn": "relu", "top_k": 3}, "top_k"),
        ("clt", {"act_fn": "nothing"}, "layertopk"),
        ("clt", {"hook_points": ["a"]}, "hook_points"),
        ("crosscoder", {"hook_points": []}, "hook_points"),
        ("crosscoder", {"act_fn": "topk", "jumprelu_threshold_window": 1.0}, "jumprelu_threshold_window"),
        ("crosscoder", {"act_fn": "topk", "top_k": 25}, "exceeds the 24"),
        ("crosscoder", {"init_cross_layer_decoder_all_zero": True}, "init_cross_layer_decoder_all_zero"),
    ],
)
def test_config_errors(kind: str, settings: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"d_model": 6, "expansion_factor": 4.0}
    hooks = {"hook_points_in": ["a"], "hook_points_out": ["b"]} if kind == "clt" else {"hook_points": ["a", "b"]}
    with pytest.raises((ConfigError, ValueError), match=message):
        type(CONFIGS[kind]())(**base | hooks | settings)


@pytest.mark.parametrize(
    ("act_fn", "most"), [("topk", 24), ("batchtopk", 24), ("layertopk", 3 * 24), ("batchlayertopk", 3 * 24)]
)
@every_kind
def test_k_is_at_most_the_latents_that_it_is_picked_from(kind: str, act_fn: str, most: int) -> None:
    """24 latents of each of three sites: where sites compete, k counts the latents of all of them."""
    assert CONFIGS[kind](act_fn=act_fn, top_k=most).largest_k == most
    with pytest.raises(ValueError, match=f"act_fn='{act_fn}': top_k={most + 1} exceeds the {most} latents available"):
        CONFIGS[kind](act_fn=act_fn, top_k=most + 1)
