"""Does the code keep the rules of its own architecture?"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qdist
from qdist.cli.main import COMMANDS
from qdist.core.model.families import FAMILIES

ROOT = Path(str(qdist.__file__)).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.read_text().strip())
LIGHT = ("cli", "core", "host")
MOST_LINES = 450


def named(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def in_folders(*folders: str) -> list[Path]:
    return [path for path in MODULES if path.relative_to(ROOT).parts[0] in folders]


every_module = pytest.mark.parametrize("path", MODULES, ids=named)


def test_nothing_outside_the_runtime_imports_torch() -> None:
    names = [named(path) for path in in_folders(*LIGHT)]
    assert len(names) > 20
    code = (
        f"import sys\nfrom importlib import import_module\nfor name in {names!r}: import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'deepspeed', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@every_module
def test_a_module_says_first_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", "?", ":"))


@every_module
def test_a_module_answers_one_question(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@every_module
def test_no_error_is_swallowed(path: Path) -> None:
    """Catching everything is for cleaning up on the way out: such a handler ends in a bare `raise`."""
    handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    assert [node.lineno for node in handlers if catches_everything(node) and not raises_again(node)] == []


@every_module
def test_no_code_of_a_models_folder_is_run_nor_asked_about(path: Path) -> None:
    """transformers asks on the terminal, and runs it on a y, unless it is told not to.

    One module runs it, of models whose user has asked for that, and registers it as if it were transformers' own.
    """
    running = "get_class_from_dynamic_module" in path.read_text()
    assert running == (named(path) == "qdist.runtime.model.own_code")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    opening = [
        call for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("from_pretrained", "from_config")
        and isinstance(call.func.value, ast.Name) and call.func.value.id.startswith("Auto")
    ]  # fmt: skip
    assert [call.lineno for call in opening if not refuses_code(call)] == []


@pytest.mark.parametrize("path", in_folders("cli", "host", "runtime"), ids=named)
def test_a_printed_command_is_put_together_by_the_function_that_quotes(path: Path) -> None:
    """A run may lie in a folder with a space in its name."""
    texts = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)]
    assert [text.lineno for text in texts if names_a_command(text)] == []


def names_a_command(text: ast.JoinedStr) -> bool:
    """Whether a value stands on the same line behind the name of a command."""
    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in text.values]
    return bool(re.search(rf"qdist ({'|'.join(COMMANDS)})\b[^`\n]*{{}}", "".join(map(str, parts))))


def refuses_code(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    told = given.get("trust_remote_code")
    return isinstance(told, ast.Constant) and told.value is False


def catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds
    )


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("path", in_folders("core", "host"), ids=named)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@pytest.mark.parametrize("path", in_folders("core"), ids=named)
def test_the_core_is_pure(path: Path) -> None:
    """No files, clock, environment, processes or unseeded randomness: what follows from arguments alone."""
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    banned = {"os", "pathlib", "io", "time", "datetime", "subprocess", "sys", "shutil", "tempfile", "socket", "uuid"}
    assert banned & {name.partition(".")[0] for name in imported} == set()
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert {"open", "input", "print"} & set(calls) == set()


def test_one_place_prints_errors_and_one_parses_arguments() -> None:
    """A command's flags are its request's fields; a process that it starts answers instead of printing."""
    texts = {named(path): path.read_text() for path in MODULES}
    printing = {name for name, text in texts.items() if "error_text(" in text}
    assert printing == {"qdist.host.terminal", "qdist.cli.main"}
    assert [name for name, text in texts.items() if "ArgumentParser" in text] == []


OTHERS_WORDS = (
    "qdist.runtime.quantize.sparsebit.convert",
    "qdist.runtime.exports.gguf.tokenizer",
    "qdist.core.data.templates",
    "qdist.core.spec.recipes.axolotl",
    "qdist.core.spec.recipes.llama_factory",
)
"""Sparsebit packs Llama alone; kinds of tokenizers in llama.cpp, and chat templates, have names of families."""


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "families"], ids=named)
def test_a_family_is_named_in_its_own_file_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert texts & FAMILIES.keys() == set() or named(path) in OTHERS_WORDS
