"""Settings as they are typed: the common ones as flags, any by --set, and what is said of others typed as a flag."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import click

from qdist.core.errors import SpecError
from qdist.core.spec.keys import accepted, choices, description, known_keys
from qdist.core.spec.spec import RunSpec, parse_assignment
from qdist.core.spec.suggest import known_as
from qdist.core.text import quoted

F = TypeVar("F", bound=Callable[..., Any])
COMMON = {
    "steps": "steps", "epochs": "epochs", "lr": "optim.lr", "batch_size": "global_batch", "seq_len": "seq_len",
    "lora_r": "lora.r", "seed": "seed",
}  # fmt: skip
"""Parameters of commands for the settings that everybody types, and what the settings are called."""
_LIKE_THEIR_SETTINGS = (
    "model", "bits", "method", "data", "gpus", "placement", "gpus_per_group", "max_memory", "load_format", "run",
)  # fmt: skip
FLAGS = {**{name: name for name in _LIKE_THEIR_SETTINGS}, **COMMON}
"""Every parameter of a command that is a setting."""


def flag_of(name: str) -> str:
    """The flag of a command's parameter: '--seq-len'."""
    return f"--{name.replace('_', '-')}"


def setting_flags(*names: str) -> Callable[[F], F]:
    """Give a command flags for settings, with the texts and defaults of the spec. names: of FLAGS."""

    def decorated(command: F) -> F:
        for name in reversed(names):
            key = FLAGS[name]
            among = choices(RunSpec, key)
            numbers = accepted(RunSpec, key).startswith(("integer", "number"))
            command = click.option(
                flag_of(name),
                name,
                type=click.IntRange(min=1) if name == "gpus" else None,
                metavar="|".join(among) if among else "N" if numbers else "TEXT",
                help=description(RunSpec, key),
            )(command)
        return command

    return decorated


def typed_settings(flags: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """What was typed, by dotted keys. flags: by the names of a command's parameters; None for those that were not.

    The last --set of a key wins, also over its flag: what an error says to try is typed behind the same command.
    Raises SpecError for what is no setting.
    """
    own = {name: value for name, value in flags.items() if value is not None and name not in COMMON}
    common = [f"{key}={flags[name]}" for name, key in COMMON.items() if flags.get(name) is not None]
    return own | dict(map(parse_assignment, (*common, *assignments)))


class SettingsCommand(click.Command):
    """A command with --set. Raises SpecError for `--dropout 0.1`, with `--set lora.dropout=0.1` to try."""

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
            flag = next((flag_of(name) for name, flagged in FLAGS.items() if flagged == key), None)
            told = f"its flag is {flag}" if flag else f"{key} is a setting"
            try_ = quoted(flag, value) if flag else quoted("--set", f"{key}={value}")
            raise SpecError(f"{error.option_name} is no flag: {told}", try_=try_) from None


def _value_of(option: str, typed: Sequence[str]) -> str:
    """What was typed behind an option, or 'VALUE'."""
    for word, after in pairwise((*typed, "--")):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and not after.startswith("--"):
            return after
    return "VALUE"
