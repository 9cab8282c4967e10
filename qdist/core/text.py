"""How are bytes, seconds, counts, commands and other people's text written for a person, and read back?"""

import re
import shlex
import textwrap
from collections.abc import Sequence

from qdist.core.errors import SpecError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_FACTORS = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_MOST_BYTES = 2**63
_USUAL_GIB = (1, 2048)
"""Usual memory of a GPU or host in GiB, to guess at a number without a known unit."""


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
    """The error for a text that is not an amount of memory. number: GiB probably meant, if any."""
    meant = number if number and _USUAL_GIB[0] <= float(number) <= _USUAL_GIB[1] else "24"
    return SpecError(message, try_="" if key else f"{meant}GiB", ways=[{key: f"{meant}GiB"}] if key else [])


_BIT_FACTORS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_USUAL_RATE, USUAL_DELAY = "25Gbit", "0.1ms"
_RATES, _DELAYS = (1e4, 1e13), (0.0, 10.0)
"""Bytes/s and seconds that a network between machines may have."""


def parse_rate(text: str, key: str = "") -> float:
    """Bytes/s from '25Gbit', '100 Mbit/s', '1.2GiB/s'. A Gbit is 10**9 bits.

    key: the setting or flag that is read, for the hint.
    Raises SpecError when the text is not a rate that a network may have.
    """
    count, unit = _quantity(text.strip().removesuffix("/s"))
    each = _BIT_FACTORS[unit] / 8 if unit in _BIT_FACTORS else _FACTORS.get(unit or "?", 0)
    if not _RATES[0] <= count * each <= _RATES[1]:
        meant = f"{count:g}Gbit" if each == 0 and 1 <= count <= 1000 else _USUAL_RATE
        raise SpecError(
            f"{text.strip()!r} is not the rate of a network such as 25Gbit, 100Mbit or 1.2GiB/s",
            try_="" if key else meant,
            ways=[{key: meant}] if key else [],
        )
    return count * each


def parse_delay(text: str) -> float:
    """Seconds from '0.1ms', '50us', '0.02 s'.

    Raises SpecError when the text is not a time that a message may take.
    """
    count, unit = _quantity(text)
    if unit not in _SECONDS or not _DELAYS[0] <= count * _SECONDS[unit] <= _DELAYS[1]:
        raise SpecError(
            f"{text.strip()!r} is not the latency of a network such as 0.1ms or 50us",
            try_=USUAL_DELAY,
        )
    return count * _SECONDS[unit]


def _quantity(text: str) -> tuple[float, str]:
    """(number, unit in lower case) of a text; a negative number where it is none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]*)\s*", text)
    return (float(match[1]), match[2].lower()) if match else (-1.0, "")


def format_rate(bytes_s: float) -> str:
    """'25 Gbit/s', '100 Mbit/s', of bytes/s: as networks are sold."""
    for unit, factor in (("Gbit/s", 10**9), ("Mbit/s", 10**6)):
        if bytes_s * 8 >= factor:
            return f"{bytes_s * 8 / factor:.3g} {unit}"
    return f"{bytes_s * 8 / 1000:.3g} kbit/s"


def format_delay(seconds: float) -> str:
    """'0.1 ms', '50 us', '1.2 s'."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor or (unit == "ms" and seconds >= 0.1 * factor):
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_bytes(count: float) -> str:
    """'21.4 GiB', '312 MiB', '900 B': three significant digits, binary units."""
    size = abs(count)
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            scaled = count / factor
            return f"{scaled:.1f} {unit}" if abs(scaled) < 100 else f"{scaled:,.0f} {unit}"
    return f"{count:.0f} B"


def counted(number: int, name: str, plural: str = "s") -> str:
    """'1 GPU', '4 GPUs'; with 'es' '2 processes'."""
    return f"{number} {name}{'' if number == 1 else plural}"


def first_few(names: Sequence[str], *, most: int = 3) -> str:
    """'a, b, c and 4 more'."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


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


def command(*words: object) -> str:
    """A command of qdist. words: those behind `qdist`; each is quoted where a shell would take it apart."""
    return quoted("qdist", *words)


def quoted(*words: object) -> str:
    """Words of a command, such as `--model 'my models/one'`."""
    return shlex.join(argument(word) if hasattr(word, "__fspath__") else str(word) for word in words)


def argument(path: object) -> str:
    """A path as a program's argument, safe if it begins with a dash."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def resuming(run: object, *settings: object) -> str:
    """The command that resumes a run. settings: words such as `--set` and its value."""
    return command("launch", "--resume", "--run", argument(run), *settings)


_UNSAFE = re.compile(
    "(?P<colour>\x1b\\[[0-9;]*m)"
    "|(?P<sequence>(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]{0,500}(?:\x07|\x1b\\\\|\x9c))"  # OSC, DCS, SOS, PM, APC
    "|(?P<half>[\ud800-\udfff])"
    "|\r(?=\n)"
    "|(?P<control>[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f])"
)
"""Joiners and the marks of direction that Persian, Hebrew and emoji are written with stay."""


def printable(text: str, *, colours: bool = False) -> str:
    """The same without sequences of control characters; a single one becomes a space. Newlines and tabs stay.

    What it makes of a text in pieces is as harmless as what it makes of the whole.
    colours: keep those that this program put there.
    """

    def instead(found: re.Match[str]) -> str:
        match found.lastgroup:
            case "colour":
                return found[0] if colours else ""
            case "half":
                return "\N{REPLACEMENT CHARACTER}"
            case "control":
                return " "
        return ""

    return _UNSAFE.sub(instead, text)


_LEAST = 30
"""Fewest cells beside a margin: a narrower terminal breaks lines itself."""


def fitted(line: str, width: int, *, margin: int = 0) -> list[str]:
    """A line as lines of `width` cells; all but the first begin with a margin. Words stay whole, paths too."""
    width = max(width, margin + _LEAST if margin else 1)
    indent = " " * margin
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [line]  # fmt: skip
