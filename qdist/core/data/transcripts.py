"""What do the speakers of a text say, where it marks them by `<human>:` and `<bot>:`, or `Human:` and `Assistant:`?"""

import re

from qdist.core.data.conversation import Turn
from qdist.core.data.record_turns import answer_of

_TAGGED = re.compile(r"(?:^|\n)\s*<(human|bot)>:")
"""OIG's, https://github.com/LAION-AI/Open-Instruction-Generalist: `<human>: ...\n<bot>: ...`."""
_SPOKEN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
"""Anthropic's, https://github.com/anthropics/hh-rlhf: `\n\nHuman: ...\n\nAssistant: ...`."""
_ANSWERS = ("bot", "Assistant")


def is_tagged(text: object) -> bool:
    """Whether a text begins with `<human>:` and holds an answer: it can hardly be anything but OIG's."""
    return isinstance(text, str) and text.lstrip().startswith("<human>:") and "<bot>:" in text


def is_spoken(text: object) -> bool:
    """Whether a text is Anthropic's transcript, or OIG's."""
    spoken = isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text
    return spoken or is_tagged(text)


def turns_in(text: str) -> tuple[Turn, ...]:
    """The turns of a transcript, each without white space around it; text before the first is the system's.

    Empty where no speaker is marked.
    """
    marks = list((_TAGGED if _TAGGED.search(text) else _SPOKEN).finditer(text))
    if not marks:
        return ()
    before = text[: marks[0].start()].strip()
    turns = [Turn("system", before, False)] if before else []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        said = text[mark.end() : following.start() if following else None].strip()
        turns.append(answer_of(said) if mark.group(1) in _ANSWERS else Turn("user", said, False))
    return tuple(turns)
