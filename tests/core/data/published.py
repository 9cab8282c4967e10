"""Thirty records after published formats, each with what was meant to be given and to be learned, written by hand."""

from typing import Any, NamedTuple

from qdist.core.data.reading import AS_FOUND, Reading


class Published(NamedTuple):
    """A record, and what is made of it."""

    name: str
    record: dict[str, Any]
    format: str
    given: tuple[str, ...]
    """Texts of the turns without a loss, in order."""
    learned: tuple[str, ...]
    """Texts of the turns with a loss, in order."""
    reading: Reading = AS_FOUND


def said(**by: str) -> list[dict[str, str]]:
    """ShareGPT's turns: human="...", gpt="..."; a digit behind a name lets it speak again."""
    return [{"from": name.rstrip("0123456789"), "value": text} for name, text in by.items()]


def messages(**by: str) -> list[dict[str, str]]:
    """OpenAI's turns, as `said` takes them."""
    return [{"role": name.rstrip("0123456789"), "content": text} for name, text in by.items()]


HH = "\n\nHuman: How do I feed a cat?\n\nAssistant: With fish.\n\nHuman: Which?\n\nAssistant: Any, it likes all."
HH_REJECTED = HH.replace("Any, it likes all.", "No idea.")
GUANACO = "### Human: Name a fruit.### Assistant: Pear.### Human: Another.### Assistant: Plum."

