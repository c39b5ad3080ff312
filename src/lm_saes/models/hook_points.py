"""Hook points: TransformerLens' names of places in a model, found in Hugging Face models.

`LAYOUTS` says, for each `config.model_type`, which modules stand where; adding a layout is adding one entry. Values are
those of TransformerLens' `from_pretrained_no_processing` (nothing folded, nothing centred):

- `hook_attn_out`, `hook_mlp_out`: what is added to the residual stream, so after Gemma's post-norms.
- `attn.hook_z`: the input of attention's output projection, heads flattened: `[batch, seq, heads * d_head]`.
- `ln1.hook_normalized`, `ln2.hook_normalized`: the normalised input *before* the norm's weight and bias. The hook of
  TransformerLens' `RMSNorm` was always there (`hook_normalized(x / scale)`, then `* w`), that of its `LayerNorm` since
  version 3 (pull request 770; version 2 had it after weight and bias). What a norm hands on, weight included, is the
  output of the norm's module.
- `hook_resid_mid`: where attention and MLP run in parallel it does not exist.

Any other module's output is reached by the module's own path, as in `model.layers.3.mlp`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lm_saes.errors import ConfigError

Part = Literal["input", "output", "residual", "normalized"]
Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Layout:
    """Where one family of models keeps its parts: paths from the model, then paths from one block."""

    embed: str
    blocks: str
    ln1: str
    ln2: str
    attn_out: str
    mlp_out: str
    attn_projection: str
    mlp: str = "mlp"
    norm_weight_offset: float = 0.0
    """What the norms add to their weight before they multiply with it (Gemma: 1)."""
    parallel_setting: str | None = None
    """The setting of the model's config that, when true, makes attention and MLP read the same input."""

    def places(self, model_config: Any) -> dict[str, tuple[str, Part]]:
        """Hook name within a block -> (module's path within the block, part of that module)."""
        places: dict[str, tuple[str, Part]] = {
            "hook_resid_pre": ("", "input"),
            "ln1.hook_normalized": (self.ln1, "normalized"),
            "attn.hook_z": (self.attn_projection, "input"),
            "hook_attn_out": (self.attn_out, "output"),
            "hook_resid_mid": (self.ln2, "residual"),
            "ln2.hook_normalized": (self.ln2, "normalized"),
            "hook_mlp_out": (self.mlp_out, "output"),
            "hook_resid_post": ("", "output"),
        }
        if self.parallel_setting is not None and getattr(model_config, self.parallel_setting):
            del places["hook_resid_mid"]
        return places


_LLAMA = Layout(
    embed="model.embed_tokens",
    blocks="model.layers",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    attn_out="self_attn",
    mlp_out="mlp",
    attn_projection="self_attn.o_proj",
)
_GEMMA = Layout(
    embed="model.embed_tokens",
    blocks="model.layers",
    ln1="input_layernorm",
    ln2="pre_feedforward_layernorm",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    attn_projection="self_attn.o_proj",
    norm_weight_offset=1.0,
)
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Layout(
        embed="transformer.wte",
        blocks="transformer.h",
        ln1="ln_1",
        ln2="ln_2",
        attn_out="attn",
        mlp_out="mlp",
        attn_projection="attn.c_proj",
    ),
    "gpt_neox": Layout(
        embed="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        attn_out="attention",
        mlp_out="mlp",
        attn_projection="attention.dense",
        parallel_setting="use_parallel_residual",
    ),
}
"""`config.model_type` of a Hugging Face model -> its layout."""


