"""Fences: rules about the source that no other test would notice being broken.

Each rule is a function from source files to breaches ("file:line: what"); each is also shown a bad snippet, so that one
sees it fail.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lm_saes"


@dataclass(frozen=True)
class Source:
    path: str
    """Relative to the package, with forward slashes."""
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


SOURCES = [
    Source(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
]
Rule = Callable[[Source], Iterator[str]]


# --- what imports what -----------------------------------------------------------------------------------------------

MATHEMATICS = ("dictionaries/", "latents/", "losses/", "metrics/", "initializer.py")
MACHINERY = ("torch.distributed", "wandb", "transformers", "transformer_lens", "datasets")
DISTRIBUTED = ("parallel/",)


def imported(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every module that is imported or reached as an attribute (`torch.distributed.barrier`), wherever it stands."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=names):
                yield from ((node, name.name) for name in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((node, f"{module}.{name.name}") for name in names)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
                yield node, f"torch.{attribute}"
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield node, module


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def mathematics_imports_no_machinery(source: Source) -> Iterator[str]:
    if source.path.startswith(MATHEMATICS):
        for node, name in imported(source):
            if any(within(name, module) for module in MACHINERY):
                yield source.at(node, f"mathematics imports {name}")


def only_parallel_imports_torch_distributed(source: Source) -> Iterator[str]:
    if not source.path.startswith(DISTRIBUTED):
        for node, name in imported(source):
            if within(name, "torch.distributed"):
                yield source.at(node, "torch.distributed outside parallel/")


# --- size ------------------------------------------------------------------------------------------------------------


def files_are_short(source: Source) -> Iterator[str]:
    limit = 250 if source.path == "trainer.py" else 300 if source.path.startswith("dictionaries/") else 400
    lines = len(source.text.splitlines())
    if lines > limit:
        yield f"{source.path}: {lines} lines, more than {limit}"


# --- safety ----------------------------------------------------------------------------------------------------------


def keywords(call: ast.Call) -> dict[str, object]:
    return {word.arg: word.value.value for word in call.keywords if word.arg and isinstance(word.value, ast.Constant)}


UNPICKLERS = (
    "pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle",
    "torch.jit", "torch.package", "torch.hub", "torch.serialization", "pandas.read_pickle",
    "torch.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader",
    "yaml.UnsafeLoader", "yaml.FullLoader",
    "torch.distributed.checkpoint.FileSystemReader", "torch.distributed.checkpoint.filesystem",
)  # fmt: skip
"""What unpickles, or makes objects that a file names. Of these, `torch.load` is allowed with `weights_only=True`."""
RUNNERS = ("eval", "exec", "compile", "__import__")


def nothing_is_unpickled(source: Source) -> Iterator[str]:  # noqa: C901 (one case for each way to do it)
    for node, name in imported(source):
        if any(within(name, module) for module in UNPICKLERS) and not isinstance(node, ast.Attribute):
            yield source.at(node, f"imports {name}")
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                if keywords(node).get("weights_only") is not True:
                    yield source.at(node, "torch.load without weights_only=True")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr=name)) if "load" in name:
                if name not in ("safe_load", "safe_load_all"):
                    yield source.at(node, f"yaml.{name}")
            case ast.Attribute(attr="read_pickle" | "FileSystemReader" | "add_safe_globals" as name):
                yield source.at(node, name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="jit" | "package" | "hub" | "serialization" as name):
                yield source.at(node, f"torch.{name}")
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" as name):
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    yield source.at(node.value, f"{name} that may be True")
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    is_flag = isinstance(key, ast.Constant) and key.value in ("allow_pickle", "trust_remote_code")
                    if is_flag and not (isinstance(value, ast.Constant) and value.value is False):
                        yield source.at(node, "allow_pickle or trust_remote_code that may be True")
            case ast.Call(func=ast.Name(id=name)) if name in RUNNERS:
                yield source.at(node, f"{name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="builtins"), attr=name)) if name in RUNNERS:
                yield source.at(node, f"{name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name)):
                yield source.at(node, f"os.{name}()")
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                yield source.at(node.value, "shell=True")


# --- habits ----------------------------------------------------------------------------------------------------------


def asserts_are_for_our_own_invariants(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        match node:
            case ast.Assert(test=test):
                parts = [test, *(ast.walk(test))]
                if any(isinstance(part, ast.Call) and ast.unparse(part.func) == "isinstance" for part in parts):
                    yield source.at(node, "assert isinstance: raise for people, or let the types show it")


def accumulation_repeats_itself(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="index_put_" | "index_put"), args=args):
                third = args[2].value if len(args) > 2 and isinstance(args[2], ast.Constant) else False
                if keywords(node).get("accumulate", third):
                    yield source.at(node, "index_put_ with accumulate=True does not repeat itself bit for bit")


def exceptions_are_not_swallowed(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if node.type is None:
                yield source.at(node, "bare except")
            elif everything and all(isinstance(line, ast.Pass | ast.Continue) for line in node.body):
                yield source.at(node, "every exception is swallowed")


RULES: list[Rule] = [
    mathematics_imports_no_machinery,
    only_parallel_imports_torch_distributed,
    files_are_short,
    nothing_is_unpickled,
    asserts_are_for_our_own_invariants,
    accumulation_repeats_itself,
    exceptions_are_not_swallowed,
]


def breaches(rule: Rule, sources: list[Source]) -> list[str]:
    return [breach for source in sources for breach in rule(source)]


@pytest.mark.parametrize("rule", RULES)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    assert breaches(rule, SOURCES) == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (mathematics_imports_no_machinery, "dictionaries/sae.py", "def f():\n    import wandb"),
        (mathematics_imports_no_machinery, "latents/kernels/spmm.py", "from transformers import AutoModel"),
        (mathematics_imports_no_machinery, "losses/x.py", "from torch import distributed as dist"),
        (mathematics_imports_no_machinery, "metrics/x.py", "import torch\ntorch.distributed.barrier()"),
        (mathematics_imports_no_machinery, "initializer.py", "import importlib\nimportlib.import_module('datasets')"),
        (only_parallel_imports_torch_distributed, "trainer.py", "import torch.distributed.tensor"),
        (only_parallel_imports_torch_distributed, "training/loggers/x.py", "from torch.distributed import barrier"),
        (files_are_short, "trainer.py", "x = 1\n" * 251),
        (files_are_short, "dictionaries/sae.py", "x = 1\n" * 301),
        (files_are_short, "data/x.py", "x = 1\n" * 401),
        (nothing_is_unpickled, "a.py", "import pickle"),
        (nothing_is_unpickled, "a.py", "from joblib import load"),
        (nothing_is_unpickled, "a.py", "torch.load(path)"),
        (nothing_is_unpickled, "a.py", "torch.load(path, weights_only=False)"),
        (nothing_is_unpickled, "a.py", "yaml.load(text)"),
        (nothing_is_unpickled, "a.py", "yaml.unsafe_load(text)"),
        (nothing_is_unpickled, "a.py", "numpy.load(path, allow_pickle=True)"),
        (nothing_is_unpickled, "a.py", "AutoModel.from_pretrained(name, trust_remote_code=flag)"),
        (nothing_is_unpickled, "a.py", "AutoModel.from_pretrained(name, **{'trust_remote_code': True})"),
        (nothing_is_unpickled, "a.py", "from torch import load"),
        (nothing_is_unpickled, "a.py", "from torch.serialization import load"),
        (nothing_is_unpickled, "a.py", "torch.serialization.load(path)"),
        (nothing_is_unpickled, "a.py", "torch.jit.load(path)"),
        (nothing_is_unpickled, "a.py", "serialization.add_safe_globals([Path])"),
        (nothing_is_unpickled, "a.py", "from yaml import load"),
        (nothing_is_unpickled, "a.py", "from yaml import UnsafeLoader"),
        (nothing_is_unpickled, "a.py", "import marshal"),
        (nothing_is_unpickled, "a.py", "import shelve"),
        (nothing_is_unpickled, "a.py", "importlib.import_module('dill')"),
        (nothing_is_unpickled, "a.py", "pandas.read_pickle(path)"),
        (nothing_is_unpickled, "a.py", "from torch.distributed.checkpoint import FileSystemReader"),
        (nothing_is_unpickled, "a.py", "dcp.load(state, storage_reader=dcp.FileSystemReader(path))"),
        (nothing_is_unpickled, "a.py", "eval(text)"),
        (nothing_is_unpickled, "a.py", "builtins.exec(text)"),
        (nothing_is_unpickled, "a.py", "__import__(name)"),
        (nothing_is_unpickled, "a.py", "os.system(text)"),
        (nothing_is_unpickled, "a.py", "subprocess.run(text, shell=True)"),
        (asserts_are_for_our_own_invariants, "a.py", "assert isinstance(x, int), 'no'"),
        (asserts_are_for_our_own_invariants, "a.py", "assert x and not isinstance(x, int)"),
        (accumulation_repeats_itself, "a.py", "x.index_put_((i,), v, accumulate=True)"),
        (accumulation_repeats_itself, "a.py", "x.index_put((i,), v, True)"),
        (exceptions_are_not_swallowed, "a.py", "try:\n    f()\nexcept:\n    g()"),
        (exceptions_are_not_swallowed, "a.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (
            exceptions_are_not_swallowed,
            "a.py",
            "for x in y:\n    try:\n        f()\n    except Exception:\n        continue",
        ),
    ],
)
def test_the_rule_sees_a_breach(rule: Rule, path: str, text: str) -> None:
    assert len(breaches(rule, [Source(path, text)])) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (mathematics_imports_no_machinery, "data/x.py", "import transformers"),
        (mathematics_imports_no_machinery, "metrics/x.py", "import torch\nfrom lm_saes.data.datasets import x"),
        (only_parallel_imports_torch_distributed, "parallel/plan.py", "import torch.distributed"),
        (only_parallel_imports_torch_distributed, "parallel/x.py", "from torch.distributed import checkpoint"),
        (files_are_short, "trainer.py", "x = 1\n" * 250),
        (nothing_is_unpickled, "a.py", "torch.load(path, weights_only=True)\nyaml.safe_load(text)"),
        (nothing_is_unpickled, "a.py", "AutoModel.from_pretrained(name, trust_remote_code=False)"),
        (nothing_is_unpickled, "a.py", "subprocess.run(words)\nre.compile(text)\nmodel.eval()\njson.load(file)"),
        (asserts_are_for_our_own_invariants, "a.py", "assert len(rows) == n"),
        (accumulation_repeats_itself, "a.py", "x.index_put_((i,), v)"),
        (exceptions_are_not_swallowed, "a.py", "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
    ],
)
def test_the_rule_lets_good_code_be(rule: Rule, path: str, text: str) -> None:
    assert breaches(rule, [Source(path, text)]) == []


# --- public names ----------------------------------------------------------------------------------------------------


def exported(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """name -> module, as type checkers see it (imports) and as it is looked up when running (the table)."""
    tree = ast.parse(text)
    seen = {
        name.asname or name.name: node.module or ""
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    (table,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULE_OF"
    ]
    return seen, table


def test_editors_see_the_names_that_are_there() -> None:
    seen, table = exported((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert seen == table


def test_a_name_that_only_one_of_them_has_is_noticed() -> None:
    seen, table = exported("if TYPE_CHECKING:\n    from a.b import C as C\n_MODULE_OF = {'C': 'a.b', 'D': 'a.b'}\n")
    assert (seen, table) == ({"C": "a.b"}, {"C": "a.b", "D": "a.b"})


# --- start-up --------------------------------------------------------------------------------------------------------

HEAVY = {
    "torch",
    "triton",
    "numpy",
    "pydantic",
    "transformers",
    "transformer_lens",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "wandb",
    "tensorboard",
    "plotly",
    "yaml",
}


def loaded_by(*arguments: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded when it is done with `arguments`."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize("arguments", [("-c", "import lm_saes"), ("-m", "lm_saes", "--help")])
def test_starting_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert "lm_saes" in loaded
    assert loaded & HEAVY == set()


def test_using_a_name_loads_torch_but_neither_loggers_nor_language_models_nor_kernels() -> None:
    loaded = loaded_by(
        "-c", "import lm_saes; lm_saes.SparseAutoEncoder; lm_saes.WandbConfig; lm_saes.LanguageModelConfig"
    )
    assert {"torch", "pydantic"} <= loaded
    unused = {"transformers", "transformer_lens", "datasets", "wandb", "tensorboard", "plotly", "triton"}
    assert loaded & unused == set()
