"""A run on one screen: a snapshot to lines of text that fill a terminal of any size."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import PurePath
from typing import Literal

from rich.text import Text

from qdist.cli.views.plot import Lines, bar, plot
from qdist.cli.views.rank_table import rank_table
from qdist.cli.views.text import cell
from qdist.core.planning.fill import has_padding
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.curves import tokens_per_s
from qdist.core.telemetry.snapshot import Snapshot, mfu
from qdist.core.telemetry.warnings import find_warnings
from qdist.core.text import counted, fitted, format_count, format_duration

Pane = Literal["overview", "ranks", "curves", "log"]
PANES: tuple[Pane, ...] = ("overview", "ranks", "curves", "log")
KEYS = "q quit  p pause  tab panes  l log of a rank"
_WIDE, _LEAST_CHART = 120, 5
_STYLES = {"running": "green", "finished": "green", "failed": "bold red", "killed": "bold red", "stopped": "yellow"}


def dashboard(snapshot: Snapshot, width: int, height: int, pane: Pane = "overview", *, foot: str = KEYS) -> Lines:
    """Exactly `height` lines, none wider than `width` cells.

    foot: the last line; empty for none.
    """
    top = _header(snapshot, width)
    below = [*_messages(snapshot, width, most=max(1, height // 5)), *([Text(foot, style="dim")] if foot else [])]
    room = max(0, height - len(top) - len(below))
    bodies: dict[Pane, Callable[[Snapshot, int, int], list[Text]]] = {
        "overview": _overview, "ranks": _ranks, "curves": _curves, "log": _log,
    }  # fmt: skip
    body = bodies[pane](snapshot, width, room)[:room]
    lines = [*top, *body, *(Text("") for _ in range(room - len(body))), *below][:height]
    for line in lines:
        line.truncate(width, overflow="crop")
    return Lines(lines)


def header_of(plan: Plan) -> str:
    """Model without its folder or owner, method and ranks on one line."""
    kind = f"{plan.world_size} {'GPU' if plan.device == 'cuda' else 'CPU'} rank{'s' if plan.world_size > 1 else ''}"
    return f"{PurePath(plan.spec.model).name}  {plan.spec.bits}-bit {plan.spec.method}  {kind}"


def _header(snapshot: Snapshot, width: int) -> list[Text]:
    """Name, progress, losses, speed and related figures."""
    fold, total = snapshot.fold, snapshot.fold.total_steps or snapshot.plan.steps
    state = snapshot.state
    left = _left(snapshot)
    if state == "running":
        state = "stopping" if snapshot.stopping else _doing(snapshot)
        ends = f"  {format_duration(left)} left" if left is not None else ""
    else:
        ends = ""
    nodes = f" on {counted(len(snapshot.nodes.members), 'node')}" if snapshot.node_of_rank and snapshot.nodes else ""
    title = _spread(
        Text(cell(f"{snapshot.name}  {header_of(snapshot.plan)}{nodes}"), style="bold"),
        Text.assemble((state, _STYLES.get(snapshot.state, "")), ends),
        width,
    )
    done = fold.step / total if total else 0.0
    label, share = f"step {fold.step:,}/{total:,} ", f" {done:.0%}"
    progress = Text.assemble(label, bar(done, max(0, width - len(label) - len(share)), "green"), share)
    return [title, progress, *(Text(_fitted(part(snapshot), width)) for part in (_losses, _speed, _around))]


def _doing(snapshot: Snapshot) -> str:
    """Phase of rank 0 if it is loading, evaluating or saving; otherwise 'running' or 'starting'."""
    pulse = snapshot.pulses.get(0)
    if pulse is not None and pulse.phase in ("loading", "evaluating", "saving"):
        return pulse.phase
    return "running" if snapshot.fold.step or snapshot.fold.seconds_left is not None else "starting"


def _left(snapshot: Snapshot) -> float | None:
    """Seconds until the last step, counted down through a step and no further."""
    fold = snapshot.fold
    left, steps = fold.seconds_left, fold.total_steps - fold.step
    if not left or steps < 1 or not fold.columns.time[-1]:
        return left
    return left - min(left / steps, max(0.0, snapshot.now - fold.columns.time[-1]))


def _losses(snapshot: Snapshot) -> list[str]:
    fold = snapshot.fold
    if fold.loss is None:
        return ["no step yet", *([f"held-out {fold.held_out[-1][1]:.3f}"] if fold.held_out else [])]
    parts = [f"loss {fold.loss:.3f}"]
    if fold.smoothed_loss is not None:
        parts.append(f"smoothed {fold.smoothed_loss:.3f}")
    if fold.held_out:
        (_, first), (last_step, last) = fold.held_out[0], fold.held_out[-1]
        parts.append(f"held-out {first:.3f}" + (f" to {last:.3f} (step {last_step})" if last_step else ""))
    parts += [f"{task} {points[0][1]:.4g} to {points[-1][1]:.4g}" for task, points in fold.tasks.items() if points]
    if _number(fold.learning_rate):
        parts.append(f"lr {fold.learning_rate:.1e}")
    if _number(fold.gradient_norm):
        parts.append(f"gradient {fold.gradient_norm:.2f}")
    return parts


def _speed(snapshot: Snapshot) -> list[str]:
    now, mean = snapshot.fold.tokens_per_s, snapshot.fold.mean_tokens_per_s
    if now is None or mean is None:
        return ["speed not known yet"]
    parts = [f"{format_count(now)} tok/s now", f"{format_count(mean)} on average"]
    positions = snapshot.fold.positions_per_s
    if positions and has_padding(now / positions):
        parts[0] = f"{format_count(now)} useful tok/s now, {format_count(positions)} with padding"
    use, mean_use = mfu(snapshot, now), mfu(snapshot, mean)
    if use is not None and mean_use is not None:
        parts.append(f"MFU {use:.1%} now, {mean_use:.1%} on average")
    if snapshot.plan.tokens_per_second:
        parts.append(f"{format_count(snapshot.plan.tokens_per_second)} predicted")
    return parts


def _around(snapshot: Snapshot) -> list[str]:
    fold = snapshot.fold
    parts = []
    if fold.checkpoints:
        step, time = fold.checkpoints[-1]
        age = f", {format_duration(snapshot.now - time)} ago" if snapshot.state == "running" else ""
        parts.append(f"checkpoint step {step:,}{age}")
    else:
        parts.append("no checkpoint yet")
    if fold.padding_share is not None:
        parts.append(f"padding {fold.padding_share:.1%}")
    if fold.data_share is not None:
        parts.append(f"data {fold.data_share:.1%}")
    if fold.skew:
        parts.append(f"skew {fold.skew[1]:.1%} (rank {fold.skew[0]})")
    return parts


def _fitted(parts: Sequence[str], width: int) -> str:
    """As many items as fit, in order."""
    line = ""
    for part in parts:
        joined = f"{line}  {part}" if line else part
        if len(joined) <= width or not line:
            line = joined
    return line


def _messages(snapshot: Snapshot, width: int, *, most: int) -> list[Text]:
    """How the run ended, and warnings; those that do not fit are counted."""
    lines: list[Text] = []
    if snapshot.state == "planned":
        lines.append(Text("planned; waiting for the ranks to start", style="yellow"))
    elif snapshot.state == "finished":
        early = snapshot.fold.ended_early
        lines += _wrapped(early or f"finished after {snapshot.fold.step:,} steps", width, "green")
    elif snapshot.state in ("failed", "stopped", "killed"):
        # The first line says what happened; lines of a log may follow, which the log pane shows.
        said = snapshot.message.partition("\n")[0].rstrip(":")
        lines += _wrapped(f"{snapshot.state}: {said}" if said else snapshot.state, width, "bold red")
        if snapshot.try_:
            lines += _wrapped(f"try: {snapshot.try_}", width, "")
    for warning in find_warnings(snapshot):
        lines += _wrapped(f"! {warning.text}", width, "bold yellow")
    if len(lines) > most:
        more = Text(f"… {len(lines) - most + 1} more lines", style="yellow")
        lines = [*lines[: most - 1], more] if most > 1 else lines[:1]
    return lines


def _wrapped(words: str, width: int, style: str) -> list[Text]:
    return [Text(line, style=style) for line in fitted(" ".join(cell(words).split()), width)]


def _overview(snapshot: Snapshot, width: int, room: int) -> list[Text]:
    if width >= _WIDE:
        left = width * 11 // 20
        table = rank_table(snapshot, left - 1, room)
        right = width - left
        upper = room * 3 // 5
        charts = [*_loss_plot(snapshot, right, upper), *_rate_plot(snapshot, right, room - upper)]
        return _beside(table, charts, left)
    table = rank_table(snapshot, width, max(2, room - _LEAST_CHART))
    rest = room - len(table)
    if rest < _LEAST_CHART:
        return table
    left = width * 3 // 5
    return [
        *table,
        *_beside(_loss_plot(snapshot, left - 1, rest), _rate_plot(snapshot, width - left, rest), left),
    ]


def _ranks(snapshot: Snapshot, width: int, room: int) -> list[Text]:
    """The table, and below it what is trained on."""
    told = [*snapshot.fold.inventory.splitlines(), *filter(None, (snapshot.fold.gradients,))]
    return [*rank_table(snapshot, width, room, whole=True), Text(""), *(Text(cell(line)) for line in told)]


def _curves(snapshot: Snapshot, width: int, room: int) -> list[Text]:
    columns, half, upper = snapshot.fold.columns, width // 2, room // 2
    speed = plot("tokens/s", columns.step, tokens_per_s(snapshot.fold), width=half - 1, height=room - upper)
    norm = plot("gradient norm", columns.step, columns.gradient_norm, width=width - half, height=room - upper)
    return [
        *_beside(_loss_plot(snapshot, half - 1, upper), _rate_plot(snapshot, width - half, upper), half),
        *_beside(speed, norm, half),
    ]


def _log(snapshot: Snapshot, width: int, room: int) -> list[Text]:
    if snapshot.all_logs:
        return _all_logs(snapshot, room)
    title = Text(f"log of rank {snapshot.log_rank}, its end", style="bold")
    lines = [Text(cell(line.expandtabs(4))) for line in snapshot.log]
    return [title, *(lines or [Text("nothing yet", style="dim")])[-max(0, room - 1) :]] if room > 1 else [title]


def _all_logs(snapshot: Snapshot, room: int) -> list[Text]:
    """As many of each rank's last lines as there is room for, rank by rank; of too many, the ranks that wrote last."""
    title, nodes = "ends of all logs", snapshot.node_of_rank
    most = max(1, (room - 1) // max(1, len(snapshot.logs)))
    shown = sorted([*snapshot.logs][: max(0, room - 1)])
    if len(shown) < snapshot.plan.world_size:
        title += f", of {len(shown)} of {counted(snapshot.plan.world_size, 'rank')}"
    heads = {rank: cell(" ".join(filter(None, (nodes.get(rank, ""), f"rank {rank}")))) for rank in shown}
    margin = max(map(len, heads.values()), default=0)
    lines = [
        Text.assemble((f"{heads[rank]:{margin}}  ", "dim"), cell(line.expandtabs(4)))
        for rank in shown
        for line in snapshot.logs[rank][-most:]
    ]
    return [Text(title, style="bold"), *(lines or [Text("nothing yet", style="dim")])]


def _loss_plot(snapshot: Snapshot, width: int, height: int) -> list[Text]:
    columns = snapshot.fold.columns
    title = "loss" + ("   ● held-out" if snapshot.fold.held_out else "")
    return plot(title, columns.step, columns.loss, width=width, height=height, points=snapshot.fold.held_out)


def _rate_plot(snapshot: Snapshot, width: int, height: int) -> list[Text]:
    columns = snapshot.fold.columns
    return plot("learning rate", columns.step, columns.learning_rate, width=width, height=height)


def _beside(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    lines = []
    for one, other in zip_longest(left, right, fillvalue=Text("")):
        line = one.copy()
        line.truncate(width, overflow="crop", pad=True)
        lines.append(line + other)
    return lines


def _spread(left: Text, right: Text, width: int) -> Text:
    """One text at the left, one at the right; the left one is shortened if needed."""
    left.truncate(max(0, width - right.cell_len - 1), overflow="crop", pad=True)
    return Text.assemble(left, " ", right)


def _number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
