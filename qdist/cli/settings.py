"""Commands that take settings by --set, and say so where one is typed as a flag of its own."""

from collections.abc import Sequence
from itertools import pairwise

import click

from qdist.core.errors import SpecError
from qdist.core.keys import known_keys
from qdist.core.mistakes import known_as
from qdist.core.quoting import quoted
from qdist.core.spec import RunSpec


class SettingsCommand(click.Command):
    """A command with --set. Raises SpecError for `--steps 5`, with `--set steps=5` to try."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it."""
        typed = tuple(args)  # click takes them out of its list
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            settings = [key for key, section in known_keys(RunSpec).items() if section is None]
            key = known_as(error.option_name.lstrip("-").replace("-", "_"), settings)
            if key is None:
                raise
            value = _value_of(error.option_name, typed)
            raise SpecError(
                f"{error.option_name} is no flag: {key} is a setting", try_=quoted("--set", f"{key}={value}")
            ) from None


def _value_of(option: str, typed: Sequence[str]) -> str:
    """What was typed behind an option, or 'VALUE'."""
    for word, after in pairwise((*typed, "--")):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and not after.startswith("--"):
            return after
    return "VALUE"
