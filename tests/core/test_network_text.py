"""Are rates and latencies of networks read and written as people write them?"""

import pytest

from qdist.core.errors import SpecError
from qdist.core.text import format_delay, format_rate, parse_delay, parse_rate


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [
        ("25Gbit", 3.125e9), ("25 Gbit/s", 3.125e9), ("100mbit", 1.25e7), ("1.2GiB/s", 1.2 * 1024**3), ("2GB", 2e9),
        ("800kbit", 1e5),
    ],
)  # fmt: skip
def test_rates_are_read(text: str, bytes_s: float) -> None:
    assert parse_rate(text) == pytest.approx(bytes_s)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.1ms", 1e-4), ("50us", 5e-5), ("50µs", 5e-5), (" 0.02 s", 0.02), ("0ms", 0.0)]
)
def test_latencies_are_read(text: str, seconds: float) -> None:
    assert parse_delay(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "try_"),
    [
        ("25", "--network 25Gbit"), ("fast", "--network 25Gbit"), ("", "--network 25Gbit"),
        ("-1Gbit", "--network 25Gbit"),
        ("1bit", "--network 1Gbit"), ("0Gbit", "--network 25Gbit"), ("1e9Gbit", "--network 25Gbit"),
        ("900TB/s", "--network 25Gbit"), ("25Gbit/h", "--network 25Gbit"),
    ],
)  # fmt: skip
def test_what_is_no_rate_is_refused_with_one(text: str, try_: str) -> None:
    with pytest.raises(SpecError, match="is not the rate of a network such as") as refused:
        parse_rate(text, "network")
    assert refused.value.try_ == try_


@pytest.mark.parametrize("text", ["1", "ms", "11s", "5min", "-1ms"])
def test_what_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is not the latency of a network such as") as refused:
        parse_delay(text)
    assert refused.value.try_ == "0.1ms"


@pytest.mark.parametrize(
    ("bytes_s", "text"), [(3.125e9, "25 Gbit/s"), (1.25e7, "100 Mbit/s"), (5e4, "400 kbit/s"), (1.25e8, "1 Gbit/s")]
)
def test_rates_are_written_as_networks_are_sold(bytes_s: float, text: str) -> None:
    assert format_rate(bytes_s) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1e-4, "0.1 ms"), (5e-5, "50 us"), (0.02, "20 ms"), (1.2, "1.2 s"), (0.0, "0 us")]
)
def test_latencies_are_written(seconds: float, text: str) -> None:
    assert format_delay(seconds) == text
