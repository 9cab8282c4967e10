"""The `qdist` command: a table of subcommands, each imported only when it is run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from qdist.core.errors import QdistError, SpecError, nearest
from qdist.core.text import command
from qdist.host.terminal import error_text, guard_output, say

COMMANDS = {
    "launch": ("qdist.cli.launch:launch", "Fine-tune a quantized model on the GPUs that are here."),
    "plan": ("qdist.cli.plan:plan", "Show what launch would do, for this machine or another."),
    "submit": ("qdist.cli.submit:submit", "Give a run of several nodes to SLURM, Kubernetes or SkyPilot."),
    "data": ("qdist.cli.data:data", "Show how records become tokens, or check them."),
    "settings": ("qdist.cli.settings:settings", "List every setting, its values and default."),
    "models": ("qdist.cli.models:models", "List the models known by a short name."),
    "quantize": ("qdist.cli.quantize:quantize", "Pack a model once, for launch and for transformers."),
    "convert": ("qdist.cli.convert:convert", "Turn another project's checkpoint or recipe into ours."),
    "gather": ("qdist.cli.gather:gather", "Write a run's adapter from its last checkpoint."),
    "merge": ("qdist.cli.merge:merge", "Merge an adapter into its quantized model."),
    "export": ("qdist.cli.export:export", "Write a run's model for other programs."),
    "evaluate": ("qdist.cli.evaluate:evaluate", "Measure a run or model: perplexity, MMLU, held-out loss."),
    "push": ("qdist.cli.push:push", "Upload a run's adapter or merged model to the hub."),
    "generate": ("qdist.cli.generate:generate", "Complete prompts with a run's model."),
    "chat": ("qdist.cli.chat:chat", "Talk to a run's model."),
    "serve": ("qdist.cli.serve:serve", "Answer programs in OpenAI's protocol."),
    "web": ("qdist.cli.web:web", "Talk to a run's model on a page in the browser."),
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
        """Click's behaviour, on an output that fails without a traceback."""
        guard_output()
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click does it; a wrong flag of the group, or of `--help` the output, is told as any error."""
        with errors_told():
            return super().make_context(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses names that no plan, written in UTF-8, could hold."""
        if odd := next((word for word in args if not word.isascii() and _is_no_text(word)), None):
            raise SpecError(f"{odd!r} is not UTF-8", try_="rename the file, or set the locale that it was named in")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggests the nearest command; click looks only among the commands already imported."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:  # else a shell completes
            near = nearest(name, COMMANDS)
            raise SpecError(f"{name} is not a command", try_=command(near) if near else ", ".join(COMMANDS))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand. A bug keeps its traceback."""
        if os.environ.get("NO_COLOR"):  # rich knows it, click does not (https://no-color.org)
            ctx.color = False
        from qdist.host.files import told_of_disks  # costs a part of the time that --help may take

        try:
            with errors_told(ctx), told_of_disks():
                done = super().invoke(ctx)
                sys.stdout.flush()
                return done
        except KeyboardInterrupt as stop:
            say("; ".join(filter(None, ("stopped", *stop.args))), err=True)
            ctx.exit(130)


@contextmanager
def errors_told(ctx: click.Context | None = None) -> Iterator[None]:
    """End a command with what the user can put right in two lines: the one place in the project that prints errors."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except (QdistError, click.UsageError) as raised:
        error = raised if isinstance(raised, QdistError) else _in_our_form(raised, ctx)
        say(error_text(error), err=True)
        raise click.exceptions.Exit(error.exit_code) from None


def _in_our_form(error: click.UsageError, ctx: click.Context | None) -> SpecError:
    """A wrong flag or argument; the nearest flag is what to try, else the command's help."""
    near = error.possibilities if isinstance(error, click.NoSuchOption) else None
    message = f"{error.option_name} is not a flag" if isinstance(error, click.NoSuchOption) else _said(error)
    subcommand = (ctx.invoked_subcommand,) if ctx and ctx.invoked_subcommand else ()
    return SpecError(message, try_=near[0] if near else command(*subcommand, "--help"))


def _said(error: click.UsageError) -> str:
    """'Missing option '--out'.' -> 'missing option '--out''."""
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


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
