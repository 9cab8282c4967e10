"""`qdist data`: what is in a data set, and would training take it?"""

from typing import Any

import click
import msgspec
from rich.console import Console

from qdist.cli.flags import SettingsCommand, flags_of, setting_flags
from qdist.cli.views.overview import overview_text
from qdist.core.composed import request_of
from qdist.core.data.overview import Overview
from qdist.core.errors import JobError, SpecError
from qdist.core.requests import ShowData
from qdist.core.spec.lookup import typed_settings
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import command, counted
from qdist.host.data.sources import check_data
from qdist.host.data.stdin import kept
from qdist.host.tasks import ask
from qdist.host.terminal import say, say_json

_WHOLE = 20_000
"""Records that `show` looks at, unless told otherwise: seconds of work."""


class DataGroup(click.Group):
    """`qdist data FILE` is answered with what was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it. Raises SpecError for what is not a command."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise SpecError(f"{args[0]} is not a command of qdist data", try_=command("data", "show", args[0]))
        return super().resolve_command(ctx, args)


@click.group(cls=DataGroup)
def data() -> None:
    """Show how records become tokens, or check that training would take them."""


_SET = click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as data.columns or format."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@data.command(cls=SettingsCommand)
@click.argument("source")
@setting_flags("model", "seq_len", "eval_data")
@_SET
@flags_of(ShowData)
@_JSON
def show(source: str, assignments: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Show the records of SOURCE: format, a few of them as tokens, lengths, duplicates, faults.

    What is learned is green; without colours it stands between ⟦ and ⟧.
    """
    own = {name: given.pop(name) for name in ("samples", "limit")}
    own["limit"] = own["limit"] or _WHOLE
    found = _found(source, assignments, given, own)
    _print(found, as_json=as_json)
    if found.bad > found.allowed_bad:
        say(f"  try: {_why_refused(found)[1]}", err=True)


@data.command(cls=SettingsCommand)
@click.argument("source")
@setting_flags("model", "seq_len", "eval_data")
@_SET
@_JSON
def check(source: str, assignments: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Read all records of SOURCE as training would; exits with 1 if it would refuse them."""
    found = _found(source, assignments, given, {"samples": 0})
    _print(found, as_json=as_json)
    if found.refused:
        wrong, try_ = _why_refused(found)
        raise JobError(f"training would refuse {source}: {wrong}", try_=try_)
    say(f"training would take {source}", err=True)


def _why_refused(found: Overview) -> tuple[str, str]:
    """What is wrong with the data, and what to try."""
    if found.bad > found.allowed_bad:
        leave = f"leave them out: --set data.skip_bad={found.bad}" if found.samples else ""
        wrong = f"{counted(found.bad, 'record')} of {found.records:,} cannot be used"
        return wrong, "; or ".join(filter(None, (found.bad_try, leave)))
    if found.refusal:
        return found.refusal, found.refusal_try
    return (
        f"nothing in {counted(found.records, 'record')} is to be learned",
        "records with an answer that is to be learned",
    )


def _found(source: str, assignments: tuple[str, ...], flags: dict[str, Any], own: dict[str, Any]) -> Overview:
    spec = resolve(nest(typed_settings({**flags, "data": source}, assignments)))
    spec = msgspec.structs.replace(spec, data=kept(spec.data))
    check_data(spec.data)
    overview = ask(request_of(ShowData, {**own, "spec": msgspec.to_builtins(spec)})).overview
    if overview is None:
        raise JobError("nothing was found out", try_="the same command again")
    return overview


def _print(found: Overview, *, as_json: bool) -> None:
    if as_json:
        say_json(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(overview_text(found, marks=console.color_system is None))
