"""Settings of dictionaries: defaults, what is refused, and files."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lm_saes.config import build
from lm_saes.dictionaries.config import BaseSAEConfig
from lm_saes.dictionaries.sae import SAEConfig
from lm_saes.errors import CheckpointError, ConfigError

from .twin import IN, OUT, sae_config

NEEDED = {"hook_point_in": IN, "hook_point_out": OUT, "d_model": 8, "expansion_factor": 2.5}


def test_defaults() -> None:
    cfg = SAEConfig(**NEEDED)  # type: ignore[arg-type]
    got = cfg.model_dump(exclude=set(NEEDED))
    assert got == {
        "sae_type": "sae",
        "use_decoder_bias": True,
        "act_fn": "relu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "jumprelu_threshold_window": 2.0,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "dtype": "float32",
        "use_glu_encoder": False,
    }
    assert (cfg.device, cfg.dtype, cfg.d_sae) == ("cpu", torch.float32, 20)
    assert cfg.associated_hook_points == [IN, OUT]
    assert sae_config().associated_hook_points == [IN]


def test_every_field_has_a_description() -> None:
    assert [name for name, field in SAEConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion_facto": 2}, "unknown key 'expansion_facto' in SAEConfig; did you mean 'expansion_factor'?"),
        ({"act_fn": "topk", "top_k": 21}, "act_fn='topk': top_k=21 exceeds the 20 latents available"),
        ({"act_fn": "batchtopk"}, "top_k=50 exceeds the 20 latents available"),
        (
            {"act_fn": "gelu"},
            "act_fn='gelu' is not an activation function here; use one of batchtopk, jumprelu, relu, topk",
        ),
        ({"act_fn": "layertopk"}, "act_fn='layertopk' is not an activation function here"),
        ({"act_fn": "batchlayertopk"}, "act_fn='batchlayertopk' is not an activation function here"),
        ({"top_k": 5}, "top_k=5 has no effect: act_fn='relu' does not read it; remove it"),
        ({"act_fn": "jumprelu", "top_k": 5}, "top_k=5 has no effect"),
        (
            {"act_fn": "topk", "top_k": 5, "jumprelu_threshold_window": 1.0},
            "jumprelu_threshold_window=1.0 has no effect",
        ),
        ({"norm_activation": "layer-wise"}, "norm_activation"),
        ({"act_fn": "topk", "top_k": 0}, "top_k"),
        ({"d_model": 0}, "d_model"),
        ({"expansion_factor": 0.01}, "expansion_factor=0.01: gives no latents"),
        ({"jumprelu_threshold_window": 0.0, "act_fn": "jumprelu"}, "jumprelu_threshold_window"),
        ({"dtype": "int8"}, "not a floating-point dtype"),
        ({"hook_point_in": ""}, "hook_point_in"),
        ({"sae_type": "clt"}, "sae_type"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(SAEConfig, NEEDED | settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["hook_point_in", "hook_point_out", "d_model", "expansion_factor"])
def test_required(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        build(SAEConfig, {name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize(
    "old",
    [{"use_triton_kernel": True}, {"sparsity_threshold_for_triton_spmm_kernel": 0.9}],
    ids=lambda old: next(iter(old)),
)
def test_fields_kept_for_old_configs_warn(old: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(old))}.*has no effect"):
        build(SAEConfig, NEEDED | old)


@pytest.mark.parametrize("dtype", ["bf16", "torch.bfloat16", "bfloat16", torch.bfloat16])
def test_dtype_is_spelt_as_one_likes_and_saved_as_text(dtype: Any) -> None:
    cfg = build(SAEConfig, NEEDED | {"dtype": dtype})
    assert cfg.dtype == torch.bfloat16
    assert cfg.to_json()["dtype"] == "bfloat16"


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"act_fn": "topk", "top_k": 4, "dtype": "float64"},
        {"act_fn": "jumprelu", "jumprelu_threshold_window": 0.5, "use_glu_encoder": True},
        {"norm_activation": "token-wise", "sparsity_include_decoder_norm": False, "use_decoder_bias": False},
    ],
)
def test_round_trip(tmp_path: Path, settings: dict[str, Any]) -> None:
    cfg = build(SAEConfig, NEEDED | settings | {"device": "meta"})
    cfg.save_hyperparameters(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sae_type"] == "sae"
    assert "device" not in saved
    for read in (BaseSAEConfig.from_pretrained(tmp_path), SAEConfig.from_pretrained(tmp_path)):
        assert type(read) is SAEConfig
        assert read == cfg.model_copy(update={"device": "cpu"})
    assert BaseSAEConfig.from_pretrained(tmp_path, device="meta").device == "meta"


def test_an_old_file_need_not_say_dtype_and_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NEEDED | {"sae_type": "sae"}))
    cfg = BaseSAEConfig.from_pretrained(tmp_path)
    assert (cfg.dtype, cfg.device) == (torch.float32, "cpu")


def test_an_old_file_may_say_what_has_no_effect(tmp_path: Path) -> None:
    """Old versions saved every field, the unused ones as the user had set them."""
    (tmp_path / "config.json").write_text(json.dumps(NEEDED | {"sae_type": "sae", "act_fn": "jumprelu", "top_k": 7}))
    with pytest.warns(UserWarning, match="top_k=7 has no effect"):
        cfg = BaseSAEConfig.from_pretrained(tmp_path)
    assert cfg.top_k == 7


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, CheckpointError, "cannot be read"),
        ("{", CheckpointError, "cannot be read"),
        ("[1]", CheckpointError, "no table of settings"),
        ("{}", ConfigError, "sae_type=None"),
        ('{"sae_type": "vae"}', ConfigError, "'vae': not a dictionary kind; use one of clt, crosscoder"),
        ('{"sae_type": "sae"}', ConfigError, "required, but not set"),
        (json.dumps(NEEDED | {"sae_type": "sae", "d_modle": 3}), ConfigError, "did you mean 'd_model'"),
    ],
)
def test_files_that_are_not_configs(tmp_path: Path, text: str | None, error: type, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error) as raised:
        BaseSAEConfig.from_pretrained(tmp_path)
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value) or "kind" in message or "sae_type" in message


def test_a_wrong_override_is_refused(tmp_path: Path) -> None:
    SAEConfig(**NEEDED).save_hyperparameters(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown key 'devise'"):
        BaseSAEConfig.from_pretrained(tmp_path, devise="cpu")


def test_building_a_config_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAEConfig(**NEEDED)  # type: ignore[arg-type]


def test_assigning_is_checked() -> None:
    cfg = sae_config()
    with pytest.raises(ValidationError, match="not an activation function"):
        cfg.act_fn = "gelu"
