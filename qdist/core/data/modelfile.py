"""The Modelfile by which Ollama prompts a GGUF file as its chat template does."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qdist.core.data.conversation import Role

Message = tuple[Role, str]
Messages = Sequence[Message]
"""(role, text) of each turn."""
Write = Callable[[Messages], str]
"""A chat template: the text of a conversation that awaits a reply. Raises ValueError for one that it refuses."""

_SYSTEM, _ASKED, _ANSWER, _AGAIN = "<qdist system>", "<qdist question>", "<qdist answer>", "<qdist again>"


class GoTemplate(NamedTuple):
    """A chat template as Ollama has them: what stands around the texts of a conversation."""

    before_system: str
    """Empty, as `after_system` is, where the chat template takes no system message."""
    after_system: str
    """With what stands before the question that follows."""
    before_question: str
    """Where there is no system message before it."""
    after_question: str
    after_answer: str
    system: str = ""
    """What the chat template says where there is no system message."""

    def __str__(self) -> str:
        question = _literal(self.before_question)
        if self.after_system:
            with_system = f"{_literal(self.before_system)}{{{{ .System }}}}{_literal(self.after_system)}"
            question = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{question}{{{{ end }}}}"
        end = _literal(self.after_answer)
        return f"{question}{{{{ .Prompt }}}}{_literal(self.after_question)}{{{{ .Response }}}}{end}"

    def write(self, messages: Messages) -> str:
        """What Ollama makes of a conversation that awaits a reply."""
        text = ""
        system = self.system
        for role, said in messages:
            if role == "system":
                system = said
            elif role == "user":
                text += f"{self.before_system}{system}{self.after_system}" if system else self.before_question
                text += said + self.after_question
                system = ""
            else:
                text += said + self.after_answer
        return text


def go_template(write: Write, *, opening: str) -> GoTemplate | None:
    """The Go template that writes what a chat template does; None where none of this form does.

    opening: the token that readers of the file put before a text by themselves; empty if they put none.
    """
    asked: Message = ("user", _ASKED)
    said: Message = ("system", _SYSTEM)
    answered: Messages = (("user", _ASKED), ("assistant", _ANSWER), ("user", _AGAIN))
    try:
        first, both = _split(write([asked]), _ASKED), _split(write(answered), _ASKED, _ANSWER, _AGAIN)
    except ValueError:
        return None
    before, after = first[0].removeprefix(opening), first[1]
    lead = both[1].removeprefix(after)  # of an answer that is told again: the model wrote the space itself
    if not both[1].startswith(after) or lead.strip():
        return None
    found = _with_system(write, GoTemplate("", "", before, after, both[2]), opening)
    tried: list[Messages] = [answered, (asked,), *([(said, *answered), (said, asked)] if found.after_system else [])]
    return found if all(_same(found, write, each, opening=opening, lead=lead) for each in tried) else None


def _with_system(write: Write, found: GoTemplate, opening: str) -> GoTemplate:
    """The template with what stands around a system message. found: its `after_answer` has the next question's, too."""
    try:
        head, tail, _ = _split(write([("system", _SYSTEM), ("user", _ASKED)]), _SYSTEM, _ASKED)
    except ValueError:
        head = tail = ""
    head, before, between = head.removeprefix(opening), found.before_question, found.after_answer
    if between.endswith(before):
        return found._replace(before_system=head, after_system=tail, after_answer=between.removesuffix(before))
    if not tail or not (before.startswith(head) and before.endswith(tail) and len(before) > len(head) + len(tail)):
        return found._replace(before_system=head, after_system=tail)
    usual, shared = before.removeprefix(head).removesuffix(tail), _common_end(tail, between)
    return GoTemplate(head, tail, shared, found.after_question, between.removesuffix(shared), usual)


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]


def _split(text: str, *marks: str) -> list[str]:
    """What stands before, between and after marks. Raises ValueError if they are not there, once and in order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(f"the chat template does not write {mark} once")
        parts.append(before)
    return [*parts, text]


def _same(found: GoTemplate, write: Write, messages: Messages, *, opening: str, lead: str) -> bool:
    own = [(role, f"{lead}{text}" if role == "assistant" else text) for role, text in messages]
    try:
        return found.write(own) == write(messages).removeprefix(opening)
    except ValueError:
        return False


def _literal(text: str) -> str:
    """Text in a Go template, which takes two braces for the beginning of an action."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(
    file: str, template: GoTemplate | None, *, system: str, stops: Sequence[str], parameters: Mapping[str, float]
) -> str:
    """The text of a Modelfile.

    file: the GGUF file's name, in the same folder. template: None leaves Ollama to the file's own chat template.
    system: a system message that all conversations have. stops: texts that end answers. parameters: Ollama's, by name.
    """
    lines = [f"FROM ./{file}"]
    if template is None:
        lines.append("# The chat template is none that a Go template can write: Ollama takes the one in the file.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    if spoken := system or (template.system if template else ""):
        lines.append(f'SYSTEM """{spoken}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A value in quotation marks, which Ollama reads as it is but for them."""
    return '"' + text.replace('"', '\\"') + '"'
