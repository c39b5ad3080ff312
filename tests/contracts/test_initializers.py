"""Every kind with every setting of the initialiser: it changes the fresh dictionary, or is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lm_saes.config import build
from lm_saes.dictionaries.base import AbstractSparseAutoEncoder
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.errors import ConfigError
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.models.base import LanguageModel

from ..unit.dictionaries.test_lorsa_attention import language_model
from ..unit.dictionaries.twin import random_batch

LAYER, D = 1, 6
X, Y = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"
CONFIGS: dict[str, dict[str, Any]] = {
    "autoencoder": {"sae_type": "sae", "hook_point_in": X, "hook_point_out": X},
    "transcoder": {"sae_type": "sae", "hook_point_in": X, "hook_point_out": Y},
    "crosscoder": {"sae_type": "crosscoder", "hook_points": [X, Y]},
    "clt": {"sae_type": "clt", "hook_points_in": [X, "x1"], "hook_points_out": [Y, "y1"]},
    "molt": {"sae_type": "molt", "hook_point_in": X, "hook_point_out": Y, "rank_counts": {1: 10, 3: 14}},
    "lorsa": {
        "sae_type": "lorsa", "hook_point_in": f"blocks.{LAYER}.ln1.hook_normalized",
        "hook_point_out": f"blocks.{LAYER}.hook_attn_out", "n_qk_heads": 6, "d_qk_head": 4, "n_ctx": 5,
        "rotary_dim": 4, "rotary_base": 30.0, "rotary_adjacent_pairs": False,
    },
}  # fmt: skip
UNTIED = {"clt", "molt", "lorsa"}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "decoder_uniform_bound": ({"decoder_uniform_bound": 0.3}, {}, UNTIED),
    "encoder_uniform_bound": (
        {"encoder_uniform_bound": 0.3, "init_encoder_with_decoder_transpose": False},
        {"init_encoder_with_decoder_transpose": False},
        UNTIED,
    ),
    "init_encoder_with_decoder_transpose": (
        {"init_encoder_with_decoder_transpose": True},
        {"init_encoder_with_decoder_transpose": False},
        UNTIED,
    ),
    "init_encoder_with_decoder_transpose_factor": ({"init_encoder_with_decoder_transpose_factor": 0.5}, {}, UNTIED),
    "bias_init_method": ({"bias_init_method": "geometric_median"}, {}, set()),
    "init_log_jumprelu_threshold_value": (
        {"init_log_jumprelu_threshold_value": -2.0},
        {"init_log_jumprelu_threshold_value": -1.0},
        set(),
    ),
    "grid_search_init_norm": ({"grid_search_init_norm": True}, {}, set()),
    "initialize_W_D_with_active_subspace": ({"initialize_W_D_with_active_subspace": True}, {}, {"molt"}),
    "initialize_lorsa_with_mhsa": (
        {"initialize_lorsa_with_mhsa": True, "model_layer": LAYER},
        {},
        set(CONFIGS) - {"lorsa"},
    ),
    "initialize_tc_with_mlp": (
        {"initialize_tc_with_mlp": True, "model_layer": LAYER},
        {},
        set(CONFIGS) - {"transcoder"},
    ),
    "init_encoder_bias_with_mean_hidden_pre": ({"init_encoder_bias_with_mean_hidden_pre": True}, {}, set()),
}
"""By setting: settings with it, settings to compare with, and the dictionaries that have no use for it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=12, num_hidden_layers=2, num_attention_heads=3, head_dim=4,
        num_key_value_heads=3, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 30.0},
    )  # fmt: skip
    return language_model(tmp_path_factory.mktemp("model"), config)


def config_of(name: str, **settings: Any) -> BaseSAEConfig:
    shape = {} if name == "molt" else {"expansion_factor": 4.0}
    settings = {"d_model": D, "norm_activation": "inference", **shape, **CONFIGS[name], **settings}
    return build(BaseSAEConfig.kind(settings["sae_type"]), settings)


def fresh(cfg: BaseSAEConfig, stream: Any, model: LanguageModel, settings: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    initializer = Initializer(build(InitializerConfig, settings))
    return initializer.initialize_sae_from_config(cfg, stream, model=model).full_state_dict()


def untouched() -> Iterator[Any]:
    """Fails if anybody asks it for a batch."""
    raise AssertionError("activations were read before the mistake was told")
    yield


def test_every_kind_and_every_setting_is_here() -> None:
    BaseSAEConfig.kind("sae")  # imports all kinds
    own = {name for name, kind in AbstractSparseAutoEncoder.kinds.items() if kind.__module__.startswith("lm_saes.")}
    assert {settings["sae_type"] for settings in CONFIGS.values()} == own
    shared = {"d_active_subspace", "model_layer"}  # read by the settings that need them
    assert set(SETTINGS) | shared == set(InitializerConfig.model_fields)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_setting_has_an_effect_or_is_refused(name: str, setting: str, model: LanguageModel) -> None:
    settings, plain, refused_by = SETTINGS[setting]
    cfg = config_of(name, act_fn="jumprelu" if "jumprelu" in setting else "relu")
    if setting == "initialize_W_D_with_active_subspace":
        settings = settings | ({"model_layer": LAYER} if name == "lorsa" else {"d_active_subspace": 2})
    if name in refused_by:
        with pytest.raises(ConfigError, match=rf"^{setting}={settings[setting]}\b.*; remove it$") as error:
            fresh(cfg, untouched(), model, settings)
        assert "\n" not in str(error.value)
        return
    batch = random_batch(cfg, (4, 5), masked=True)
    with_it, without = (fresh(cfg, [batch], model, chosen) for chosen in (settings, plain))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in with_it.values())
    assert any(not torch.equal(with_it[tensor], without[tensor]) for tensor in without)


@pytest.mark.parametrize("name", sorted(UNTIED))
def test_bounds_at_their_defaults_are_as_good_as_unset(name: str, model: LanguageModel) -> None:
    """A run's saved settings hold every default."""
    bounds = {"encoder_uniform_bound": 1.0, "decoder_uniform_bound": 1.0}
    one, two = (fresh(config_of(name), None, model, settings) for settings in (bounds, {}))
    assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)


def test_a_kind_that_lacks_a_method_needs_no_entry_anywhere(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config_of("molt")
    lacking = AbstractSparseAutoEncoder.init_encoder_bias_with_mean_hidden_pre
    monkeypatch.setattr(AbstractSparseAutoEncoder.kinds["molt"], "init_encoder_bias_with_mean_hidden_pre", lacking)
    with pytest.raises(ConfigError, match=r"^init_encoder_bias_with_mean_hidden_pre=True has no effect: .*'molt'"):
        fresh(cfg, untouched(), model, {"init_encoder_bias_with_mean_hidden_pre": True})


def test_attention_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=12, num_hidden_layers=2, num_attention_heads=3, head_dim=4,
        max_position_embeddings=64, rope_parameters={"rope_type": "linear", "rope_theta": 30.0, "factor": 2.0},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^initialize_lorsa_with_mhsa=True: rotary embedding .*; remove it$"):
        fresh(
            config_of("lorsa"),
            untouched(),
            language_model(tmp_path, config),
            {"initialize_lorsa_with_mhsa": True, "model_layer": LAYER},
        )
