"""A fence around the private interfaces of torch and other libraries: one file names those of torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lm_saes"
HOME = "torch_private.py"
HIDDEN_WORDS = {"found_inf"}
"""Attributes that torch looks for without saying so."""
ELSEWHERE = {
    (
        "models/transformers_files.py",
        "_commit_hash",
    ): "transformers says nowhere else which commit it loaded",
    ("data/text.py", "_fingerprint"): "datasets says nowhere else what a data set was made from",
    ("parallel/launch.py", "_exit"): "documented by os, underscore and all",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file gives to its own classes and objects."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return names


def private_uses(path: str, text: str) -> Iterator[str]:
    """Each use of what another library, or another file of the package, keeps to itself."""
    tree = ast.parse(text)
    own = own_names(tree)
    for node in ast.walk(tree):
        line = f"{path}:{getattr(node, 'lineno', 1)}"
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if is_private(name):
                yield f"{line}: super().{name}"
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(value=value, attr=name) if is_private(name):
                if ast.unparse(value).startswith("torch") or (name not in own and (path, name) not in ELSEWHERE):
                    yield f"{line}: {ast.unparse(node)}"
            case ast.Attribute(attr=name) if name in HIDDEN_WORDS:
                yield f"{line}: {ast.unparse(node)}"
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="ops"), attr="aten"):
                yield f"{line}: torch.ops.aten"
            case ast.Import(names=names):
                yield from (f"{line}: import {n.name}" for n in names if any(map(is_private, n.name.split("."))))
            case ast.ImportFrom(module=module, names=names):
                parts = (module or "").split(".")
                yield from (
                    f"{line}: from {module} import {n.name}" for n in names if any(map(is_private, [*parts, n.name]))
                )


def test_private_interfaces_are_named_in_one_file() -> None:
    found = [
        use
        for file in sorted(PACKAGE.rglob("*.py"))
        if (path := file.relative_to(PACKAGE).as_posix()) != HOME
        for use in private_uses(path, file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "n = torch._C._current_graph_task_id()",
        "torch.ops.aten.relu(x)",
        "torch._foreach_add_(a, b)",
        "from torch._C import x",
        "import torch._dynamo",
        "from torch.optim.adam import _fused_adam",
        "class A(torch.optim.Adam):\n    def _init_group(self):\n        return super()._init_group()",
        "module._parameters['w'] = w",
        "optimizer.found_inf = x",
        "def _private():\n    pass\ntorch._private()",
        "name = config._commit_hash",
        "from lm_saes.data.text import _part",
    ],
)
def test_a_private_use_is_seen(text: str) -> None:
    assert list(private_uses("training/x.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def __init__(self, other):\n        self._x = other._x",
        "class A:\n    def _f(self):\n        pass\nA()._f()",
        "super().__init__()",
        "from __future__ import annotations\nfrom lm_saes.data.text import part",
        "torch.ops.load_library(x)",
    ],
)
def test_what_is_a_files_own_is_let_be(text: str) -> None:
    assert list(private_uses("training/x.py", text)) == []
