import io
import math

import pytest
from rich.console import Console, RenderableType

from qdist.cli.views import Sparkline, answers, comparison, live_view, plain_line
from qdist.core.events import Event
from qdist.core.fold import Fold
from qdist.core.units import GIB, MIB

HEADER = "SmolLM2-135M  nf4 + LoRA r16  2 ranks on 2 CPUs"


def drawn(view: RenderableType, width: int = 80, *, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(record=True, width=width, force_terminal=False, file=file)
    console.print(view)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def folded(events: list[Event]) -> Fold:
    fold = Fold()
    fold.add(events)
    return fold


def run_of(ranks: int, *, steps: int = 12) -> Fold:
    events = [Event(kind="eval", step=0, total_steps=60, held_out_loss=2.3)]
    for number in range(1, steps + 1):
        events += [
            Event(
                kind="step", step=number, total_steps=60, loss=3 - number / 10, learning_rate=2e-4, gradient_norm=0.53,
                tokens=4096, seconds=4.0, memory_bytes=GIB + rank * 20 * MIB, rank=rank,
            )
            for rank in range(ranks)
        ]  # fmt: skip
    return folded([*events, Event(kind="eval", step=steps, held_out_loss=1.4)])


GOLDEN = """\
SmolLM2-135M  nf4 + LoRA r16  2 ranks on 2 CPUs
step 12/60 ━━━━━━━━━━╸                                           3 min 12 s left
loss 1.800  smoothed 2.250  █▇▇▆▅▅▄▄▃▂▂▁
held-out 2.300 (step 0) to 1.400 (step 12)
1,024 tok/s  lr 2.0e-04  gradient 0.53
 rank  peak memory  predicted
    0      1.0 GiB    2.0 GiB  ━━━━━━━━━━━━━━━                       50%
    1      1.0 GiB    1.0 GiB  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  102% over"""


def test_a_run_is_seen_whole() -> None:
    assert drawn(live_view(run_of(2), HEADER, (2 * GIB, GIB), 80)) == GOLDEN


@pytest.mark.parametrize("ranks", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_view_fits_its_terminal(ranks: int, width: int) -> None:
    lines = drawn(live_view(run_of(ranks), HEADER * 4, (2 * GIB,) * ranks, width), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 6 + (ranks if ranks <= 8 else 3)


def test_many_ranks_are_shown_as_least_median_and_most() -> None:
    view = drawn(live_view(run_of(64), HEADER, (2 * GIB,) * 64, 80))
    assert "rank of 64" in view
    assert [line.split()[:2] for line in view.splitlines()[-3:]] == [
        ["0", "(least)"],
        ["32", "(median)"],
        ["63", "(most)"],
    ]


def test_a_run_that_has_not_stepped_yet_can_be_seen() -> None:
    view = drawn(live_view(Fold(), HEADER, (GIB, GIB), 60), 60)
    assert "starting" in view
    assert view.count("1.0 GiB") == 2


def test_a_run_without_predictions_shows_what_it_measured() -> None:
    assert drawn(live_view(run_of(1), HEADER, (), 80)).splitlines()[-1].split() == ["0", "1.0", "GiB", "-"]


def test_a_diverged_run_says_so() -> None:
    state = folded([Event(kind="step", step=1, total_steps=3, loss=math.nan, seconds=1.0)])
    assert "loss nan" in drawn(live_view(state, HEADER, (), 60), 60)


def test_skipped_steps_and_the_end_are_shown() -> None:
    events = [Event(kind="step", step=1, total_steps=1, skipped=True, loss=1.0), Event(kind="end", step=1)]
    view = drawn(live_view(folded(events), HEADER, (), 60), 60)
    assert "1 skipped" in view
    assert "finished" in view


def test_no_colour_is_written_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    console.print(live_view(run_of(2), HEADER, (GIB, GIB), 80))
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[3" not in console.file.getvalue()


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert drawn(live_view(run_of(9), HEADER * 3, (GIB,) * 9, 60), 60, encoding="ascii").isascii()


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [([], 8, ""), ([1.0], 8, "▁"), ([1.0, 2.0], 8, "▁█"), ([2.0, math.nan, 1.0], 8, "█▁"), ([0, 0, 4, 4], 2, "▁█")],
)
def test_a_sparkline_has_the_shape_of_its_values(values: list[float], width: int, line: str) -> None:
    assert drawn(Sparkline(values, width)) == line


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
        (Event(kind="verify", step=12, total_steps=60, note="1.9 GiB"), "step 12/60  backbone verified  1.9 GiB"),
        (Event(kind="checkpoint", step=12), "step 12  checkpoint written"),
        (Event(kind="load", seconds=31.2, read_bytes=36 * 10**9, memory_bytes=9 * GIB),
         "backbone loaded  31 s, 33.5 GiB read at 1.2 GB/s  rank0 9.0 GiB"),
        (Event(kind="load", seconds=2), "backbone loaded  2 s"),
        (Event(kind="resume", step=12, total_steps=60), "resumed at step 12/60"),
        (Event(kind="end", step=60, total_steps=60), "finished at step 60/60"),
        (Event(kind="end", step=1, note="two\nlines\x1b[2J"), "finished at step 1  two lines [2J"),
    ],
)  # fmt: skip
def test_an_event_is_one_line_of_a_log(event: Event, line: str) -> None:
    assert plain_line(event) == line


def test_before_and_after_stand_side_by_side() -> None:
    view = drawn(comparison([("held-out loss", "2.30", "1.41"), ("tokens/s", "790", "8,122")], ("", "before", "after")))
    assert view == "               before  after\nheld-out loss    2.30   1.41\ntokens/s          790  8,122"


def test_answers_are_shown_as_said_and_cannot_touch_the_terminal() -> None:
    view = drawn(answers([("Who [red]is[/red] it?", "", "a [bold]cat\x1b[31m", "a cat")]), 60)
    assert view.splitlines() == [
        "Who [red]is[/red] it?",
        "  before    (nothing)",
        "  after     a [bold]cat [31m",
        "  expected  a cat",
    ]
