import io

import pytest
from rich.console import Console, RenderableType

from qdist.cli.views.text import answers, comparison, plain_line, plain_lines
from qdist.core.telemetry.events import Event
from qdist.core.text import GIB


def drawn(view: RenderableType, width: int = 80, *, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(record=True, width=width, force_terminal=False, file=file)
    console.print(view)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


STEP = Event(
    kind="step", step=12, total_steps=60, loss=1.234, learning_rate=2e-4, tokens=3386, seconds=4.17,
    memory_bytes=int(1.9 * GIB),
)  # fmt: skip


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (STEP, "step 12/60  loss 1.234  lr 2.0e-04  812 tok/s  rank0 1.9 GiB  3 min 20 s left"),
        (Event(kind="start", total_steps=60, note="nf4"), "started at step 0/60  nf4"),
        (Event(kind="eval", step=12, total_steps=60, held_out_loss=1.5), "step 12/60  held-out 1.500"),
        (Event(kind="eval", step=12, total_steps=60, task="mmlu:a", figure=0.31249), "step 12/60  mmlu:a 0.3125"),
        (Event(kind="end", step=6, total_steps=60, note="stopped early"), "finished at step 6/60  stopped early"),
        (Event(kind="verify", step=12, total_steps=60, note="1.9 GiB"), "step 12/60  backbone verified  1.9 GiB"),
        (Event(kind="checkpoint", step=12), "step 12  checkpoint written"),
        (Event(kind="load", seconds=31.2, read_bytes=36 * 10**9, memory_bytes=9 * GIB),
         "backbone loaded  31 s, 33.5 GiB read at 1.2 GB/s  rank0 9.0 GiB"),
        (Event(kind="load", seconds=2), "backbone loaded  2 s"),
        (Event(kind="resume", step=12, total_steps=60), "resumed at step 12/60"),
        (Event(kind="end", step=60, total_steps=60), "finished at step 60/60"),
        (Event(kind="end", step=1, note="two\nlines\x1b[2J"), "finished at step 1  two lines"),
    ],
)  # fmt: skip
def test_an_event_is_one_line_of_a_log(event: Event, line: str) -> None:
    assert plain_line(event, left_s=200.0) == line


def test_an_inventory_is_told_as_the_lines_that_it_has() -> None:
    note = "backbone  60.2 MiB in 4 bits (nf4)\nadapted   210 of 210 linears\x1b[2J"
    assert [*plain_lines(Event(kind="inventory", note=note, memory_bytes=GIB))] == [
        "backbone  60.2 MiB in 4 bits (nf4)",
        "adapted   210 of 210 linears",
    ]
    checked = Event(kind="gradients", step=2, total_steps=60, note="all 28 trained tensors", memory_bytes=GIB)
    assert [*plain_lines(checked)] == ["step 2/60  gradients checked  all 28 trained tensors"]


def test_before_and_after_stand_side_by_side() -> None:
    view = drawn(comparison([("held-out loss", "2.30", "1.41"), ("tokens/s", "790", "8,122")], ("", "before", "after")))
    assert view == "               before  after\nheld-out loss    2.30   1.41\ntokens/s          790  8,122"


def test_answers_are_shown_as_said_and_cannot_touch_the_terminal() -> None:
    view = drawn(answers([("Who [red]is[/red] it?", "", "a [bold]cat\x1b[31m", "a cat")]), 60)
    assert view.splitlines() == [
        "Who [red]is[/red] it?",
        "  before    (nothing)",
        "  after     a [bold]cat",
        "  expected  a cat",
    ]
