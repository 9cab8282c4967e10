"""What of a text may go to a terminal: letters, never what moves its cursor, recolours it or turns a line around."""

import re

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
