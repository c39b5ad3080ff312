"""Hook points of a tiny model of each layout, against hidden states and against a recomputation by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_saes.errors import ConfigError
from lm_saes.models.hook_points import LAYOUTS, HookPoints

from ..random_model import CONFIGS, N_LAYERS, PARALLEL, TOKENS, random_model


def build(kind: str) -> Any:
    return random_model(CONFIGS[kind]()).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=list(CONFIGS))
def kind_and_model(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, build(request.param)


def run(model: Any, tokens: Tensor, edits: dict[str, Callable[[Tensor], Tensor | None]]) -> Any:
    points = HookPoints(model, model.config)
    handles = [points.find(name).attach(edit) for name, edit in edits.items()]
    try:
        with torch.no_grad():
            return model(tokens, use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()


def read_all(model: Any, tokens: Tensor = TOKENS) -> tuple[dict[str, Tensor], Any]:
    seen: dict[str, Tensor] = {}
    names = HookPoints(model, model.config).names
    output = run(model, tokens, {name: lambda x, name=name: seen.update({name: x.clone()}) for name in names})
    assert list(seen) == [name for name in names if name in seen] and len(seen) == len(names)
    return seen, output


def test_every_layout_is_covered() -> None:
    assert {kind.split()[0] for kind in CONFIGS} == set(LAYOUTS)


def test_residual_stream_is_the_models_hidden_states(kind_and_model: tuple[str, Any]) -> None:
    _, model = kind_and_model
    seen, output = read_all(model)
    for i in range(N_LAYERS):
        assert torch.equal(seen[f"blocks.{i}.hook_resid_pre"], output.hidden_states[i])
    for i in range(N_LAYERS - 1):
        assert torch.equal(seen[f"blocks.{i}.hook_resid_post"], output.hidden_states[i + 1])
    last = model.base_model.get_submodule(
        {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(model.config.model_type, "norm")
    )
    torch.testing.assert_close(last(seen[f"blocks.{N_LAYERS - 1}.hook_resid_post"]), output.hidden_states[-1])


def test_parts_add_up_to_the_residual_stream(kind_and_model: tuple[str, Any]) -> None:
    kind, model = kind_and_model
    seen, _ = read_all(model)
    for i in range(N_LAYERS):
        pre, attn, mlp, post = (
            seen[f"blocks.{i}.hook_{part}"] for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        assert attn.std() > 1e-2 and mlp.std() > 1e-2
        torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-5, atol=1e-5)
        if kind != PARALLEL:
            torch.testing.assert_close(pre + attn, seen[f"blocks.{i}.hook_resid_mid"], rtol=1e-5, atol=1e-5)


def test_normalized_is_before_weight_and_bias(kind_and_model: tuple[str, Any]) -> None:
    kind, model = kind_and_model
    seen, _ = read_all(model)
    for i in range(N_LAYERS):
        for norm, source in (("ln1", "resid_pre"), ("ln2", "resid_pre" if kind == PARALLEL else "resid_mid")):
            x = seen[f"blocks.{i}.hook_{source}"].double()
            if kind.startswith("gpt"):
                x = x - x.mean(-1, keepdim=True)
            by_hand = x / x.pow(2).mean(-1, keepdim=True).sqrt()
            torch.testing.assert_close(
                seen[f"blocks.{i}.{norm}.hook_normalized"].double(), by_hand, rtol=1e-3, atol=1e-3
            )


def test_hook_z_projects_to_attention_output(kind_and_model: tuple[str, Any]) -> None:
    kind, model = kind_and_model
    seen, _ = read_all(model)
    block = model.base_model.get_submodule("h.1" if kind == "gpt2" else "layers.1")
    attention = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}.get(model.config.model_type, "self_attn.o_proj")
    out = block.get_submodule(attention)(seen["blocks.1.attn.hook_z"])
    if kind.startswith("gemma"):
        out = block.post_attention_layernorm(out)
    torch.testing.assert_close(out, seen["blocks.1.hook_attn_out"])
    heads = model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or 32 // heads
    assert seen["blocks.1.attn.hook_z"].shape == (*TOKENS.shape, heads * head_dim)


def test_embedding(kind_and_model: tuple[str, Any]) -> None:
    kind, model = kind_and_model
    seen, _ = read_all(model)
    torch.testing.assert_close(seen["hook_embed"], model.get_input_embeddings()(TOKENS))
    scale = 32**0.5 if kind.startswith("gemma") else 1
    torch.testing.assert_close(seen["hook_embed"], model.get_input_embeddings().weight[TOKENS] * scale)


def test_replacing_with_the_same_changes_nothing(kind_and_model: tuple[str, Any]) -> None:
    _, model = kind_and_model
    seen, output = read_all(model)
    again = run(model, TOKENS, {name: lambda x: x.clone() for name in seen})
    torch.testing.assert_close(again.logits, output.logits, rtol=1e-4, atol=1e-4)


def test_replacement_reaches_everything_downstream(kind_and_model: tuple[str, Any]) -> None:
    """Putting at each hook point what a run on other tokens has there: the run then equals one by hand."""
    kind, model = kind_and_model
    other, other_output = read_all(model, TOKENS.flip(1))
    _, output = read_all(model)
    for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        for i in range(N_LAYERS):
            if (kind, name) == (PARALLEL, "hook_resid_mid"):
                continue
            swapped = run(model, TOKENS, {f"blocks.{i}.{name}": lambda _, key=f"blocks.{i}.{name}": other[key]})
            torch.testing.assert_close(swapped.logits, other_output.logits, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(swapped.logits, output.logits, atol=1e-2)


@pytest.mark.parametrize(("part", "left"), [("attn_out", "mlp_out"), ("mlp_out", "attn_out")])
def test_replaced_parts_are_what_is_added(kind_and_model: tuple[str, Any], part: str, left: str) -> None:
    _, model = kind_and_model
    after: dict[str, Tensor] = {}
    edits: dict[str, Callable[[Tensor], Tensor | None]] = {f"blocks.1.hook_{part}": torch.zeros_like}
    for name in ("resid_pre", left, "resid_post"):
        edits[f"blocks.1.hook_{name}"] = lambda x, name=name: after.update({name: x.clone()})
    run(model, TOKENS, edits)
    torch.testing.assert_close(after["resid_pre"] + after[left], after["resid_post"], rtol=1e-5, atol=1e-5)


def test_replaced_normalized_gets_weight_and_bias(kind_and_model: tuple[str, Any]) -> None:
    kind, model = kind_and_model
    path = {"gpt2": "h.1.ln_2", "gpt_neox": "layers.1.post_attention_layernorm"}.get(model.config.model_type)
    path = path or (
        "layers.1.pre_feedforward_layernorm" if kind.startswith("gemma") else "layers.1.post_attention_layernorm"
    )
    norm = model.base_model.get_submodule(path)
    outputs: list[Tensor] = []
    value = torch.randn(*TOKENS.shape, 32, generator=torch.Generator().manual_seed(3))
    points = HookPoints(model, model.config)
    first = points.find("blocks.1.ln2.hook_normalized").attach(lambda _: value)
    second = norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    with first, second, torch.no_grad():
        model(TOKENS, use_cache=False)
    weight = norm.weight + 1 if kind.startswith("gemma") else norm.weight
    torch.testing.assert_close(outputs[0], value * weight + (norm.bias if kind.startswith("gpt") else 0))


def test_replacement_takes_the_models_dtype_and_must_keep_the_shape() -> None:
    model = build("llama").to(torch.bfloat16)
    kept = run(model, TOKENS, {})
    cast = run(model, TOKENS, {"blocks.1.hook_resid_post": lambda x: x.double()})
    assert torch.equal(kept.logits, cast.logits)
    with pytest.raises(ConfigError, match=r"'blocks.1.hook_mlp_out': the replacement has shape \(2, 3, 32\)"):
        run(model, TOKENS, {"blocks.1.hook_mlp_out": lambda x: x[:, :3]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks.1.hook_resid_pots",
            r"'blocks.1.hook_resid_pots' does not exist in this llama model; near names: blocks.1.hook_resid_post",
        ),
        ("blocks.3.hook_resid_post", r"near names: blocks.\d.hook_resid_post"),
        ("model.layers.1.mpl", r"near names: model.layers.1.mlp"),
        ("", r"use one such as blocks.2.hook_resid_post"),
    ],
)
def test_unknown_names_list_near_ones(name: str, message: str) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match=message):
        HookPoints(model, model.config).find(name)


def test_parallel_blocks_have_no_resid_mid() -> None:
    model = build("gpt_neox")
    with pytest.raises(ConfigError, match="attention and MLP run in parallel"):
        HookPoints(model, model.config).find("blocks.1.hook_resid_mid")


def test_unknown_layout_takes_module_paths() -> None:
    class Config:
        model_type = "unheard_of"

    model = nn.Sequential(nn.Linear(2, 2))
    points = HookPoints(model, Config())
    assert points.names == [] and points.find("0").module is model[0]
    with pytest.raises(ConfigError, match="layout is not known, so give a module's path"):
        points.find("blocks.0.hook_resid_post")
