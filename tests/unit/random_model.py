"""Small language models whose every parameter is random, so that none can be forgotten or folded unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

N_LAYERS = 3
_COMMON: dict[str, Any] = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
_GROUPED: dict[str, Any] = dict(num_key_value_heads=2, head_dim=12)
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON, **_GROUPED),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, **_GROUPED, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, **_GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**_COMMON, **_GROUPED, query_pre_attn_scalar=12, sliding_window=4),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **_COMMON,
        **_GROUPED,
        query_pre_attn_scalar=12,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON, use_parallel_residual=True),
    "gpt_neox sequential": lambda: transformers.GPTNeoXConfig(**_COMMON, use_parallel_residual=False),
}
PARALLEL = "gpt_neox"
TOKENS = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def random_model(config: Any) -> Any:
    """A model of that config, norm weights and biases included."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1) * 0.5)
    return model


def save(directory: Path, config: Any) -> None:
    """Writes such a model, and a tokenizer of two words, into `directory`."""
    random_model(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
