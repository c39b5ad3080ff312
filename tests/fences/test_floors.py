"""A fence around the floors of the package: files import from their own floor and from those below, in no circle."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = "lm_saes"
FLOORS = (
    ("machine", "torch_private", "errors", "config", "choices"),
    ("axes", "parallel"),
    ("storage",),
    ("latents",),
    ("losses", "metrics"),
    ("models",),
    ("data",),
    ("dictionaries",),
    ("training",),
    ("trainer", "initializer", "initialization"),
    ("evaluation", "report"),
    ("runs",),
    ("runners", "demo", "cli", "__main__", ""),
)
"""Rooms (and files beside them) from the lowest floor to the highest; `""` is the package itself."""
Imports = dict[str, dict[str, int]]
"""What each module imports of the package, and in which line: within functions and for types too."""


def imports_of(files: Mapping[str, str]) -> Imports:
    """What modules, given by name with their text, import of one another."""
    found: Imports = {}
    for module, text in files.items():
        here = found.setdefault(module, {})
        for node in ast.walk(ast.parse(text)):
            names: list[str] = []
            match node:
                case ast.ImportFrom(module=str(source), names=aliases):
                    names = [f"{source}.{alias.name}" for alias in aliases]
                    names = [name if name in files else source for name in names]
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
            here |= {name: node.lineno for name in names if name in files and name != module}  # type: ignore[attr-defined]
    return found


def first_circle(imports: Imports) -> list[str]:
    """The modules of a circle of imports, in order; none if there is no circle."""
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        for other in sorted(imports[module]) if module not in done else ():
            if found := follow(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := follow(module, []))), [])


def upward(imports: Imports, floors: tuple[tuple[str, ...], ...] = FLOORS) -> Iterator[str]:
    """Each import of something on a higher floor."""
    number = {room: i for i, rooms in enumerate(floors) for room in rooms}

    def floor(module: str) -> int:
        return number[module.removeprefix(PACKAGE).strip(".").partition(".")[0]]

    for module, others in imports.items():
        for other, line in others.items():
            if floor(other) > floor(module):
                yield f"{module}:{line}: imports {other}, which is on a higher floor"


@pytest.fixture(scope="module")
def imports() -> Imports:
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for path in sorted((SOURCE / PACKAGE).rglob("*.py"))
    }
    return imports_of(files)


def test_no_files_import_one_another_in_a_circle(imports: Imports) -> None:
    assert first_circle(imports) == []


def test_no_file_imports_from_a_higher_floor(imports: Imports) -> None:
    assert list(upward(imports)) == []


def test_a_circle_is_found_and_named() -> None:
    files = {
        "lm_saes.data.a": "import lm_saes.data.b",
        "lm_saes.data.b": "def f():\n    from lm_saes.data import c",
        "lm_saes.data.c": "if TYPE_CHECKING:\n    from lm_saes.data.a import A",
        "lm_saes.data.d": "from lm_saes.data.a import A",
    }
    assert first_circle(imports_of(files)) == ["lm_saes.data.a", "lm_saes.data.b", "lm_saes.data.c"]
    del files["lm_saes.data.c"]
    assert first_circle(imports_of(files)) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("from lm_saes.training.run import Run", 1),
        ("def f():\n    import lm_saes.training.run", 2),
        ("if TYPE_CHECKING:\n    from lm_saes.training import run", 2),
    ],
)
def test_a_way_up_is_found_and_named(text: str, line: int) -> None:
    files = {"lm_saes.storage.x": text, "lm_saes.training.run": "from lm_saes.storage.x import y"}
    wanted = f"lm_saes.storage.x:{line}: imports lm_saes.training.run, which is on a higher floor"
    assert list(upward(imports_of(files))) == [wanted]
