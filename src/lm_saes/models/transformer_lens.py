"""Language models run by TransformerLens, through its `TransformerBridge` (versions 3.9 and 4).

The bridge wraps a model of the `transformers` library and keeps its weights as they are: nothing is folded, nothing
centred. Hook points are those that TransformerLens knows, so names within the MLP or attention
(`blocks.6.mlp.hook_post`) exist here too. The bridge computes attention itself and in full, which is slower than
the `huggingface` backend.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from typing import Any

from torch import Tensor

from lm_saes.errors import ConfigError, one_line
from lm_saes.models.base import LanguageModelConfig
from lm_saes.models.hook_points import Edit, MLPParts, edited
from lm_saes.models.pretrained import PretrainedLanguageModel


class TransformerLensLanguageModel(PretrainedLanguageModel):
    """A causal language model loaded by `transformers` and run by TransformerLens, under its hook names.

    The heads of `[batch, seq, heads, d_head]` activations are flattened: `[batch, seq, heads * d_head]`.
    """

    def __init__(self, cfg: LanguageModelConfig) -> None:
        make_bridge = _bridge_maker()
        if cfg.use_flash_attn:
            raise ConfigError(
                "use_flash_attn=True: TransformerLens computes attention itself; set it to False or use "
                "backend='huggingface'"
            )
        super().__init__(cfg)
        # The bridge rebuilds the modules that it is given: it gets copies, which share the weights.
        shared = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        model, architecture = copy.deepcopy(self._model, shared), type(self._model).__name__
        try:
            self._bridge: Any = make_bridge(
                model, architecture, hf_config=copy.deepcopy(model.config), model_name=cfg.model_name
            )
        except ValueError as error:
            raise ConfigError(
                f"backend='transformer_lens': cannot run {architecture} ({one_line(error)}); use backend='huggingface'"
            ) from error
        self._names = set(self._bridge.hook_dict)

    def _find(self, hook_point: str) -> None:
        if hook_point not in self._names:
            near = difflib.get_close_matches(hook_point, sorted(self._names), n=3)
            last = f"blocks.{self.n_layers - 1}.hook_resid_post"
            remedy = f"near names: {', '.join(near)}" if near else f"use one such as {last}"
            raise ConfigError(
                f"hook point {hook_point!r} does not exist in this {type(self._model).__name__} of TransformerLens; "
                f"{remedy}"
            )
        try:
            with ExitStack() as hooks:
                hooks.enter_context(self._hooked({hook_point: lambda activation: None}))
        except ValueError as error:  # a hook that TransformerLens only calls when a setting of its own is on
            raise ConfigError(f"hook point {hook_point!r} is switched off ({one_line(error)}); use another") from error

    def _hooked(self, edits: Mapping[str, Edit]) -> AbstractContextManager[Any]:
        return self._bridge.hooks(fwd_hooks=[(name, self._hook(name, edit)) for name, edit in edits.items()])

    def _hook(self, name: str, edit: Edit) -> Callable[..., Tensor | None]:
        def run(value: Tensor, hook: Any) -> Tensor | None:
            flat = value.flatten(2) if value.ndim == 4 else value
            new = edited(name, flat.to(self.dtype), edit)  # norms hand over float32, whatever the model's dtype
            if new is None:
                return None
            new = new.to(value.dtype).view(value.shape)
            if name.endswith(".hook_resid_mid"):
                # TransformerLens hooks the norm's input, but the block adds the MLP's output to the very same tensor.
                value.copy_(new)
                return None
            return new

        return run

    def _forward(self, tokens: Tensor) -> Tensor:
        return self._bridge(tokens, use_cache=False)

    def _mlp_parts(self, layer: int) -> MLPParts:
        block, prefix = self._bridge.blocks[layer], f"blocks.{layer}."
        inputs = ("ln2.hook_normalized", "hook_resid_mid", "ln2.hook_in", "ln2.hook_out", "mlp.hook_in")
        outputs = ("hook_mlp_out", "mlp.hook_out")
        return MLPParts(
            [getattr(block, name) for name in ("ln2", "mlp", "ln2_post") if hasattr(block, name)],
            [prefix + name for name in inputs if prefix + name in self._names],
            [prefix + name for name in outputs if prefix + name in self._names],
        )

    @property
    def _backend_identity(self) -> dict[str, str]:
        return {"backend": "transformer_lens", "transformer_lens": version("transformer-lens")}


def _bridge_maker() -> Callable[..., Any]:
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise ConfigError(
            "backend='transformer_lens' needs the package transformer-lens, 3.9 or newer; run "
            "`pip install 'lm-saes[transformer-lens]'`, or use backend='huggingface', with the same hook names"
        ) from error
    return build_bridge_from_module
