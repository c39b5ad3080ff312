"""A transcoder that starts from the model's own MLP."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from lm_saes.config import build
from lm_saes.data.batch import Batch
from lm_saes.dictionaries.sae import SAEConfig, SparseAutoEncoder
from lm_saes.errors import ConfigError
from lm_saes.initializer import Initializer, InitializerConfig
from lm_saes.models.base import LanguageModel, LanguageModelConfig
from lm_saes.models.load import load_language_model

from .random_model import save

NORMALIZED, MID, OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    save(directory, config)
    return load_language_model(LanguageModelConfig(model_name=str(directory), dtype=torch.float32))


def batch_of(model: LanguageModel, hook_points: list[str]) -> Batch:
    """Real activations, 2D, with padding full of garbage."""
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9) < torch.tensor([[9], [6], [2]])
    batch: Batch = {"tokens": tokens, "mask": mask}
    for name, x in model.activations(tokens, hook_points).items():
        batch[name] = torch.where(mask[..., None], x, 1e3 * x)
    return batch


def config_for(hook_in: str, hook_out: str = OUT, **settings: Any) -> SAEConfig:
    defaults: dict[str, Any] = {"act_fn": "topk", "top_k": 8, "norm_activation": "dataset-wise"}
    return SAEConfig(
        d_model=16, expansion_factor=4, hook_point_in=hook_in, hook_point_out=hook_out, **(defaults | settings)
    )


def initialize(cfg: SAEConfig, batch: Batch, model: LanguageModel | None, **settings: Any) -> SparseAutoEncoder:
    torch.manual_seed(0)
    chosen = {"initialize_tc_with_mlp": True, "model_layer": 1} | settings
    made = Initializer(build(InitializerConfig, chosen)).initialize_sae_from_config(cfg, [batch], model=model)
    assert isinstance(made, SparseAutoEncoder)
    return made


def test_by_hand() -> None:
    """Valid inputs (0, 1) and (4, 1): mean (2, 1), mean distance 2. Encoder columns (3, 0), (0, -5), (1, 0), (-2, 0).

    The points: (4, 1), (2, -1), (4, 1), (0, 1). The MLP (a, b) -> (2b + 7, a): (9, 4), (5, 2), (9, 4), (9, 0); their
    mean (8, 2.5). Less the mean: (1, 1.5), (-3, -0.5), (1, 1.5), (1, -2.5).
    """
    cfg = SAEConfig(d_model=2, expansion_factor=2, hook_point_in="a", hook_point_out="b", norm_activation="inference")
    sae = SparseAutoEncoder(cfg)
    with torch.no_grad():
        sae.W_E.copy_(torch.tensor([[3.0, 0.0, 1.0, -2.0], [0.0, -5.0, 0.0, 0.0]]))
    batch = {
        "a": torch.tensor([[0.0, 1.0], [100.0, 100.0], [4.0, 1.0]]),
        "tokens": torch.zeros(3, dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
    }
    sae.init_tc_with_mlp(batch, lambda x: torch.stack([2 * x[:, 1] + 7, x[:, 0]], 1))
    torch.testing.assert_close(sae.W_E.detach(), torch.tensor([[1.0, 0.0, 1.0, -1.0], [0.0, -1.0, 0.0, 0.0]]))
    rows = torch.tensor([[1.0, 1.5], [-3.0, -0.5], [1.0, 1.5], [1.0, -2.5]])
    torch.testing.assert_close(sae.W_D.detach(), rows / rows.norm(dim=1, keepdim=True))


def plain_mlp(model: LanguageModel, x: Tensor, hook_in: str) -> Tensor:
    """Layer 1's MLP from its weights alone, with as much of the norm as lies behind `hook_in`."""
    weights = transformers.AutoModelForCausalLM.from_pretrained(model.cfg.model_name).state_dict()
    prefix = "model.layers.1."
    if hook_in == MID:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    if hook_in in (MID, NORMALIZED):
        x = x * weights[prefix + "post_attention_layernorm.weight"]
    gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("hook_in", [NORMALIZED, MID, "model.layers.1.post_attention_layernorm"])
