"""Bytes and seconds as people write them, and back."""

import re

from qdist.core.errors import SpecError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_FACTORS = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_MOST_BYTES = 2**63
_USUAL_GIB = (1, 2048)
"""Of a GPU or a host, where a number has no unit that is known."""


def parse_bytes(text: str | int, key: str = "") -> int:
    """Bytes from '24GiB', '24 GB', '1.5GiB' or a plain count. GiB is 1024**3, GB is 10**9.

    key: the setting or flag that is read, for the hint.
    Raises SpecError when the text is not an amount of memory that a machine may have.
    """
    text = str(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _FACTORS:
        number = match[1] if match else ""
        raise _no_amount(f"{text!r} is not an amount of memory such as 24GiB or 24GB", number, key)
    count = float(match[1]) * _FACTORS[match[2].lower()]
    if not 1 <= count < _MOST_BYTES:
        raise _no_amount(f"{text!r} is not {'a positive' if count < 1 else 'a possible'} amount of memory", "", key)
    if not match[2] and count < MIB:
        raise _no_amount(f"{text!r} without a unit is {count:.0f} bytes", match[1], key)
    return int(count)


def _no_amount(message: str, number: str, key: str) -> SpecError:
    """number: the GiB that seem to be meant, if any."""
    meant = number if number and _USUAL_GIB[0] <= float(number) <= _USUAL_GIB[1] else "24"
    return SpecError(message, try_="" if key else f"{meant}GiB", ways=[{key: f"{meant}GiB"}] if key else [])


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
