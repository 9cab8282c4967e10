"""Are bytes and seconds read and written as people do?"""

import pytest

from qdist.core.errors import SpecError
from qdist.core.text import GIB, KIB, MIB, format_bytes, format_count, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        ("24 GB", 24 * 10**9),
        (" 1.5GiB ", 3 * GIB // 2),
        ("512MiB", 512 * MIB),
        ("4KiB", 4 * KIB),
        ("1TiB", 1024 * GIB),
        ("2tb", 2 * 10**12),
        ("7b", 7),
        ("25769803776", 24 * GIB),
        (24 * GIB, 24 * GIB),
    ],
)
def test_an_amount_of_memory_is_read_in_its_own_unit(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "24GX", "24 G", "-1GiB", "1,5GiB", "1e3", "24GiB 7", "nan", -7])
def test_what_is_no_amount_of_memory_is_refused(text: str | int) -> None:
    with pytest.raises(SpecError, match="is not an amount of memory") as caught:
        parse_bytes(text)
    assert "24GiB" in caught.value.try_


def test_a_number_without_a_unit_is_taken_for_a_forgotten_unit() -> None:
    with pytest.raises(SpecError, match="'24' without a unit is 24 bytes") as caught:
        parse_bytes("24")
    assert caught.value.try_ == "24GiB"


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000, "8388608TiB", 10**400])
def test_more_memory_than_there_can_be_is_refused(text: str | int) -> None:
    with pytest.raises(SpecError, match="is not a possible amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "hint"), [("48", "48GiB"), ("48 GX", "48GiB"), ("nan", "24GiB"), ("0", "24GiB"), ("9999", "24GiB")]
)
def test_the_flag_is_named_with_what_was_meant(text: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_bytes(text, "gpu_memory")
    assert caught.value.try_ == f"--gpu-memory {hint}"


@pytest.mark.parametrize("text", ["0", "0GiB", "0.4", 0])
def test_no_memory_at_all_is_refused(text: str | int) -> None:
    with pytest.raises(SpecError, match="is not a positive amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (900, "900 B"), (1023, "1023 B"), (KIB, "1.0 KiB"), (312 * MIB, "312 MiB"),
        (21.4 * GIB, "21.4 GiB"), (1500 * GIB, "1,500 GiB"), (-2 * GIB, "-2.0 GiB"),
    ],
)  # fmt: skip
def test_bytes_are_written_short_and_in_binary_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize("amount", ["24GiB", "1.5 GiB", "312 MiB"])
def test_what_is_written_can_be_read_back(amount: str) -> None:
    assert parse_bytes(format_bytes(parse_bytes(amount))) == parse_bytes(amount)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"), (0.4, "0 s"), (42, "42 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599, "59 min 59 s"),
        (5 * 3600 + 7 * 60 + 59, "5 h 07 min"), (100 * 3600, "100 h 00 min"),
    ],
)  # fmt: skip
def test_a_duration_is_written_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (12_377, "12,377"), (799.5e6, "799.5 M"), (65.3e9, "65.3 B"), (812.4, "812")]
)
def test_a_count_is_written_short(count: float, text: str) -> None:
    assert format_count(count) == text
