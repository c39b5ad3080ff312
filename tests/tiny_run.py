"""A tiny random Llama, a text of words that it knows, and settings that train on them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HOOK = "blocks.0.hook_resid_post"
KINDS: dict[str, dict[str, Any]] = {
    "sae": {"hook_point_in": HOOK, "hook_point_out": HOOK},
    "crosscoder": {"hook_points": [HOOK, "blocks.1.hook_resid_post"]},
    "clt": {"hook_points_in": ["blocks.0.ln2.hook_normalized"], "hook_points_out": ["blocks.0.hook_mlp_out"]},
    "molt": {"hook_point_in": HOOK, "hook_point_out": HOOK, "rank_counts": {1: 10, 3: 6}},
    "lorsa": {
        "hook_point_in": "blocks.0.ln1.hook_normalized", "hook_point_out": "blocks.0.hook_attn_out",
        "n_qk_heads": 2, "d_qk_head": 8, "rotary_dim": 8, "n_ctx": 16,
    },
}  # fmt: skip


def make_place(place: Path) -> Path:
    """Fill `place` with a random Llama of two layers (`model`) and 120 lines of words that it knows (`text.txt`)."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<s>": 0, "</s>": 1, "[unk]": 2} | {f"word{i}": i for i in range(3, 40)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="[unk]"
    ).save_pretrained(place / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    tokens = torch.randint(3, 40, (120, 12), generator=torch.Generator().manual_seed(1))
    lines = [" ".join(f"word{token}" for token in line) for line in tokens.tolist()]
    (place / "text.txt").write_text("\n".join(lines) + "\n")
    return place


def reading(place: Path, hooks: list[str]) -> dict[str, Any]:
    """What all commands share: a model, a text with a fifth held out, and activations of single tokens."""
    return {
        "model": {"model_name": str(place / "model"), "dtype": "float32", "local_files_only": True},
        "datasets": {
            "words": {"dataset_name_or_path": str(place / "text.txt"), "held_out_fraction": 0.2, "part": "train"}
        },
        "activation_factory": {
            "sources": [{"type": "dataset", "name": "words"}],
            "target": "activations-1d",
            "hook_points": hooks,
            "batch_size": 64,
            "context_size": 16,
            "model_batch_size": 4,
            "buffer_size": 256,
            "num_workers": 0,
        },
    }


def training(place: Path, run: Path, steps: int = 12, **trainer: Any) -> dict[str, Any]:
    """A run of a TopK autoencoder, evaluated on held-out text."""
    return reading(place, [HOOK]) | {
        "sae": {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": 16, "expansion_factor": 4,
                "act_fn": "topk", "top_k": 4},
        "trainer": {"total_training_tokens": steps * 64, "log_frequency": 4, "eval_frequency": 1000,
                    "amp_dtype": "none", "lr": 1e-2, "lr_warm_up_steps": 0, "n_checkpoints": 2,
                    "check_point_save_mode": "linear", "exp_result_path": str(run), **trainer},
        "eval": {"max_tokens": 128, "downstream_tokens": 64, "context_size": 16, "batch_size": 4, "n_latents": 8},
        "loggers": [],
    }  # fmt: skip


def training_of(kind: str, place: Path, run: Path, steps: int = 2) -> dict[str, Any]:
    """A short run of a kind, without evaluation."""
    data = training(place, run, steps=steps)
    shape = {"d_model": 16, "act_fn": "topk", "top_k": 4, "norm_activation": "inference"}
    data["sae"] = {"sae_type": kind, **shape, **({} if kind == "molt" else {"expansion_factor": 4}), **KINDS[kind]}
    del data["eval"]
    hooks = [hook for key, value in KINDS[kind].items() if "hook" in key
             for hook in ([value] if isinstance(value, str) else value)]  # fmt: skip
    data["activation_factory"]["hook_points"] = list(dict.fromkeys(hooks))
    if kind == "lorsa":
        del data["activation_factory"]["buffer_size"]
        data["activation_factory"] |= {"target": "activations-2d", "batch_size": 4}
    return data
