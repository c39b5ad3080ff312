"""docs/MAP.md has a line for every file of the package: `python -m tests.fences.test_map` writes it anew."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lm_saes"
MAP = ROOT / "docs" / "MAP.md"
HEAD = """# Map

Every file of the package with the first line of its docstring. Files import from their own floor and from those below
(`tests/fences/test_floors.py`). Written by `python -m tests.fences.test_map`.
"""


def first_line(path: Path) -> str:
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return told.splitlines()[0] if told else ""


def drawn() -> str:
    """The map as it should be: folders in order of their names, the package's own files first."""
    lines = [HEAD]
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    for folder in folders:
        files = {path.name: first_line(path) for path in sorted(folder.glob("*.py"))}
        about = files.pop("__init__.py", "")
        lines += [f"## {folder.relative_to(PACKAGE.parent).as_posix()}/", "", about, ""]
        lines += [f"- `{name}`: {line}" for name, line in files.items()] + [""]
    return "\n".join(lines)


def test_every_file_says_what_it_is() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if not first_line(path)] == []


def test_the_map_is_as_the_files_say() -> None:
    assert MAP.read_text(encoding="utf-8") == drawn()


if __name__ == "__main__":
    MAP.write_text(drawn(), encoding="utf-8")
