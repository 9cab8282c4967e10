"""Bytes and seconds as people write them, and back."""

import re

from qdist.core.errors import SpecError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_FACTORS = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Bytes from '24GiB', '24 GB', '1.5GiB' or a plain count. GiB is 1024**3, GB is 10**9.

    Raises SpecError when the text is not a positive amount of memory.
    """
    if isinstance(text, int):
        text = str(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _FACTORS:
        raise SpecError(f"{text!r} is not an amount of memory", try_="24GiB, or 24GB for 24 * 10**9 bytes")
    count = int(float(match[1]) * _FACTORS[match[2].lower()])
    if count <= 0:
        raise SpecError(f"{text!r} is not a positive amount of memory", try_="24GiB")
    if not match[2] and count < MIB:
        raise SpecError(f"{text!r} without a unit is {count} bytes", try_=f"{text.strip()}GiB")
    return count


def format_bytes(count: float) -> str:
    """'21.4 GiB', '312 MiB', '900 B': three significant digits, binary units."""
    size = abs(count)
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            scaled = count / factor
            return f"{scaled:.1f} {unit}" if abs(scaled) < 100 else f"{scaled:,.0f} {unit}"
    return f"{count:.0f} B"


def counted(number: int, name: str) -> str:
    """'1 GPU', '4 GPUs'."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """'42 s', '3 min 20 s', '5 h 07 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(count: float) -> str:
    """'799.5 M', '65.3 B', '12,377': parameters and tokens."""
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if abs(count) >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:,.0f}"


def signed(share: float) -> str:
    """'+3.1 %'."""
    return f"{round(100 * share, 1) + 0.0:+.1f} %"  # + 0.0: no minus before a zero
