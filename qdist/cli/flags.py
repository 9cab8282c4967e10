"""The flags of commands: for settings, for the fields of a request, and what is said of those that there are not."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import click
import msgspec

from qdist.core.errors import SpecError, flag_of, in_words
from qdist.core.spec.keys import accepted, choices, description, is_texts, kinds_of, known_keys
from qdist.core.spec.lookup import COMMON, VERBATIM
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.suggest import RELATED_NAMES, known_as, meant_by
from qdist.core.text import command, quoted

F = TypeVar("F", bound=Callable[..., Any])
_LIKE_THEIR_SETTINGS = (
    "model", "bits", "method", "gpus", "placement", "gpus_per_group", "max_memory", "load_format", "adapter",
    "run", "trust_remote_code",
)  # fmt: skip
FLAGS = {**{name: name for name in _LIKE_THEIR_SETTINGS}, **COMMON, **VERBATIM}
"""Every parameter of a command that is a setting."""


def setting_flags(*names: str) -> Callable[[F], F]:
    """Give a command flags for settings, with the texts and defaults of the spec. names: of FLAGS."""

    def decorated(command: F) -> F:
        for name in reversed(names):
            key = FLAGS[name]
            among = choices(RunSpec, key)
            if msgspec.inspect.BoolType() in kinds_of(RunSpec, key):
                command = click.option(flag_of(name), name, is_flag=True, default=None, help=description(RunSpec, key))(
                    command
                )
                continue
            numbers = accepted(RunSpec, key).startswith(("integer", "number"))
            command = click.option(
                flag_of(name),
                name,
                metavar="|".join(among) if among else "N" if numbers else "TEXT",
                help=description(RunSpec, key),
                shell_complete=_completed(among),
            )(command)
        return command

    return decorated


def flags_of(kind: type[msgspec.Struct], usual: msgspec.Struct | None = None) -> Callable[[F], F]:
    """Give a command a flag for each field of a request that has a description. `request_of` checks their values.

    usual: holds the defaults, if they are not the kind's own.
    """

    def decorated(command: F) -> F:
        for field in reversed(_in_order(kind)):
            if text := description(kind, field.encode_name):
                command = _flag(kind, field, text, getattr(usual, field.name, field.default))(command)
        return command

    return decorated


def _in_order(kind: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    """Its fields as a help page lists them: required ones, its own, then what it shares with other requests."""

    def place(field: msgspec.structs.FieldInfo) -> tuple[bool, int]:
        return not field.required, sum(hasattr(each, field.name) for each in kind.__mro__)

    return sorted(msgspec.structs.fields(kind), key=place)


def _flag(kind: type[msgspec.Struct], field: msgspec.structs.FieldInfo, text: str, usual: Any) -> Callable[[F], F]:
    name = field.encode_name
    flag, kinds = flag_of(name), kinds_of(kind, name)
    is_number = isinstance(usual, (int, float)) and not isinstance(usual, bool)
    if (usual or is_number) and not field.required and "[default: " not in text:
        text += f"  [default: {name if usual is True else f'{usual:g}' if is_number else usual}]"
    if msgspec.inspect.BoolType() in kinds:
        both = flag if usual is False else f"{flag}/--no-{flag[2:]}"
        return click.option(both, name, is_flag=True, default=None, help=text)
    if is_texts(kind, name):
        return click.option(
            flag, name, multiple=True, callback=lambda *parts: parts[-1] or None, help=f"{text} May be repeated."
        )
    number = any(isinstance(each, (msgspec.inspect.IntType, msgspec.inspect.FloatType)) for each in kinds)
    metavar = f"[{'|'.join(among)}]" if (among := choices(kind, name)) else "N" if number else None
    return click.option(
        flag, name, required=field.required, metavar=metavar, help=text, shell_complete=_completed(among)
    )


def _completed(among: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], list[str]] | None:
    """Shell completions of a flag's value: words with this prefix, or files if the flag takes any value."""
    return (lambda _, __, begun: [word for word in among if word.startswith(begun)]) if among else None


class SettingsCommand(click.Command):
    """A command with --set. Raises SpecError for `--dropout 0.1`, with `--set lora.dropout=0.1` to try."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it."""
        typed = tuple(args)  # click takes them out of its list
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            settings = [key for key, section in known_keys(RunSpec).items() if section is None]
            word = error.option_name.lstrip("-").replace("-", "_")
            key = known_as(word, settings)
            if key is None and (related := RELATED_NAMES.get(word)):
                meant = meant_by(related, _value_of(error.option_name, typed))
                told = f"{error.option_name} is not a flag: {related} {'is a setting' if meant else 'has other values'}"
                raise SpecError(told, try_=in_words(meant) if meant else command("settings", word)) from None
            if key is None:
                raise
            is_switch = msgspec.inspect.BoolType() in kinds_of(RunSpec, key)
            value = _value_of(error.option_name, typed, without="true" if is_switch else "VALUE")
            flag = next((flag_of(name) for name, flagged in FLAGS.items() if flagged == key), None)
            if flag == error.option_name:
                raise SpecError(
                    f"{flag} is a flag of launch, and {ctx.info_name} does without it",
                    try_="leave it out, or qdist launch with --dry-run",
                ) from None
            told = f"its flag is {flag}" if flag else f"{key} is a setting"
            try_ = quoted(flag, value) if flag else quoted("--set", f"{key}={value}")
            raise SpecError(f"{error.option_name} is not a flag: {told}", try_=try_) from None


def _value_of(option: str, typed: Sequence[str], *, without: str = "VALUE") -> str:
    """The value typed after an option. without: what it is where none was."""
    for word, after in pairwise((*typed, "--")):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and not after.startswith("--"):
            return after
    return without
