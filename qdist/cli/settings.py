"""`qdist settings`: list every setting, or those that a word means; and write docs/settings.md."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby

import click

from qdist.cli.flags import FLAGS
from qdist.core.errors import flag_of
from qdist.core.spec.lookup import Setting, all_settings, find_settings, sections
from qdist.core.text import fitted
from qdist.host.terminal import say

_INTRODUCTION = """\
# Settings

Written by `qdist settings --markdown` from the texts in `qdist/core/spec/run_spec.py`; a test compares the two.

On the command line: the flag that is named here, or `--set lora.r=16`. In a recipe (TOML): `seq_len = 512` at the top,
`r = 16` under `[lora]`. Flags override the recipe, the recipe overrides the defaults.

`auto` means that the planner decides: `--set micro_batch=auto` takes back what a recipe says. `qdist plan` prints what
was decided; `RUN/plan.json` keeps it.

See also [data formats](guide/data.md), [trackers](guide/trackers.md), [memory and placements](guide/memory.md), and
[environment variables](guide/command-line.md#environment).
"""


@click.command()
@click.argument("word", required=False)
@click.option("--markdown", is_flag=True, help="The page docs/settings.md.")
def settings(word: str | None, markdown: bool) -> None:
    """List every setting with its default and values, or those that WORD means.

    WORD is part of a key or text, or what Hugging Face, Axolotl, LLaMA-Factory or Unsloth call a setting.
    """
    found = find_settings(word) if word else all_settings()
    width = shutil.get_terminal_size().columns
    say("\n".join(markdown_page(found) if markdown else listing(found, width)))


def listing(found: Sequence[Setting], width: int) -> Iterator[str]:
    """An entry a setting: its key and default, then its text, values and flag, broken between words."""
    keys = max(len(each.key) for each in found)
    defaults = max(len(each.default) for each in found)
    for each in found:
        flag = f" {_flag(each)}" if _flag(each) else ""
        line = f"{each.key:{keys}}  {each.default:{defaults}}  {each.text} [{each.accepted}]{flag}"
        yield from fitted(line, width, margin=keys + defaults + 4)


def markdown_page(found: Sequence[Setting]) -> Iterator[str]:
    """The lines of docs/settings.md: a table for each section of a recipe."""
    yield _INTRODUCTION.rstrip()
    told = sections()
    for name, group in groupby(found, key=lambda each: each.section):
        yield f"\n## {f'[{name}]' if name else 'The run'}\n\n{told[name]}\n"
        yield "| setting | default | values | |\n|---|---|---|---|"
        for each in group:
            flag = f" (`{_flag(each)}`)" if _flag(each) else ""
            default = f"`{each.default}`" if each.default else ""
            yield f"| `{each.key}`{flag} | {default} | {each.accepted} | {each.text} |"


def _flag(setting: Setting) -> str:
    return next((flag_of(name) for name, key in FLAGS.items() if key == setting.key), "")
