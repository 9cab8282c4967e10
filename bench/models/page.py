"""docs/models.md from the results of bench/models/table.py."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_HEAD = """# Models

Every model type of transformers {version}'s causal language models, and two wrappers around such models, tried by
`python -m bench.models.table --results FILE --write docs/models.md`: a tiny random model of its own class on one CPU
rank is planned, packed to NF4, trained for 3 steps (experts too, where it has them) and merged to 16 bits. The merged
folder's logits in plain transformers are then compared with those of the dequantized weights under the adapter that
plain PEFT loads.

{worked} of the {tried} types that can be fine-tuned as causal language models pass all of it ({share:.0f} %).

| model type | layers | experts | logits differ by | |
|---|---|---|---|---|
"""
_APART = """
## Not causal language models, or without a linear to adapt

| model type | reason |
|---|---|
"""


def page(results: Mapping[str, Mapping[str, Any]], *, version: str) -> str:
    """The page. results: the newest result of each type, by type. version: of transformers."""
    apart = {key: result for key, result in results.items() if result.get("apart")}
    tried = {key: result for key, result in results.items() if key not in apart}
    worked = sum(not result["failed"] for result in tried.values())
    head = _HEAD.format(version=version, worked=worked, tried=len(tried), share=100 * worked / max(1, len(tried)))
    rows = [_row(tried[key]) for key in sorted(tried)]
    return head + _lines(rows) + _APART + _lines(f"| {key} | {_cell(apart[key]['reason'])} |" for key in sorted(apart))


def _row(result: Mapping[str, Any]) -> str:
    experts = {True: "yes", False: ""}.get(result.get("experts", ""), "")
    if not result["failed"]:
        return f"| {result['type']} | {result['layers']} | {experts} | {result['difference']:.1g} | |"
    return f"| {result['type']} | | {experts} | | {result['failed']}: {_cell(result['reason'])} |"


def _cell(text: str) -> str:
    """The sentence of an error, without its class, the way out and the place of a passing model."""
    sentence = re.sub(r"^\w+Error: +|\s+try: .*| \[.*\]$", "", text.replace("\n", " "))
    return re.sub(r"/\S+/base", "the model", sentence).replace("|", "/")[:240]


def _lines(rows: Iterable[str]) -> str:
    return "".join(f"{row}\n" for row in rows)
