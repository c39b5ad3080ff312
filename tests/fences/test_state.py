"""A fence around state: none belongs to a module or a class, where one run would meet what another has left.

Registries that class definitions fill (in `__init_subclass__`) are no state.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lm_saes"
ALLOWED = {
    (
        "data/peek.py",
        "_SEEN",
    ): "what was peeked at in a caller's iterator, which takes no attributes",
    ("data/peek.py", "_KEPT"): "the same",
}
CONTAINERS = {
    "dict", "list", "set", "deque", "defaultdict", "Counter", "OrderedDict", "WeakKeyDictionary", "WeakValueDictionary",
    "WeakSet", "bytearray",
}  # fmt: skip
CHANGING = {
    "append", "appendleft", "add", "update", "setdefault", "pop", "popleft", "popitem", "clear", "extend", "insert",
    "remove", "discard",
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


def containers(tree: ast.Module) -> set[str]:
    """Names of a module that hold something that can be changed."""
    names: set[str] = set()
    for node in tree.body:
        match node:
            case ast.Assign(targets=targets, value=value):
                pass
            case ast.AnnAssign(target=target, value=value) if value is not None:
                targets = [target]
            case _:
                continue
        made = ast.unparse(value.func).rpartition(".")[2].partition("[")[0] if isinstance(value, ast.Call) else ""
        literal = isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)
        if literal or made in CONTAINERS:
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def changed(function: Function) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Whatever a function changes in place: where, and what."""
    for node in ast.walk(function):
        match node:
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                yield node, value
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in CHANGING:
                yield node, value
            case ast.AugAssign(target=ast.Name() | ast.Attribute() as target):
                yield node, target
            case ast.Attribute(ctx=ast.Store()):
                yield node, node


def keeps_objects(function: Function) -> bool:
    """Whether results are kept for each of its arguments."""
    words = [ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2] for d in function.decorator_list]
    arguments = function.args
    takes = arguments.args or arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg
    return bool({"cache", "lru_cache"} & set(words) and takes)


def state(path: str, text: str) -> Iterator[str]:
    """Each place where a function changes what belongs to a module or to a class."""
    tree = ast.parse(text)
    known = containers(tree)
    modules = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm_saes")
        for name in node.names
        if name.name.islower()
    }
    for function in ast.walk(tree):
        if not isinstance(function, Function):
            continue
        if keeps_objects(function):
            yield f"{path}:{function.lineno}: {function.name} keeps what it has made for its arguments"
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield f"{path}:{node.lineno}: global {', '.join(node.names)}"
        here = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)} | {
            n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for node, what in changed(function):
            match what:
                case ast.Name(id=name) if name in known - here and (path, name) not in ALLOWED:
                    yield f"{path}:{getattr(node, 'lineno', 1)}: {name} belongs to the module"
                case ast.Attribute(value=ast.Name(id=name), attr=attr) if not function.name.endswith("init_subclass__"):
                    own = name not in here
                    if name == "cls" or (own and name[:1].isupper()) or (own and name in modules):
                        yield f"{path}:{getattr(node, 'lineno', 1)}: {name}.{attr} belongs to all"


def test_nothing_belongs_to_a_module_that_changes() -> None:
    found = [
        use
        for file in sorted(PACKAGE.rglob("*.py"))
        for use in state(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "N = 0\ndef f():\n    global N\n    N = 1",
        "SEEN = {}\ndef f(x):\n    SEEN[x] = 1",
        "SEEN: dict[int, int] = {}\ndef f(x):\n    SEEN.setdefault(x, 1)",
        "SEEN = []\ndef f(x):\n    del SEEN[0]",
        "SEEN = weakref.WeakKeyDictionary()\nclass A:\n    def f(self):\n        SEEN.pop(self)",
        "from functools import cache\n@cache\ndef axes_of(mesh):\n    return Axes(mesh)",
        "@functools.lru_cache(maxsize=1)\ndef f(*shape):\n    return zeros(shape)",
        "class A:\n    made = []\n    def f(self):\n        A.made.append(self)",
        "class A:\n    @classmethod\n    def f(cls):\n        cls.n = 1",
        "from lm_saes import machine\ndef f():\n    machine.SPARE = 3",
    ],
)
def test_state_is_seen(text: str) -> None:
    assert len(list(state("data/x.py", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "SEEN = {1: 2}\ndef f(x):\n    return SEEN[x]",
        "SEEN = {1: 2}\ndef f():\n    SEEN = {}\n    SEEN[1] = 3",
        "@cache\ndef has_triton():\n    return find_spec('triton') is not None",
        "class A:\n    kinds = {}\n    def __init_subclass__(cls):\n        A.kinds[cls.name] = cls",
        "class A:\n    def f(self):\n        self.n = 1\n        self.seen.append(2)",
        "def f(optimizer):\n    optimizer.found = 1",
        "TABLE = {}\nTABLE['a'] = 1",
    ],
)
def test_what_is_no_state_is_let_be(text: str) -> None:
    assert list(state("data/x.py", text)) == []
