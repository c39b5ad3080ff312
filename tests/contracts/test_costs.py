"""What an extension costs: the table in docs/EXTENDING.md, counted from the code there (which test_readme runs)."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StableLmConfig

from lm_saes.models.hook_points import LAYOUTS, HookPoints, Layout

from ..unit.models.test_hook_points import read_all
from ..unit.random_model import random_model

PAGE = Path(__file__).parents[2] / "docs" / "EXTENDING.md"
COUNTED = {
    "kind of dictionary, its config included": ("Tied", "TiedConfig"),
    "activation function": ("StrongTopK",),
    "sparsity loss with a setting": ("SumOfSquares",),
    "rate schedule with a setting": ("Staircase",),
    "optimizer with a setting": ("Descent",),
    "step of the initialisation with a setting": ("Shift",),
    "logger with a setting": ("LinesLogger", "Lines"),
    "metric": ("SilentTokens",),
    "layout of hook points": ("LAYOUTS",),
}


def lines_of_statements() -> dict[str, int]:
    """Lines of every class, and of every entry of a table, in the page's code."""
    found: dict[str, int] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.parse(block).body:
            match node:
                case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]):
                    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                    found[name] = (node.end_lineno or 0) - first + 1
    return found


def test_the_table_of_costs_is_counted() -> None:
    lines = lines_of_statements()
    table = dict(re.findall(r"^\| an? (.*?) \| 1 \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert table == {what: str(sum(lines[name] for name in names)) for what, names in COUNTED.items()}


def test_a_layout_of_hook_points_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = random_model(
        StableLmConfig(
            vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    assert HookPoints(model, model.config).names == []
    entry = Layout(
        embed="model.embed_tokens", blocks="model.layers", ln1="input_layernorm", ln2="post_attention_layernorm",
        attn_out="self_attn", mlp_out="mlp", attn_projection="self_attn.o_proj",
        parallel_setting="use_parallel_residual",
    )  # fmt: skip
    monkeypatch.setitem(LAYOUTS, "stablelm", entry)
    seen, output = read_all(model)
    for i in range(2):
        parts = [seen[f"blocks.{i}.hook_{part}"] for part in ("resid_pre", "attn_out", "mlp_out")]
        torch.testing.assert_close(sum(parts), seen[f"blocks.{i}.hook_resid_post"], rtol=1e-5, atol=1e-5)
    assert torch.equal(output.hidden_states[1], seen["blocks.0.hook_resid_post"])
