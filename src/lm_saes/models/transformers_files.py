"""Models and tokenizers of the `transformers` library, loaded as `LanguageModelConfig` says, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import torch

from lm_saes import machine
from lm_saes.errors import ConfigError, one_line
from lm_saes.models.base import LanguageModelConfig
from lm_saes.storage.files import sha256


def available_device(cfg: LanguageModelConfig) -> torch.device:
    """The device that `cfg` names, or a `ConfigError` if this machine lacks it."""
    device = machine.check_device(cfg.device, "device")
    if cfg.use_flash_attn and device.type != "cuda":
        raise ConfigError(f"use_flash_attn=True needs a CUDA device, not device={cfg.device!r}; set it to False")
    return device


def load_tokenizer(cfg: LanguageModelConfig) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, "tokenizer", cfg)


def load_model(cfg: LanguageModelConfig, dtype: torch.dtype) -> Any:
    """The model, complete, for inference only."""
    from transformers import AutoModelForCausalLM

    quantization_config = None
    if cfg.gguf_file is not None:
        from transformers import GgufConfig

        quantization_config = GgufConfig(dequantize=True)
    model, report = _from_pretrained(
        AutoModelForCausalLM,
        "model",
        cfg,
        dtype=dtype,
        attn_implementation="flash_attention_2" if cfg.use_flash_attn else None,
        quantization_config=quantization_config,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"model_name={_source(cfg)!r}: {len(missing)} weights are missing from the files, first {missing[0]!r}; "
            "give a complete causal language model"
        )
    return model.eval().requires_grad_(False)


def _from_pretrained(auto_class: Any, what: str, cfg: LanguageModelConfig, **options: Any) -> Any:
    source = _source(cfg)
    _check_directory(source, cfg)
    try:
        return auto_class.from_pretrained(
            source,
            cache_dir=cfg.cache_dir,
            local_files_only=cfg.local_files_only,
            trust_remote_code=False,
            gguf_file=cfg.gguf_file,
            **options,
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model_name={source!r}: the {what} brings code of its own, which is never run; give a model of an "
                "architecture that the installed transformers knows, without auto_map in its config"
            ) from error
        remedy = (
            "check the name or directory, and that the hub can be reached or local_files_only finds it in cache_dir"
        )
        if cfg.gguf_file is not None:
            remedy = "check the directory and gguf_file, and that the packages gguf and accelerate are installed"
        elif cfg.use_flash_attn:
            remedy = "check the name, install flash-attn and use dtype='bfloat16', or set use_flash_attn=False"
        raise ConfigError(
            f"model_name={source!r}: the {what} cannot be loaded ({one_line(error)}); {remedy}"
        ) from error


def _check_directory(source: str, cfg: LanguageModelConfig) -> None:
    """Raise `ConfigError` if a path does not exist, or if its index of weights names files elsewhere."""
    directory = Path(source)
    if not directory.is_dir():
        if directory.is_absolute() or source.startswith(("./", "../", "~")) or directory.exists():
            raise ConfigError(f"model_name={source!r}: there is no such directory; give one, or a name on the hub")
        return
    if cfg.gguf_file is not None:
        _check_inside(directory, cfg.gguf_file, "gguf_file")
    for index in directory.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"model_name={source!r}: {index.name} is no index of weights ({one_line(error)}); restore it"
            ) from error
        for file in files:
            _check_inside(directory, str(file), index.name)


def _check_inside(directory: Path, name: str, where: str) -> None:
    """Raise `ConfigError` if `name` leads out of a model's directory; links, as in the hub's cache, are allowed."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ConfigError(f"{where}: {name!r} leads out of the model's directory {str(directory)!r}; name a file in it")


def weights_identity(cfg: LanguageModelConfig, model: Any) -> dict[str, str]:
    """Where the weights of the loaded `model` came from, and the sha256 of their files or the hub's commit."""
    source = _source(cfg)
    if cfg.gguf_file is not None:
        from transformers.utils.hub import cached_file

        file = cached_file(source, cfg.gguf_file, cache_dir=cfg.cache_dir, local_files_only=cfg.local_files_only)
        return {"path": source, "gguf_file": cfg.gguf_file, "sha256": sha256(str(file))}
    if Path(source).is_dir():
        weights = sorted(file for ending in ("*.safetensors", "*.bin") for file in Path(source).glob(ending))
        return {"path": source, "sha256": sha256(*weights)}
    return {"path": source, "revision": str(model.config._commit_hash)}


def _source(cfg: LanguageModelConfig) -> str:
    return cfg.model_from_pretrained_path or cfg.model_name
