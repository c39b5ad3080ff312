"""A fence around what this machine can do: one file asks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lm_saes"
HOME = "machine.py"
QUESTIONS = {
    "get_capabilities", "is_bf16_supported", "get_device_properties", "get_device_capability", "mem_get_info",
    "sysconf", "cpu_count", "libc_ver",
}  # fmt: skip


def questions(path: str, text: str) -> Iterator[str]:
    """Each place that asks the machine itself."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(attr=name) | ast.alias(name=name) if name in QUESTIONS:
                yield f"{path}:{node.lineno}: {name}"


def test_one_file_asks_what_the_machine_can_do() -> None:
    found = [
        use
        for file in sorted(PACKAGE.rglob("*.py"))
        if (path := file.relative_to(PACKAGE).as_posix()) != HOME
        for use in questions(path, file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("text", ["can = torch.cpu.get_capabilities()", "from os import sysconf", "n = os.cpu_count()"])
def test_a_question_is_seen(text: str) -> None:
    assert len(list(questions("latents/x.py", text))) == 1


def test_asking_machine_is_let_be() -> None:
    assert list(questions("latents/x.py", "fast = machine.cpu_computes_in(torch.bfloat16)")) == []