@dataclass(frozen=True)
class HookLocation:
    """One hook point of one loaded model."""

    name: str
    module: nn.Module
    part: Part
    norm_weight_offset: float = 0.0

    def attach(self, edit: Edit) -> RemovableHandle:
        """Call `edit(activation)` when the model passes here; a tensor that it returns takes the activation's place."""
        match self.part:
            case "input" | "residual":
                return self.module.register_forward_pre_hook(self._before(edit), with_kwargs=True)
            case "output" | "normalized":
                return self.module.register_forward_hook(self._after(edit))

    def _before(self, edit: Edit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = args[0] if args else kwargs["hidden_states"]
            new = edited(self.name, value, edit)
            if new is None:
                return None
            if self.part == "residual":
                # The block adds the MLP's output to the very tensor that enters the norm: it must change for both.
                value.copy_(new)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def _after(self, edit: Edit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.part == "normalized":
                new = edited(self.name, _normalized(module, args[0]), edit)
                return None if new is None else self._weighted(new).to(output.dtype)
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"hook point {self.name!r}: {type(module).__name__} returns {type(value).__name__}, not a tensor; "
                    "name a module that returns a tensor"
                )
            new = edited(self.name, value, edit)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def _weighted(self, normalized: Tensor) -> Tensor:
        parameters = dict(self.module.named_parameters(recurse=False))
        weighted = normalized * (self.norm_weight_offset + parameters["weight"])
        return weighted + parameters["bias"] if "bias" in parameters else weighted


def edited(name: str, value: Tensor, edit: Edit) -> Tensor | None:
    """What `edit` puts in the place of the activation `value` at hook point `name`, None if it only looks.

    Raises:
        ConfigError: the replacement has another shape.
    """
    new = edit(value)
    if new is None:
        return None
    if new.shape != value.shape:
        raise ConfigError(
            f"hook point {name!r}: the replacement has shape {tuple(new.shape)}, "
            f"the activation {tuple(value.shape)}; they must be equal"
        )
    return new.to(device=value.device, dtype=value.dtype)


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    eps = getattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps")
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


@dataclass(frozen=True)
class MLPParts:
    """The MLP of one layer, with the norms around it."""

    modules: Sequence[nn.Module]
    """Norm, MLP and (Gemma) post-norm: each reads what the one before it gives."""
    inputs: Sequence[str]
    """The hook points in front of the MLP, at which everything that it reads passes."""
    outputs: Sequence[str]
    """The hook points behind it."""


class HookPoints:
    """The hook points of one Hugging Face model with a language-modelling head."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model_type: str = model_config.model_type
        self._modules = dict(model.named_modules())
        self._named: dict[str, HookLocation] = {}
        self._layout = layout = LAYOUTS.get(self._model_type)
        if layout is None:
            return
        self._named["hook_embed"] = HookLocation("hook_embed", self._modules[layout.embed], "output")
        places = layout.places(model_config)
        for i in range(model_config.num_hidden_layers):
            for suffix, (path, part) in places.items():
                name = f"blocks.{i}.{suffix}"
                module = self._modules[".".join(filter(None, (layout.blocks, str(i), path)))]
                self._named[name] = HookLocation(name, module, part, layout.norm_weight_offset)

    @property
    def names(self) -> list[str]:
        """The TransformerLens names that this model has, in the order of the forward pass."""
        return list(self._named)

    def mlp(self, layer: int) -> MLPParts:
        """The MLP of a layer.

        Raises:
            ConfigError: the layout of this model is not known.
        """
        if self._layout is None:
            raise ConfigError(
                f"layer {layer}: the layout of {self._model_type} models is not known, nor where their MLPs stand"
            )
        block = f"{self._layout.blocks}.{layer}"
        paths = [
            f"{block}.{path}" for path in dict.fromkeys([self._layout.ln2, self._layout.mlp, self._layout.mlp_out])
        ]
        before = (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_resid_mid")
        return MLPParts(
            [self._modules[path] for path in paths],
            [*(name for name in before if name in self._named), paths[0]],
            [f"blocks.{layer}.hook_mlp_out", *paths[1:]],
        )

    def find(self, name: str) -> HookLocation:
        """The place called `name`, a TransformerLens name or a module's path.

        Raises:
            ConfigError: this model has no such place; the message lists near names.
        """
        if name in self._named:
            return self._named[name]
        if name and name in self._modules:
            return HookLocation(name, self._modules[name], "output")
        near = difflib.get_close_matches(name, [*self._named, *filter(None, self._modules)], n=3)
        if near:
            remedy = f"near names: {', '.join(near)}"
        elif self._named:
            remedy = f"use one such as {self.names[-1]} or a module's path"
        else:
            remedy = "its layout is not known, so give a module's path, whose output is then taken"
        if (
            name.endswith(".hook_resid_mid")
            and self._named
            and not any(key.endswith("hook_resid_mid") for key in self._named)
        ):
            remedy = "its attention and MLP run in parallel, so use hook_resid_pre or hook_resid_post"
        raise ConfigError(f"hook point {name!r} does not exist in this {self._model_type} model; {remedy}")
