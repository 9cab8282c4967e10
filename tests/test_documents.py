"""Do README, guides and recipes say what the program does?"""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from bench.readme_commands import Written, cases_of, pages, read_commands
from qdist.cli.main import COMMANDS, main
from qdist.core.spec.lookup import all_settings
from qdist.core.spec.run_spec import whole_key
from qdist.host.machine import probe
from tests.plans import CPU

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "launch").glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SHOWN = [each for page in pages() for each in read_commands(page.read_text(encoding="utf-8"))]
RECIPES = re.findall(
    r"^\| `(\S+)` \| .* \| (\S+ GiB) \| (?:(\S+) tokens/s)? ?\| `qdist (.+)` \|$",
    (ROOT / "launch" / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="qdist")


def typed(written: Written) -> Iterator[list[str]]:
    """The words of every command that is meant, without `qdist`. What is shown to be refused is another test's."""
    if written.text.startswith("qdist ") and not written.shown:
        for case in cases_of(written):
            yield shlex.split(case.text)[1:]


def test_the_readme_is_read_in_minutes_and_names_every_command() -> None:
    assert len(README.split()) <= 1400
    assert [name for name in COMMANDS if f"`qdist {name}" not in README] == []
    assert "`make test`" in README


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_marks_of_an_unfinished_merge(page: Path) -> None:
    assert re.findall(r"^(?:<{7}|>{7}) .*|^={7}$", page.read_text(encoding="utf-8"), re.MULTILINE) == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    assert [link for link, anchor in links if not leads_somewhere(page, link, anchor)] == []


def test_the_tree_of_the_architecture_is_the_tree() -> None:
    """Every room is drawn, and none that is not there."""
    drawn, path = set(), [Path("qdist")]
    for indent, name in re.findall(
        r"^( *)(\w+)/ ", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        path = [*path[: len(indent) // 2], Path(name)]
        drawn.add(Path(*path).as_posix())
    rooms = {init.parent.relative_to(ROOT).as_posix() for init in (ROOT / "qdist").rglob("__init__.py")}
    nested = {
        "qdist/runtime/placements/split",
        "qdist/runtime/quantize/gptq",
        "qdist/runtime/quantize/sparsebit",
        "qdist/runtime/exports/gguf",
    }
    assert rooms - drawn - nested == set()
    assert {each for each in drawn if each.startswith("qdist") and not (ROOT / each).is_dir()} == set()


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_module_or_test_that_a_document_names_is_there(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "decisions.md"):  # of what was, too
        return
    named = re.findall(r"`((?:qdist|tests|bench)/[\w/.]+\.(?:py|json|js|css))", page.read_text(encoding="utf-8"))
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def leads_somewhere(page: Path, link: str, anchor: str) -> bool:
    """Whether a file is there, and has a heading of that name."""
    target = page.parent / link if link else page
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("words", [words for each in SHOWN for words in typed(each)], ids=shlex.join)
def test_a_command_has_the_flags_and_settings_that_documents_show(words: list[str]) -> None:
    name, *arguments = words
    module, _, attribute = COMMANDS[name][0].partition(":")
    named: click.Command = getattr(import_module(module), attribute)
    command = named.make_context(name, [*arguments], resilient_parsing=True).command  # of `convert recipe`: recipe
    if isinstance(command, click.Group):  # of `data show`: show
        command = command.commands[arguments[0]]
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    assert [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in flags] == []
    given = {after.partition("=")[0] for flag, after in pairwise(arguments) if flag == "--set"}
    assert set(map(whole_key, given)) - {each.key for each in all_settings()} == set()


@pytest.mark.parametrize("written", [each for each in SHOWN if each.shown], ids=lambda each: each.text)
def test_what_documents_show_is_what_is_printed(
    written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qdist.host.launch.planning.find_spec", lambda name: None)  # as on a machine without Liger
    result = qdist(*shlex.split(written.text)[1:])
    assert result.output.splitlines() == [line.rstrip() for line in written.shown]


def test_every_recipe_is_listed() -> None:
    assert sorted(name for name, *_ in RECIPES) == sorted(path.stem for path in (ROOT / "launch").glob("*.toml"))


@pytest.mark.parametrize(("name", "peak", "speed", "command"), RECIPES, ids=[name for name, *_ in RECIPES])
def test_a_recipe_is_planned_to_take_what_its_row_says(
    name: str, peak: str, speed: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "cluster", lambda: CPU)  # of the demo; the others describe their machine
    result = qdist(*shlex.split(command))
    assert (result.exit_code, f"plan {name} " in f"{command} ") == (0, True), result.output
    assert re.findall(r"^memory +(\S+ GiB) a ", result.stdout, re.MULTILINE) == [peak]
    assert re.findall(r"^speed +(\S+) tokens/s", result.stdout, re.MULTILINE) == ([speed] if speed else [])