def test_decoder_rows_are_what_the_models_mlp_makes(model: LanguageModel, hook_in: str) -> None:
    batch, cfg = batch_of(model, [hook_in, OUT]), config_for(hook_in)
    sae = initialize(cfg, batch, model)
    drawn = SparseAutoEncoder(cfg)
    torch.manual_seed(0)
    Initializer(InitializerConfig()).initialize_parameters(drawn)
    directions = drawn.W_E.detach().T / drawn.W_E.detach().norm(dim=0)[:, None]
    x = batch[hook_in][batch["mask"]]
    distance = sum(float((row - x.mean(0)).norm()) for row in x) / len(x)
    rows = torch.stack([plain_mlp(model, x.mean(0) + distance * direction, hook_in) for direction in directions])
    rows = rows - rows.mean(0)
    torch.testing.assert_close(sae.W_E.detach().T, directions)
    torch.testing.assert_close(sae.W_D.detach(), rows / rows.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert not sae.b_E.any()


def test_what_comes_after_keeps_the_encoder(model: LanguageModel) -> None:
    """The search moves decoder norms and both biases; the tie of the first step is not made again."""
    batch, cfg = batch_of(model, [NORMALIZED, OUT]), config_for(NORMALIZED)
    plain = initialize(cfg, batch, model)
    later: dict[str, Any] = {"bias_init_method": "geometric_median", "init_encoder_bias_with_mean_hidden_pre": True}
    sae = initialize(cfg, batch, model, grid_search_init_norm=True, **later)
    assert torch.equal(sae.W_E, plain.W_E)
    assert not torch.allclose(sae.W_D, plain.W_D, atol=0.05)
    torch.testing.assert_close(F.normalize(sae.W_D), plain.W_D)
    x = sae.prepare_input(sae.normalize_activations(batch))[batch["mask"]]
    torch.testing.assert_close(sae.b_E.detach(), -(x.mean(0) @ sae.W_E.detach()), rtol=1e-4, atol=1e-5)


def test_many_latents_go_through_the_mlp_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config_for("a", "b", norm_activation="inference")
    torch.manual_seed(0)
    whole, cut = SparseAutoEncoder(cfg), SparseAutoEncoder(cfg)
    batch: Batch = {"a": torch.randn(5, 16), "tokens": torch.zeros(5, dtype=torch.int64)}
    sizes: list[int] = []

    def mlp(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.sin()

    for sae, rows in ((whole, 64), (cut, 24)):
        monkeypatch.setattr("lm_saes.machine.MLP_ROWS", rows)
        torch.manual_seed(1)
        Initializer(InitializerConfig()).initialize_parameters(sae)
        sae.init_tc_with_mlp(batch, mlp)
    assert sizes == [64, 24, 24, 16]
    torch.testing.assert_close(cut.W_D, whole.W_D)


# -- the language model's MLP as a function ------------------------------------------------------------------------

_COMMON: dict[str, Any] = dict(
    vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip
_GEMMA: dict[str, Any] = dict(num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
LAYOUTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=8, num_key_value_heads=1),
    "gemma2": lambda: transformers.Gemma2Config(**_COMMON, **_GEMMA),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON, use_parallel_residual=True),
    "gpt_neox sequential": lambda: transformers.GPTNeoXConfig(**_COMMON, use_parallel_residual=False),
}
PLACES = {
    "llama": ("model.layers.1.post_attention_layernorm", ["model.layers.1.mlp"]),
    "gemma2": (
        "model.layers.1.pre_feedforward_layernorm",
        ["model.layers.1.mlp", "model.layers.1.post_feedforward_layernorm"],
    ),
    "gpt2": ("transformer.h.1.ln_2", ["transformer.h.1.mlp"]),
    "gpt_neox": ("gpt_neox.layers.1.post_attention_layernorm", ["gpt_neox.layers.1.mlp"]),
}


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_the_mlp_leads_from_what_the_model_has_before_it_to_what_it_has_behind(kind: str, tmp_path: Path) -> None:
    save(tmp_path, LAYOUTS[kind]())
    model = load_language_model(LanguageModelConfig(model_name=str(tmp_path), dtype=torch.float32))
    norm, outputs = PLACES["llama" if kind == "qwen3" else kind.split()[0]]
    inputs = [NORMALIZED, norm] if kind == "gpt_neox" else [NORMALIZED, MID, norm]
    tokens = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    seen = model.activations(tokens, [*inputs, OUT, *outputs])
    for hook_in in inputs:
        for hook_out in (OUT, *outputs):
            x, y = (seen[name].flatten(0, 1) for name in (hook_in, hook_out))
            # rtol: eps keeps a normalised input from norm sqrt(d) exactly, by a few parts in a million.
            torch.testing.assert_close(model.mlp(1, hook_in, hook_out)(x), y, rtol=1e-4, atol=1e-5)


def test_inputs_of_any_type_and_the_models_state(model: LanguageModel) -> None:
    mlp = model.mlp(1, NORMALIZED, OUT)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    y = mlp(x)
    assert y.dtype == torch.float64 and not y.requires_grad
    torch.testing.assert_close(mlp(x.float().detach()), y.float())
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    torch.testing.assert_close(model.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, NORMALIZED, OUT), r"layer 2: .* has the layers 0 to 1"),
        ((0, NORMALIZED, OUT), r"hook_point_in=.blocks.1.ln2.hook_normalized. does not stand in front of the MLP of"
                               r" layer 0; use blocks.0.ln2.hook_normalized or blocks.0.hook_resid_mid or model"),
        ((1, "blocks.1.hook_resid_pre", OUT), r"'blocks.1.hook_resid_pre' does not stand in front of"),
        ((1, "model.layers.1.mlp.gate_proj", OUT), r"gate_proj' does not stand in front of"),
        ((1, NORMALIZED, "blocks.1.hook_resid_post"), r"_out=.blocks.1.hook_resid_post. does not stand behind"),
        ((1, OUT, NORMALIZED), r"hook_point_in='blocks.1.hook_mlp_out' does not stand in front of"),
    ],
)  # fmt: skip
def test_hook_points_that_are_not_around_the_mlp(model: LanguageModel, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.mlp(*arguments)


def test_what_the_initializer_refuses(model: LanguageModel) -> None:
    batch = batch_of(model, [NORMALIZED, OUT])
    for cfg, given, message in (
        (config_for(NORMALIZED), None, "needs the language model; give model"),
        (config_for(OUT), model, "needs a transcoder"),
        (config_for(NORMALIZED, "blocks.0.hook_mlp_out"), model, "hook_point_out='blocks.0.hook_mlp_out' does not"),
    ):
        with pytest.raises(ConfigError, match=message) as failure:
            initialize(cfg, batch, given)
        assert "\n" not in str(failure.value)
    assert math.isfinite(float(initialize(config_for(NORMALIZED), batch, model).W_D.detach().sum()))
