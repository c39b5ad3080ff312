"""Lorsa started from the attention of tiny models of every layout: exactly the model's own patterns on raw inputs."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor

from lm_saes.dictionaries.lorsa import LorsaConfig
from lm_saes.errors import ConfigError
from lm_saes.models.attention_weights import attention_weights
from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.huggingface import HuggingFaceLanguageModel

from .test_lorsa import SAME, initialize
from .twin import assert_same, valid

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 30.0}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=ROPE),
    "llama-3": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA_3, attention_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, rope_parameters=ROPE),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=6, rope_parameters=ROPE),
    "mistral": lambda: transformers.MistralConfig(**SMALL, head_dim=8, rope_parameters=ROPE, sliding_window=None),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
        rope_parameters=ROPE | {"partial_rotary_factor": 0.5},
    ),
}
NORM_PATHS = {"gpt2": "transformer.h.1.ln_1", "gpt_neox": "gpt_neox.layers.1.input_layernorm"}
LAYER = 1
TOKENS = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(0))


def language_model(directory: Path, config: Any) -> HuggingFaceLanguageModel:
    """A tiny model with every weight, norms and biases too, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name or ".ln_" in name else 0.0
            parameter.copy_(offset * (parameter.ndim == 1) + 0.5 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(directory)
    raw = Tokenizer(models.WordLevel({"<s>": 0, "x": 1}, unk_token="x"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>").save_pretrained(directory)
    return HuggingFaceLanguageModel(LanguageModelConfig(model_name=str(directory), dtype=torch.float32))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceLanguageModel:
    return language_model(tmp_path_factory.mktemp("model"), MODELS[request.param]())


def own_patterns(model: HuggingFaceLanguageModel) -> Tensor:
    """The model's own attention pattern, `[batch, heads, seq, seq]`."""
    model._model.set_attn_implementation("eager")
    with torch.no_grad():
        return model._model(TOKENS, output_attentions=True).attentions[LAYER]


def like_the_model(
    model: HuggingFaceLanguageModel, hook_point_in: str, repeat: int = 1, **settings: Any
) -> LorsaConfig:
    weights = attention_weights(model, LAYER)
    wanted = {"d_model": model.d_model, "expansion_factor": 2.0, "n_qk_heads": repeat * weights.n_heads, "n_ctx": 12,
              "hook_point_in": hook_point_in, "hook_point_out": f"blocks.{LAYER}.hook_attn_out"}  # fmt: skip
    return LorsaConfig(**{**wanted, **weights.settings, **settings})


def hook_points_in(model: HuggingFaceLanguageModel) -> list[str]:
    kind = model._model.config.model_type
    return [f"blocks.{LAYER}.ln1.hook_normalized", NORM_PATHS.get(kind, f"model.layers.{LAYER}.input_layernorm")]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("repeat", "norm_activation"), [(1, "inference"), (2, "dataset-wise")])
def test_raw_inputs_give_the_models_own_patterns(
    model: HuggingFaceLanguageModel, repeat: int, norm_activation: str, normalized: bool
) -> None:
    hook = hook_points_in(model)[0 if normalized else 1]
    cfg = like_the_model(model, hook, repeat, norm_activation=norm_activation)
    lorsa = initialize(cfg, model=model, initialize_lorsa_with_mhsa=True, model_layer=LAYER)
    batch = {"tokens": TOKENS, **model.activations(TOKENS, [hook])}
    want = own_patterns(model).repeat_interleave(repeat, 1)
    assert_same(lorsa.attention_pattern(lorsa.normalize_activations(batch)[hook]), want, SAME)
    assert float((want[:, 0] - want[:, -1]).abs().max()) > 0.05  # heads differ, and not by rounding
    folded = initialize(cfg, model=model, initialize_lorsa_with_mhsa=True, model_layer=LAYER)
    folded.standardize_parameters_of_dataset_norm()
    assert_same(folded.attention_pattern(batch[hook]), want, SAME)


def test_weights_make_the_layers_output(model: HuggingFaceLanguageModel) -> None:
    """Patterns, values and outputs together are what the attention layer writes, from either hook point."""
    written = f"blocks.{LAYER}.hook_attn_out"
    patterns = own_patterns(model)
    for hook in hook_points_in(model):
        weights = attention_weights(model, LAYER).reading(hook)
        seen = model.activations(TOKENS, [hook, written])
        keys = weights.keys_of(torch.arange(weights.n_heads))
        v = torch.einsum("bsd,hde->bhse", seen[hook], weights.W_V[keys]) + weights.b_V[keys][:, None]
        got = torch.einsum("bhst,bhte,hed->bsd", patterns, v, weights.W_O) + weights.b_O
        assert_same(got, seen[written], SAME)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_values_start_in_each_heads_subspace(model: HuggingFaceLanguageModel, both: bool, normalized: bool) -> None:
    hook = hook_points_in(model)[0 if normalized else 1]
    cfg = like_the_model(model, hook, 2)
    written = cfg.hook_point_out
    batch = {"tokens": TOKENS, **model.activations(TOKENS, [hook, written])}
    batch["mask"] = torch.arange(12).expand(3, 12) > 0
    fresh = initialize(cfg)
    settings = {"initialize_lorsa_with_mhsa": True} if both else {}
    lorsa = initialize(cfg, [batch], model, initialize_W_D_with_active_subspace=True, model_layer=LAYER, **settings)
    weights = attention_weights(model, LAYER).reading(hook)
    x = valid(batch[hook], batch)  # any factor drops out where rows are normalised
    m, per_head = min(cfg.d_qk_head, weights.W_V.shape[2]), cfg.d_sae // weights.n_heads
    for head in range(weights.n_heads):
        own = slice(head * per_head, (head + 1) * per_head)
        V_DE = weights.W_V[head * len(weights.W_V) // weights.n_heads]
        read = x @ V_DE @ V_DE.T
        U_DM = torch.linalg.svd((read - read.mean(0)).T).U[:, :m]
        W_V = lorsa.W_V[own].detach()
        assert_same(W_V @ U_DM @ U_DM.T, W_V, 1e-4)
        drawn = fresh.W_V[own, :m].detach()
        assert_same((W_V @ U_DM).abs(), (drawn / drawn.norm(dim=1, keepdim=True)).abs(), 1e-3)
        W_O = W_V @ V_DE @ weights.W_O[head]
        assert_same(lorsa.W_O[own], W_O / W_O.norm(dim=1, keepdim=True), 1e-4)
    for W in (lorsa.W_V, lorsa.W_O):
        assert_same(W.norm(dim=1), torch.ones(cfg.d_sae), SAME)
    assert torch.equal(lorsa.W_Q, fresh.W_Q) is not both


def test_another_hook_point_is_warned_of(model: HuggingFaceLanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"initialize_lorsa_with_mhsa": True, "model_layer": LAYER}
    with caplog.at_level(logging.WARNING, logger="lm_saes"):
        for hook in hook_points_in(model):
            initialize(like_the_model(model, hook), model=model, **settings)
        assert caplog.text == ""
        initialize(like_the_model(model, "blocks.1.hook_resid_pre"), model=model, **settings)
    assert "hook_point_in='blocks.1.hook_resid_pre': attention reads" in caplog.text


def test_starts_that_are_refused(tmp_path: Path) -> None:
    model = language_model(tmp_path, MODELS["qwen3"]())
    hook = hook_points_in(model)[0]
    start: dict[str, Any] = {"initialize_lorsa_with_mhsa": True, "model_layer": LAYER}
    cfg = like_the_model(model, hook)
    for changes, message in (
        ({"rotary_base": 10000.0}, "rotary_base=10000.0: the model's attention has 30.0"),
        ({"rotary_adjacent_pairs": True}, "rotary_adjacent_pairs=True: the model's attention has False"),
        ({"attn_scale": 1.0}, "attn_scale=1.0: the model's attention has"),
        ({"use_post_qk_ln": False, "normalization_type": None, "eps": 1e-6}, "use_post_qk_ln=False"),
        ({"eps": 0.5}, "eps=0.5"),
        ({"d_qk_head": 8}, "d_qk_head=8: the model's attention has 6"),
        ({"n_qk_heads": 2}, "n_qk_heads=2: must be a multiple of the 4 heads"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise'.*constant"),
    ):
        with pytest.raises(ConfigError, match=message):
            initialize(cfg.model_copy(update=changes), model=model, **start)
    for settings, given, message in (
        (start | {"model_layer": 2}, model, "model_layer=2: the model has layers 0 to 1"),
        ({"initialize_lorsa_with_mhsa": True}, model, "model_layer=None: initialize_lorsa_with_mhsa needs the layer"),
        (start, None, "initialize_lorsa_with_mhsa=True: needs the language model's attention"),
        (
            {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 3, "model_layer": 1},
            model,
            "d_active_subspace=3 has no effect",
        ),
        ({"initialize_W_D_with_active_subspace": True}, model, "model_layer=None"),
    ):
        with pytest.raises(ConfigError, match=message):
            initialize(cfg, model=given, **settings)


def test_other_attention_is_refused(tmp_path: Path) -> None:
    def config(name: str, **settings: Any) -> Any:
        return getattr(transformers, name)(**SMALL, **settings)

    gemma = language_model(tmp_path / "gemma", config("Gemma2Config", head_dim=4))
    with pytest.raises(NotImplementedError, match="'gemma2' model cannot be read; those of llama, "):
        attention_weights(gemma, 0)
    linear = ROPE | {"rope_type": "linear", "factor": 2.0}
    other = language_model(tmp_path / "linear", config("LlamaConfig", rope_parameters=linear))
    with pytest.raises(NotImplementedError, match="rotary embedding of type 'linear'"):
        attention_weights(other, 0)
    short = language_model(tmp_path / "short", config("MistralConfig", head_dim=4, sliding_window=8))
    with pytest.raises(ConfigError, match="n_ctx=12: the model's attention goes back 8 tokens"):
        initialize(
            like_the_model(short, hook_points_in(short)[0]), model=short, initialize_lorsa_with_mhsa=True, model_layer=1
        )
