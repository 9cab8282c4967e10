"""`qdist runs`: list the runs of a folder, how each stands and what it took."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path, PurePath

import click
import msgspec

from qdist.cli.views.text import cell, say_styled
from qdist.core.text import counted, format_count
from qdist.host.run.listing import Listed, find, listed
from qdist.host.terminal import say, say_json

_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red", "unreadable": "yellow"}
_LEFT = ("name", "state", "model", "data", "started")
"""Text columns, aligned left; number columns are aligned right."""
_FIRST_TO_GO = ("started", "data", "hours", "model", "tok/s", "held-out", "loss", "step")
"""Columns dropped from a narrow window, in this order; name and state always stay."""
_GAP = "  "


@click.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="All that is known, as a JSON list.")
def runs(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the runs in FOLDERs (by default `runs`) and two levels below, the newest first."""
    where = folders or (Path("runs"),)
    rows = [] if not folders and not where[0].is_dir() else listed(find(where))
    if as_json:
        say_json(msgspec.json.format(msgspec.json.encode(rows), indent=2))
    elif not rows:
        say(f"no runs in {', '.join(map(str, where))}")
        say("  try: qdist launch --model smollm2-135m --data demo, or qdist runs FOLDER")
    else:
        base = where[0] if len(where) == 1 else Path()
        say_styled("\n".join(table(rows, base=base, width=shutil.get_terminal_size().columns)))


def table(rows: Sequence[Listed], *, base: Path, width: int) -> list[str]:
    """Lines: a row a run in as many columns as fit into the width, then why runs failed or cannot be read.

    base: the folder that names are relative to. A name is never cut: one that is wider than the window runs over.
    """
    cells = [_cells(row, base) for row in rows]
    columns = {head: [head, *(row[head] for row in cells)] for head in cells[0]}
    widths = {head: max(map(len, column)) for head, column in columns.items()}
    left_out = []
    for head in _FIRST_TO_GO:
        if sum(widths.values()) + len(_GAP) * (len(widths) - 1) <= width:
            break
        left_out.append(head)
        del widths[head]
    lines = [_line({head: head for head in widths}, widths, {})]
    lines += [_line(row, widths, {"state": _COLOURS.get(row["state"], "")}) for row in cells]
    whys = [f"{row['name']}: {cell(one.why)}" for row, one in zip(cells, rows, strict=True) if one.why]
    if whys:
        lines += ["", *whys]
    if left_out:
        hidden = f"{counted(len(left_out), 'column')} left out of {width}: {', '.join(reversed(left_out))}; see --json"
        lines += ["", click.style(hidden, dim=True)]
    return lines


def _line(cells: dict[str, str], widths: dict[str, int], colours: dict[str, str]) -> str:
    padded = [
        (cells[head].ljust(width) if head in _LEFT else cells[head].rjust(width), colours.get(head))
        for head, width in widths.items()
    ]
    last, colour = padded[-1]
    padded[-1] = last.rstrip(), colour
    return _GAP.join(click.style(text, fg=colour) if colour else text for text, colour in padded)


def _cells(row: Listed, base: Path) -> dict[str, str]:
    path = Path(row.path)
    name = path.relative_to(base) if path != base and path.is_relative_to(base) else path
    read = row.state != "unreadable"
    return {
        "name": cell(str(name)),
        "state": row.state,
        "step": f"{row.step}/{row.steps}" if read else "-",
        "loss": _number(row.loss, ".3f"),
        "held-out": _number(row.held_out_loss, ".3f"),
        "tok/s": "-" if row.tokens_per_s is None else format_count(row.tokens_per_s),
        "hours": _hours(row),
        "model": cell(PurePath(row.model).name) if read else "-",
        "data": (cell(PurePath(row.data).name) or "random") if read else "-",
        "started": "-" if row.started is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row.started)),
    }


def _hours(row: Listed) -> str:
    """'12.30 GPU', '<0.01 CPU': hours times devices."""
    hours, device = (row.cpu_rank_hours, "CPU") if row.gpu_hours is None else (row.gpu_hours, "GPU")
    if hours is None:
        return "-"
    return f"<0.01 {device}" if 0 < hours < 0.01 else f"{hours:,.2f} {device}"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
