"""Does docs/upstream.md list every private name of a library that is used, and does each still exist?"""

import ast
import contextlib
import importlib
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest

import qdist

ROOT = Path(str(qdist.__file__)).parent
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}
"""Of named tuples and `os`, whose documentation has them."""
PYTHONS = {
    "__version__", "__stdout__", "__stderr__", "__cause__", "__context__", "__file__", "__path__", "__traceback__",
    "__annotations__", "__wrapped__",
    *(name for kind in (object, type, types.FunctionType, types.ModuleType, list, Path) for name in dir(kind)),
}  # fmt: skip


def listed() -> list[str]:
    text = (ROOT.parent / "docs/upstream.md").read_text()
    table = text.partition("## Private names")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)


def is_private(name: str) -> bool:
    return name.startswith("_") and name not in PUBLIC | PYTHONS


def own_names(tree: ast.Module) -> Counter[str]:
    """How often a module defines each name: what it reads by them is its own."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] += 1
            case ast.Name(id=name, ctx=ast.Store()):
                found[name] += 1
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found[name] += 1
    return found


def used(tree: ast.Module) -> Iterator[str]:
    """Private names of others that a module imports, reads or sets."""
    own = own_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith("qdist"):
                yield from (last_private(f"{module}.{alias.name}") for alias in names)
            case ast.Import(names=names):
                yield from (last_private(alias.name) for alias in names)
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if is_private(name):
                if own[name] < 2:  # one definition is the one that calls what it overrides
                    yield name
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                yield name
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(str(name)), *_]):
                yield last_private(name)


def last_private(path: str) -> str:
    return next((part for part in reversed(path.split(".")) if is_private(part) and part != "__future__"), "")


def test_every_private_name_of_a_library_is_listed_and_no_other() -> None:
    found = {name for path in ROOT.rglob("*.py") for name in used(ast.parse(path.read_text()))} - {""}
    assert found == {name.rpartition(".")[2] for name in listed()}


@pytest.mark.parametrize("path", listed())
def test_a_listed_name_is_there_in_the_installed_version(path: str) -> None:
    parts = path.split(".")
    if parts[0] == "liger_kernel":
        pytest.importorskip("liger_kernel")
    for count in range(1, len(parts)):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(".".join(parts[: count + 1]))
    reduce(getattr, parts[1:], sys.modules[parts[0]])


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from torch._x import y", {"_x"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("from qdist._x import y\nfrom a import b", {""}),
        ("model._tied = {}", {"_tied"}),
        ("class A(B):\n def _f(self): return super()._f(), self._f(), self._g()", {"_f", "_g"}),
        ("class A:\n def f(self, other): self._x = other._x; return other._replace(x=1).__class__", set()),
        ("deepspeed.ops.__ops__['x'] = 1; getattr(a, '_hidden'); getattr(a, 'open')", {"__ops__", "_hidden", ""}),
    ],
)
def test_private_names_are_found_in_code(code: str, names: set[str]) -> None:
    assert set(used(ast.parse(code))) - {""} == names - {""}
