"""What is said of a long job, on a terminal and where there is none, by a clock that is turned by hand."""

import io
import sys
from collections.abc import Iterable, Iterator

import pytest

from qdist.host.progress import ProgressLine


class Terminal(io.StringIO):
    """Standard error as a person sees it."""

    def isatty(self) -> bool:
        return True


def work(
    stream: io.StringIO, parts: Iterable[tuple[float, int]], total: int, *, done: int = 0, in_bytes: bool = False
) -> list[str]:
    """What is said of a job whose parts come after so many seconds each."""
    now = [100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("COLUMNS", "40")
        with ProgressLine(total, "written", done=done, in_bytes=in_bytes, clock=lambda: now[0]) as progress:
            for number, (seconds, count) in enumerate(parts, 1):
                now[0] += seconds
                progress.advance(count, f"layer {number}" if in_bytes else "")
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("parts", "total", "lines"),
    [
        ([(2.0, 5)] * 20, 100,
         [f"{done} of 100 written, 2.5/s, {(100 - done) / 2.5:.0f} s left" for done in range(10, 100, 10)]
         + ["100 of 100 written, 2.5/s"]),
        ([(4.0, 1)] * 50, 1000,  # ten seconds are up before a tenth is done
         [f"{done} of 1,000 written, 4.0 s each, {(1000 - done) * 4 // 3600} h {(1000 - done) * 4 % 3600 // 60:02d} "
          "min left" for done in range(3, 51, 3)]),
        ([(0.01, 1)] * 10, 10, ["10 of 10 written, 100.0/s"]),
        ([], 10, []),
    ],
)  # fmt: skip
def test_a_log_gets_a_line_for_each_tenth_or_every_ten_seconds(
    parts: list[tuple[float, int]], total: int, lines: list[str]
) -> None:
    assert work(io.StringIO(), parts, total) == [f"  {line}" for line in lines]


def test_the_rate_leaves_out_what_came_before_a_restart() -> None:
    now, stream = [100.0], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with ProgressLine(4, "answered", clock=lambda: now[0]) as progress:
            now[0] += 60  # a model is loaded
            progress.restart()
            now[0] += 8
            progress.advance(4)
    assert stream.getvalue() == "  4 of 4 answered, 2.0 s each\n"


def test_a_total_that_becomes_known_is_told_from_then_on() -> None:
    now, stream = [100.0], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with ProgressLine(0, "tokenized", done=10, clock=lambda: now[0]) as progress:
            for total in (0, 0, 60):
                now[0] += 10
                progress.expect(total)
                progress.advance(10)
    assert stream.getvalue().splitlines() == [
        "  20 tokenized, 1.0/s", "  30 tokenized, 1.0/s", "  40 of 60 tokenized, 1.0/s, 20 s left",
    ]  # fmt: skip


def test_what_an_earlier_process_did_is_no_part_of_the_rate() -> None:
    parts = [(5.0, 500 << 20), (5.0, 500 << 20)]
    assert work(io.StringIO(), parts, 3000 << 20, done=2000 << 20, in_bytes=True) == [
        "  layer 1, 2.4 GiB of 2.9 GiB written, 105 MB/s, 5 s left",
        "  layer 2, 2.9 GiB of 2.9 GiB written, 105 MB/s",
    ]


def test_a_terminal_has_one_line_that_changes_and_fits() -> None:
    stream = Terminal()
    work(stream, [(1.0, 1 << 30), (1.0, 1 << 30)], 2 << 30, in_bytes=True)
    first, second = stream.getvalue().split("\r\033[K")[1:]
    assert first == "  layer 1, 1.0 GiB of 2.0 GiB written, 1074 MB/s"[:39]
    assert second == "  layer 2, 2.0 GiB of 2.0 GiB written, 1074 MB/s"[:39] + "\n"


def test_an_error_in_the_middle_has_a_line_of_its_own() -> None:
    stream = Terminal()

    def failing() -> Iterator[tuple[float, int]]:
        yield 1.0, 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(stream, failing(), 2)
    assert stream.getvalue() == "\r\033[K  1 of 2 written, 1.0/s, 1 s left\n"
