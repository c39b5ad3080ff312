"""Language models of the `transformers` library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lm_saes.data.hook_points import HookPoints
from lm_saes.data.language_model import LanguageModel, LanguageModelConfig
from lm_saes.errors import ConfigError, DataError

_UTF8_LONGEST = 4
"""Bytes of the longest character, so the most tokens that one character can take."""


class _Stop(Exception):
    """All activations that were asked for are there: the rest of the forward pass is not needed."""


class HuggingFaceLanguageModel(LanguageModel):
    """A causal language model loaded by `transformers`, from the hub, a directory or a GGUF file."""

    def __init__(self, cfg: LanguageModelConfig) -> None:
        self.cfg = cfg
        self.device = _available_device(cfg)
        self.dtype = cfg.dtype if cfg.dtype is not None else automatic_dtype(self.device)
        self._tokenizer = _load_tokenizer(cfg)
        self._model = _load_model(cfg, self.dtype).to(self.device)
        config = self._model.config.get_text_config()
        # Only text generation needs it; with it, GPT-2 inspects every batch for padding and warns of a missing mask.
        config.pad_token_id = None
        self.d_model = config.hidden_size
        self.n_layers = config.num_hidden_layers
        self.vocab_size = config.vocab_size
        self.max_length = min(cfg.max_length, getattr(config, "max_position_embeddings", cfg.max_length))
        self._set_special_tokens()
        self._hook_points = HookPoints(self._model, config)
        self._widths: dict[str, int] = {}
        self._one_pass_at_a_time = Lock()  # hooks belong to a pass: another thread's pass must not meet them

    def _set_special_tokens(self) -> None:
        cfg = self.cfg
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(cfg, name)
            if value is not None and value >= self.vocab_size:
                raise ConfigError(
                    f"{name}={value} is not a token of {cfg.model_name!r}; set it to 0 to {self.vocab_size - 1}"
                )
        self.eos_token_id = _first(cfg.eos_token_id, self._known(self._tokenizer.eos_token_id))
        bos = _first(cfg.bos_token_id, self._known(self._tokenizer.bos_token_id), self.eos_token_id)
        if bos is None:
            raise ConfigError(
                f"bos_token_id=None: the tokenizer of {cfg.model_name!r} has neither BOS nor EOS; set bos_token_id"
            )
        self.bos_token_id = bos
        pad = _first(cfg.pad_token_id, self._known(self._tokenizer.pad_token_id), self.eos_token_id)
        self.pad_token_id = 0 if pad is None else pad

    def _known(self, token: int | None) -> int | None:
        """`token` unless it lies beyond the model's vocabulary, as padding added to a tokenizer later may."""
        return token if token is not None and token < self.vocab_size else None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def decode_tokens(self, tokens: list[int]) -> list[str]:
        def text_of(part: list[int]) -> str:
            return self._tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        # A token is decoded together with the tokens of the piece before it, because decoders strip leading spaces.
        pieces: list[str] = []
        before, start = 0, 0
        for end in range(1, len(tokens) + 1):
            text = text_of(tokens[before:end])
            may_go_on = end < len(tokens) and end - start < _UTF8_LONGEST
            if text.endswith("\ufffd") and may_go_on:
                pieces.append("")
                continue
            pieces.append(text[len(text_of(tokens[before:start])) :])
            before, start = start, end
        return pieces

    def check_hook_points(self, hook_points: Iterable[str]) -> None:
        for hook_point in hook_points:
            self._hook_points.find(hook_point)

    def width(self, hook_point: str) -> int:
        if hook_point not in self._widths:
            token = torch.tensor([[self.bos_token_id]])
            self._widths[hook_point] = self.activations(token, [hook_point])[hook_point].shape[-1]
        return self._widths[hook_point]

    @torch.no_grad()
    def activations(
        self, tokens: Tensor, hook_points: Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        self._check_input(tokens, attention_mask)
        sites = [self._hook_points.find(name) for name in dict.fromkeys(hook_points)]
        if not sites:
            raise ConfigError("hook_points is empty; name at least one hook point")
        found: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor) -> None:
            if name not in found:
                if activation.shape[:-1] != tokens.shape:
                    raise ConfigError(
                        f"hook point {name!r}: activations of shape {tuple(activation.shape)} for tokens of shape "
                        f"{tuple(tokens.shape)}; name a module that gives [batch, seq, d]"
                    )
                # A copy, because later modules may work in place and two hook points may be one tensor.
                found[name] = activation.clone(memory_format=torch.contiguous_format)
                if len(found) == len(sites):
                    raise _Stop

        with self._one_pass_at_a_time, ExitStack() as hooks:
            for site in sites:
                hooks.enter_context(site.attach(lambda activation, name=site.name: keep(name, activation)))
            try:
                self._model(input_ids=tokens.to(self.device), use_cache=False)
            except _Stop:
                return {site.name: found[site.name] for site in sites}
        missing = ", ".join(site.name for site in sites if site.name not in found)
        raise ConfigError(f"hook point {missing}: the module does not run in a forward pass; name one that does")

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        self._check_input(tokens, attention_mask)
        with self._one_pass_at_a_time, ExitStack() as hooks:
            for name, function in (replace or {}).items():
                hooks.enter_context(self._hook_points.find(name).attach(function))
            return self._model(input_ids=tokens.to(self.device), use_cache=False).logits

    def _check_input(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Check the input; the mask goes no further, because right padding needs none where attention is causal.

        Without a mask `scaled_dot_product_attention` takes its fastest, causal path.
        """
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
            raise DataError(
                f"tokens: shape {tuple(tokens.shape)} of {tokens.dtype}; must be int64 [batch, seq], not empty"
            )
        if tokens.shape[1] > self.max_length:
            raise DataError(
                f"tokens: {tokens.shape[1]} tokens a context exceed the {self.max_length} that max_length and the "
                "model allow; use shorter contexts"
            )
        if tokens.device.type == "cpu" and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise DataError(
                f"tokens: ids {int(tokens.min())} to {int(tokens.max())}; {self.cfg.model_name!r} has 0 to "
                f"{self.vocab_size - 1}; tokenize with the model's own tokenizer"
            )
        if attention_mask is None:
            return
        if attention_mask.shape != tokens.shape:
            raise DataError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; must be that of tokens, {tuple(tokens.shape)}"
            )
        mask = attention_mask.bool()
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise DataError("attention_mask: each row must be ones, then zeros; pad contexts on the right")

    def provenance(self) -> dict[str, str]:
        import transformers

        return {
            "model_name": self.cfg.model_name,
            **self._weights_identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": "huggingface",
            "transformers": transformers.__version__,
        }

    @cached_property
    def _weights_identity(self) -> dict[str, str]:
        source = _source(self.cfg)
        if self.cfg.gguf_file is not None:
            from transformers.utils.hub import cached_file

            file = cached_file(
                source, self.cfg.gguf_file, cache_dir=self.cfg.cache_dir, local_files_only=self.cfg.local_files_only
            )
            return {"path": source, "gguf_file": self.cfg.gguf_file, "sha256": _sha256([Path(str(file))])}
        if Path(source).is_dir():
            weights = sorted(file for ending in ("*.safetensors", "*.bin") for file in Path(source).glob(ending))
            return {"path": source, "sha256": _sha256(weights)}
        return {"path": source, "revision": str(self._model.config._commit_hash)}


def automatic_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` has instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32
    return torch.float32


def _available_device(cfg: LanguageModelConfig) -> torch.device:
    try:
        device = torch.device(cfg.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={cfg.device!r} is not available here ({_one_line(error)}); use 'cpu'") from error
    if cfg.use_flash_attn and device.type != "cuda":
        raise ConfigError(f"use_flash_attn=True needs a CUDA device, not device={cfg.device!r}; set it to False")
    return device


def _source(cfg: LanguageModelConfig) -> str:
    return cfg.model_from_pretrained_path or cfg.model_name


def _from_pretrained(auto_class: Any, what: str, cfg: LanguageModelConfig, **options: Any) -> Any:
    source = _source(cfg)
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
        remedy = (
            "check the name or directory, and that the hub can be reached or local_files_only finds it in cache_dir"
        )
        if cfg.gguf_file is not None:
            remedy = "check the directory and gguf_file, and that the packages gguf and accelerate are installed"
        elif cfg.use_flash_attn:
            remedy = "check the name, install flash-attn and use dtype='bfloat16', or set use_flash_attn=False"
        raise ConfigError(
            f"model_name={source!r}: the {what} cannot be loaded ({_one_line(error)}); {remedy}"
        ) from error


def _load_tokenizer(cfg: LanguageModelConfig) -> Any:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, "tokenizer", cfg)


def _load_model(cfg: LanguageModelConfig, dtype: torch.dtype) -> Any:
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


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _sha256(files: Iterable[Path]) -> str:
    """Digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
