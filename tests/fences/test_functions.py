"""A fence around the length of functions and files (their branches: ruff's `C901`)."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "lm_saes"
LINES_OF_A_FUNCTION = 45
"""Without the docstring."""
LINES_OF_A_FILE = 400


def long_functions(path: str, text: str) -> Iterator[str]:
    """Each function that is longer than one can hold in view."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            told = ast.get_docstring(node) is not None
            lines = (node.end_lineno or 0) - node.lineno + 1
            lines -= (first.end_lineno or 0) - first.lineno + 1 if told else 0
            if lines > LINES_OF_A_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_functions_fit_on_a_screen() -> None:
    found = [
        line
        for file in sorted(PACKAGE.rglob("*.py"))
        for line in long_functions(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_files_can_be_read_in_one_sitting() -> None:
    lines = {
        file.relative_to(PACKAGE).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in PACKAGE.rglob("*.py")
    }
    assert {path: n for path, n in lines.items() if n > LINES_OF_A_FILE} == {}


def test_a_long_function_is_found_and_its_docstring_not_counted() -> None:
    told = '    """Said in\n' + "    many lines\n" * LINES_OF_A_FUNCTION + '    """\n'
    body = "    x = 1\n" * (LINES_OF_A_FUNCTION - 1)
    assert list(long_functions("a.py", f"def f():\n{told}{body}")) == []
    assert list(long_functions("a.py", f"def f():\n{told}{body}    return x\n")) == ["a.py:1: f has 46 lines"]