PUBLISHED = (
    Published(
        "alpaca",
        {"instruction": "Add the numbers.", "input": "1, 2", "output": "3", "text": "Below is an instruction ..."},
        "alpaca", ("Add the numbers.\n\n1, 2",), ("3",),
    ),
    Published(
        "alpaca-clean", {"output": "Pear.", "input": "", "instruction": "Name a fruit."},
        "alpaca", ("Name a fruit.",), ("Pear.",),
    ),
    Published(
        "chip2", {"text": "<human>: Name a fruit.\n<bot>: Pear.\nOr plum.", "metadata": {"source": "unified_chip2"}},
        "transcript", ("Name a fruit.",), ("Pear.\nOr plum.",),
    ),
    Published(
        "OIG, several turns", {"text": "<human>: Hi.\n<bot>: Hello.\n<human>: Bye.\n<bot>: Farewell."},
        "transcript", ("Hi.", "Bye."), ("Hello.", "Farewell."),
    ),
    Published(
        "self-instruct", {"prompt": "Name a fruit.\nOutput:", "completion": " Pear."},
        "input-output", ("Name a fruit.\nOutput:",), (" Pear.",),
    ),
    Published(
        "self-instruct, human_eval",
        {"id": "u0", "motivation_app": "Mail", "instruction": "Shorten.",
         "instances": [{"input": "a b", "output": "a"}]},
        "self-instruct", ("Shorten.\n\na b",), ("a",),
    ),
    Published(
        "hh-rlhf", {"chosen": HH, "rejected": HH_REJECTED},
        "preference", ("How do I feed a cat?", "Which?"), ("With fish.", "Any, it likes all."),
    ),
    Published(
        "hh-rlhf with its prompt apart (Dahoas)",
        {"prompt": "\n\nHuman: Which?\n\nAssistant:", "response": " Any.", "chosen": " Any.", "rejected": " No idea."},
        "preference", ("Which?",), (" Any.",),
    ),
    Published(
        "longform", {"input": "Write about cats.", "output": "Cats eat fish.", "source": "C4", "subset": "c4"},
        "input-output", ("Write about cats.",), ("Cats eat fish.",),
    ),
    Published("oasst1", {"text": GUANACO}, "text", (), (GUANACO,)),
    Published(
        "vicuna", {"id": "x_0", "conversations": said(human="Hi.", gpt="Hello.", human2="Bye.", gpt2="Farewell.")},
        "sharegpt", ("Hi.", "Bye."), ("Hello.", "Farewell."),
    ),
    Published(
        "vicuna, cut before an answer",
        {"id": "x_1", "conversations": said(gpt="And so.", human="Bye.", gpt2="Farewell.")},
        "sharegpt", ("Bye.",), ("Farewell.",),
    ),
    Published(
        "evol-instruct", {"idx": "1", "conversations": said(human="Prove it.", gpt="It is so.")},
        "sharegpt", ("Prove it.",), ("It is so.",),
    ),
    Published(
        "evol-instruct, 70k", {"instruction": "Prove it.", "output": "It is so."},
        "alpaca", ("Prove it.",), ("It is so.",),
    ),
    Published(
        "dolly-15k",
        {"instruction": "Who?", "context": "Ann ate it.", "response": "Ann.", "category": "closed_qa"},
        "alpaca", ("Who?\n\nAnn ate it.",), ("Ann.",),
    ),
    Published(
        "olcc", {"conversations": said(human="你好", gpt="你好!"), "id": "1"}, "sharegpt", ("你好",), ("你好!",)
    ),
    Published(
        "belle", {"instruction": "Name a fruit.", "input": "", "output": "Pear."},
        "alpaca", ("Name a fruit.",), ("Pear.",),
    ),
    Published(
        "firefly", {"kind": "NLI", "input": "Is it so?", "target": "Yes."},
        "input-output", ("Is it so?",), ("Yes.",), Reading(columns={"output": "target"}),
    ),
    Published(
        "gsm8k", {"question": "1 + 2?", "answer": "1 + 2 = 3\n#### 3"},
        "input-output", ("1 + 2?",), ("1 + 2 = 3\n#### 3",),
    ),
    Published(
        "ultrachat_200k",
        {"prompt": "Hi.", "prompt_id": "p",
         "messages": messages(user="Hi.", assistant="Hello.", user2="Bye.", assistant2="So long.")},
        "messages", ("Hi.", "Bye."), ("Hello.", "So long."),
    ),
    Published(
        "ultrafeedback_binarized, preferences alone",
        {"prompt": "Hi.", "chosen": messages(user="Hi.", assistant="Hello."), "score_chosen": 8.0,
         "rejected": messages(user="Hi.", assistant="No."), "score_rejected": 2.0},
        "preference", ("Hi.",), ("Hello.",),
    ),
    Published(
        "TRL, preferences with a prompt of turns",
        {"prompt": messages(user="Hi.", assistant="Yes?", user2="Bye."), "chosen": messages(assistant="So long."),
         "rejected": messages(assistant="No.")},
        "preference", ("Hi.", "Yes?", "Bye."), ("So long.",),
    ),
    Published(
        "orca_dpo_pairs", {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "Because of it."},
        "preference", ("Be brief.", "Why?"), ("So.",),
    ),
    Published(
        "LLaMA-Factory, preferences",
        {"conversations": said(human="Why?"), "chosen": {"from": "gpt", "value": "So."},
         "rejected": {"from": "gpt", "value": "No."}},
        "preference", ("Why?",), ("So.",),
    ),
    Published(
        "TRL, unpaired preferences", {"prompt": "Why?", "completion": "So.", "label": True},
        "preference", ("Why?",), ("So.",),
    ),
    Published(
        "TRL, a prompt and its completion as turns",
        {"prompt": messages(user="Why?"), "completion": messages(assistant="So.")},
        "input-output", ("Why?",), ("So.",),
    ),
    Published(
        "OpenAI, with weights",
        {"messages": [*messages(user="Why?"), {"role": "assistant", "content": "No.", "weight": 0},
                      *messages(user="Again.", assistant="So.")]},
        "messages", ("Why?", "No.", "Again."), ("So.",),
    ),
    Published(
        "InternLM's exchanges", {"conversation": [{"system": "Be brief.", "input": "Why?", "output": "So."},
                                                 {"input": "Sure?", "output": "Yes."}]},
        "sharegpt", ("Be brief.", "Why?", "Sure?"), ("So.", "Yes."),
    ),
    Published(
        "a support desk's own names",
        {"ticket": {"log": [{"who": "Customer", "said": "It broke."}, {"who": "Agent", "said": "Sorry."}], "id": 7}},
        "messages", ("It broke.",), ("Sorry.",),
        Reading(columns={"messages": "ticket.log", "messages.role": "who", "messages.content": "said"},
                roles={"user": "Customer", "assistant": "Agent"}),
    ),
    Published(
        "pretraining text", {"text": "Cats eat fish.", "url": "https://a.b/c", "meta": {}},
        "text", (), ("Cats eat fish.",),
    ),
)  # fmt: skip
