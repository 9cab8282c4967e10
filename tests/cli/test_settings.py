"""Are all settings listed, in the terminal and in docs/settings.md?"""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli.flags import FLAGS, flag_of
from qdist.cli.main import main
from qdist.cli.settings import listing
from qdist.core.spec.lookup import Setting, all_settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="qdist")


def test_the_settings_page_is_what_the_spec_says() -> None:
    """Write it anew: python -m qdist settings --markdown > docs/settings.md."""
    assert qdist("settings", "--markdown").stdout == PAGE.read_text(encoding="utf-8")


def test_a_list_has_every_setting() -> None:
    lines = qdist("settings").stdout.splitlines()
    starts = [line.split(" ")[0] for line in lines if not line.startswith(" ")]
    assert starts == [each.key for each in all_settings()]


def test_a_setting_is_listed_with_default_text_values_and_flag() -> None:
    assert qdist("settings", "learning_rate").stdout.splitlines()[0] == (
        "optim.lr  0.0002  Learning rate, at its peak. [number > 0] --lr"
    )


def test_a_narrow_window_breaks_texts_under_themselves() -> None:
    setting = Setting("a.b", "integer >= 1", "auto", "Something that is told in many words.")
    assert list(listing([setting], 45)) == [
        "a.b  auto  Something that is told in many",
        "           words. [integer >= 1]",
    ]


def test_a_word_that_finds_nothing_is_a_wrong_request() -> None:
    result = qdist("settings", "zzz")
    assert (result.exit_code, result.stderr) == (
        2, "error: no setting matches 'zzz'\n  try: qdist settings\n",
    )  # fmt: skip


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_the_help_of_a_flag_is_the_text_of_its_setting(command: str) -> None:
    shown = "".join(qdist(command, "--help").stdout.split())
    texts = {each.key: "".join(each.text.split()) for each in all_settings()}
    told = [name for name, key in FLAGS.items() if flag_of(name) in shown and texts[key] in shown]
    of_runs = ("data", "eval_data", "load_format", "adapter", "run")
    assert told == [name for name in FLAGS if command == "launch" or name not in of_runs]
