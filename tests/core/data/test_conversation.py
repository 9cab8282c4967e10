"""Conversations become text, and the chat templates that are saved say the same."""

from typing import Any

import pytest

from qdist.core.data.conversation import Conversation, Segment, Style, Turn, Wording, template_of

TALK = (
    Turn("system", "Be {{ brief }}.", False), Turn("user", "hi", False), Turn("assistant", "ho", False),
    Turn("user", "and?", False),
)  # fmt: skip
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nhi\n\n### Response:"
)


@pytest.mark.parametrize(
    ("style", "gap", "pieces"),
    [
        ("headings", "\n",
         ("Be {{ brief }}.\n", "\n### Human: hi\n### Assistant:", " ho", "\n### Human: and?\n### Assistant:")),
        ("headings", "", ("Be {{ brief }}.\n", "### Human: hi### Assistant:", " ho", "### Human: and?### Assistant:")),
        ("alpaca", "\n", ("Be {{ brief }}.\n\n", PROMPT, "ho", "\n\n### Instruction:\nand?\n\n### Response:")),
        ("plain", "\n", ("Be {{ brief }}.\n\n", "hi", "ho", "and?")),
    ],
)  # fmt: skip
def test_each_style_has_its_pieces(style: Style, gap: str, pieces: tuple[str, ...]) -> None:
    found = Conversation(turns=TALK, where="", style=style, gap=gap).segments()
    assert tuple(segment.text for segment in found) == pieces
    assert [segment.ended for segment in found] == [False, False, True, False]


@pytest.mark.parametrize("style", ["headings", "alpaca", "plain"])
@pytest.mark.parametrize("gap", ["\n", "", " "])
@pytest.mark.parametrize("turns", [TALK, TALK[1:], TALK[1:2], (TALK[0], TALK[3])])
@pytest.mark.parametrize("opening", [True, False])
def test_a_saved_template_writes_what_the_style_writes(
    style: Style, gap: str, turns: tuple[Turn, ...], opening: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": turn.role, "content": turn.said} for turn in turns]
    rendered: Any = render_jinja_template(
        [messages], chat_template=template_of(style, gap, opening=opening), bos_token="<s>", eos_token="</s>"
    )
    pieces = Conversation(turns=turns, where="", style=style, gap=gap).segments()
    said = "".join(piece.text + "</s>" * piece.ended for piece in pieces)
    assert rendered[0][0] == ("<s>" if opening else "") + said


def test_a_wording_says_what_the_records_were_and_how_they_became_text() -> None:
    assert str(Wording(format="oasst", style="headings", raw=True)) == "oasst, raw text"
    assert str(Wording(format="messages", style="chat")) == "messages, chat template"
    assert str(Wording(format="alpaca", style="alpaca")) == "alpaca, Alpaca's prompt"
    assert str(Wording(style="headings")) == "turns under ### Human: and ### Assistant:"


def test_an_instruction_keeps_its_input_beside_it() -> None:
    turns = (Turn("user", "Add.", False, "1 2"), Turn("assistant", "3", True))
    found = Conversation(turns=turns, where="", style="alpaca").segments()
    assert "paired with an input" in found[0].text
    assert found[0].text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert found[1] == Segment("3", True)
