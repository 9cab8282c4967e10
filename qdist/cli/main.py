"""The `qdist` command: a table of subcommands, each imported only when it is run."""

import os
import sys
from importlib import import_module
from typing import Any

import click

from qdist.core.errors import QdistError, nearest
from qdist.host.terminal import error_text, guard_output, say

COMMANDS = {
    "launch": ("qdist.cli.launch:launch", "Fine-tune a quantized model on the GPUs that are here."),
    "plan": ("qdist.cli.plan:plan", "Show what launch would do, for this machine or another."),
    "settings": ("qdist.cli.settings:settings", "List every setting, its values and default."),
    "models": ("qdist.cli.models:models", "List the models known by a short name."),
    "quantize": ("qdist.cli.quantize:quantize", "Pack a model once, for launch and for transformers."),
    "convert": ("qdist.cli.convert:convert", "Turn another project's packed checkpoint into a GPTQ folder."),
    "gather": ("qdist.cli.gather:gather", "Write a run's adapter from its last checkpoint."),
    "merge": ("qdist.cli.merge:merge", "Merge an adapter into its quantized model."),
    "export": ("qdist.cli.export:export", "Write a run's model for other programs."),
    "generate": ("qdist.cli.generate:generate", "Complete prompts with a run's model."),
    "chat": ("qdist.cli.chat:chat", "Talk to a run's model."),
    "monitor": ("qdist.cli.monitor:monitor", "Watch a run: memory, speed, loss, warnings."),
    "stop": ("qdist.cli.stop:stop", "End a run from any terminal, with a checkpoint."),
    "runs": ("qdist.cli.runs:runs", "List runs: state, loss, speed, GPU hours."),
    "metrics": ("qdist.cli.metrics:metrics", "Print a run's figures for Prometheus."),
    "report": ("qdist.cli.report:report", "Write a run's report as one HTML page, or compare two runs."),
    "doctor": ("qdist.cli.doctor:doctor", "Check driver, GPUs, packages, memory and disk."),
}
"""Name -> where the click command is, and its line in `qdist --help`, which must not import it."""


class LazyGroup(click.Group):
    """A group that imports a subcommand to run it, not to list it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click does it, over output that fails without a traceback."""
        guard_output()
        try:
            return super().main(*args, **kwargs)
        finally:
            sys.stdout.flush()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses names that no plan, written in UTF-8, could hold."""
        if odd := next((word for word in args if not word.isascii() and _is_no_text(word)), None):
            ctx.fail(f"{odd!r} is no UTF-8: rename the file, or set the locale that it was named in.")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names the nearest command; click looks only among the commands already imported."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = nearest(name, COMMANDS)
            hint = f"Did you mean {close!r}?" if close else f"There are {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand. What the user can put right is said in two lines; a bug keeps its traceback."""
        if os.environ.get("NO_COLOR"):  # rich knows it, click does not (https://no-color.org)
            ctx.color = False
        from qdist.host.files import told_of_disks  # costs a part of the time that --help may take

        try:
            with told_of_disks():
                return super().invoke(ctx)
        except QdistError as error:
            say(error_text(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say("stopped", err=True)
            ctx.exit(130)


def _is_no_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return True
    return False


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib import metadata  # costs a tenth of the time that --help may take

    try:
        say(f"qdist {metadata.version('qdist')}")
    except metadata.PackageNotFoundError:
        say("qdist, from a checkout that is not installed")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def main() -> None:
    """Fine-tune quantized language models on whatever GPUs are there, with one command."""
