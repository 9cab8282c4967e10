"""What the readers of data files share: records in their places, and the names that tell them."""

from qdist.core.errors import DataError

Record = dict[str, object]
Located = tuple[str, Record | DataError]
"""'file.jsonl:17' or 'file.json, record 3', and the record there or what is wrong with it."""

FIELDS = frozenset((
    "messages", "conversations", "conversation", "instances", "instruction", "input", "output", "prompt", "completion",
    "question", "answer", "response", "text",
))  # fmt: skip
"""Names that a record, or the header of a table, is known by where the suffix of the file says nothing."""
