"""What does the model card of an adapter or a merged model say? README.md with front matter, as the hub reads it."""

import hashlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from qdist.core.evaluation.comparison import with_intervals
from qdist.core.evaluation.results import Evaluation, Figure
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.curves import evenly
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.memory_report import memory_of, shown
from qdist.core.telemetry.report_sections import held_out_table, measured_speed, metrics_of, number, processors
from qdist.core.text import counted, format_bytes, format_count, format_duration, printable, signed

README = "README.md"
Of = Literal["adapter", "merged"]
_MARK = re.compile(r"<!-- Written by qdist, which replaces it while it is as written: ([0-9a-f]{64}) -->\n\Z")
_MOST_ROWS = 8
"""Most rows of the table of losses."""
_SOFTWARE = ("qdist", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")


class Card(NamedTuple):
    """What a card is made of."""

    name: str
    """The run's own name, without its folder."""
    plan: Plan
    fold: RunHistory
    of: Of = "adapter"
    step: int | None = None
    """Of the checkpoint that was gathered; None for the last."""
    result: Mapping[str, Any] | None = None
    base: str = ""
    """Hub id of the base; empty where it is not from the hub."""
    license: str = ""
    """Of the base, as its own card has it; empty if it does not say."""
    data_sets: tuple[str, ...] = ()
    """Hub ids among the data."""
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = {}
    evaluations: tuple[Evaluation, ...] = ()
    merged: str = ""
    """How it was merged, as a sentence."""


def card_text(card: Card) -> str:
    """The card, with a mark by which it is known as long as nobody has changed it."""
    parts = (_front_matter(card), _opening(card), _use(card), _training(card), _losses(card), _evaluations(card))
    sections = [*parts, _figures(card), _again(card)]
    text = printable("\n\n".join("\n".join(own) for lines in sections if (own := list(lines)))) + "\n"
    return f"{text}\n<!-- Written by qdist, which replaces it while it is as written: {_digest(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as it was written: what a person has changed is theirs."""
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()].removesuffix("\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def license_of(text: str) -> str:
    """The license in another card's front matter; empty if it has none."""
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


def without_folders(command: str) -> str:
    """A command, or a path, with the names of files and folders instead of their places on someone's machine."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join(_name_of(word) for word in words)


def _name_of(text: str) -> str:
    """'/home/me/data.jsonl' -> 'data.jsonl', behind `=`, commas, colons, brackets and quotation marks too."""
    return re.sub(r"(?<![^=,:\[\]()'\" ])(?:~[^/,=:]*/|\.\.?/|/)(?:[^/,=:]*/)*(?=[^/,=:])", "", text)


def _base_name(card: Card) -> str:
    return card.base or _name_of(card.plan.spec.model.rstrip("/"))


def _front_matter(card: Card) -> Iterator[str]:
    """YAML, whose texts are JSON's."""
    spec = card.plan.spec
    tags = ["qdist", spec.method, "lora", *([] if card.of == "merged" else [f"{spec.bits}-bit"])]
    fields: dict[str, Any] = {
        "base_model": card.base,
        "base_model_relation": "" if not card.base else "adapter" if card.of == "adapter" else "finetune",
        "library_name": "peft" if card.of == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "license": card.license,
        "datasets": list(card.data_sets),
        "tags": list(dict.fromkeys(tags)),
    }
    yield "---"
    for key, value in fields.items():
        if value:
            yield f"{key}: {msgspec.json.encode(value).decode()}"
    yield "---"


def _opening(card: Card) -> Iterator[str]:
    plan, spec, base = card.plan, card.plan.spec, _base_name(card)
    packed = spec.quant.type if spec.method == "qlora" and spec.bits == 4 else "GPTQ" if plan.source.gptq else ""
    width = f"{spec.bits} bits{f' ({packed})' if packed else ''}"
    yield f"# {_cell(card.name)}"
    yield ""
    if card.of == "merged":
        yield f"{_cell(base)} with what was learned merged into its weights. {card.merged}".strip()
    else:
        yield f"A {plan.adapter.title} adapter ({spec.lora}) for {_cell(base)}."
    yield f"It was trained with {spec.method} over a frozen backbone of {width}, by qdist."
    if card.step is not None and card.step < plan.steps:
        yield f"It is the checkpoint of step {card.step:,} of {plan.steps:,}."


def _use(card: Card) -> Iterator[str]:
    base, plan = card.base or "PATH OF THE BASE", card.plan
    yield "## Use"
    yield ""
    yield "```python"
    if card.of == "merged":
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        yield 'model = AutoModelForCausalLM.from_pretrained("THIS REPOSITORY OR FOLDER", device_map="auto")'
    else:
        yield "from peft import PeftModel"
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        yield f'model = AutoModelForCausalLM.from_pretrained("{base}", device_map="auto")'
        if plan.source.vocab_rows is not None:
            yield f"model.resize_token_embeddings({plan.source.vocab_rows})"
        yield 'model = PeftModel.from_pretrained(model, "THIS REPOSITORY OR FOLDER")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("THIS REPOSITORY OR FOLDER")'
    yield "```"


def _training(card: Card) -> Iterator[str]:
    plan, spec, fold = card.plan, card.plan.spec, card.fold
    optim = spec.optim
    unit = "CPU process" if plan.device == "cpu" else "GPU"
    where = counted(processors(plan), unit, "es" if plan.device == "cpu" else "s")
    yield from _table(
        "Training",
        ("", ""),
        [
            ("Base", f"{_base_name(card)}, {format_count(plan.facts.parameters)} parameters"),
            ("Data", _data(card)),
            ("Adapter", f"{spec.lora} on {', '.join(spec.lora.targets)}, dropout {spec.lora.dropout:g}"),
            ("Batch", f"{spec.batch} samples a step, of {plan.seq_len:,} tokens at most"),
            ("Steps", f"{fold.step or plan.steps:,}"),
            (
                "Optimizer",
                f"{plan.optimizer}, learning rate {optim.lr:g}, {optim.schedule}, warmup {optim.warmup_steps}",
            ),
            ("Arithmetic", plan.compute_dtype + (f", products in {spec.compute}" if spec.compute else "")),
            ("Layout", f"{plan.placement}, {counted(plan.groups, 'group')} of {plan.gpus_per_group} on {where}"),
            ("Seed", str(spec.seed)),
            ("Software", ", ".join(f"{name} {card.versions[name]}" for name in _SOFTWARE if name in card.versions)),
        ],
    )


def _data(card: Card) -> str:
    data, path = card.plan.data, card.plan.spec.data.path
    if data is None:
        return "random tokens"
    names = ", ".join(_name_of(part.strip()) for part in path.split(","))
    samples = f"{data.train_samples:,} samples and {data.held_out_samples:,} held out, {data.tokens:,} tokens"
    return f"{names}: {samples}" + (f" ({data.wording})" if data.wording else "")


def _losses(card: Card) -> Iterator[str]:
    """The losses of some steps, and on what was held out."""
    columns, table = card.fold.columns, held_out_table(card.fold)
    held_out = dict(zip((row[0] for row in table.rows), table.rows, strict=True))
    steps = [columns.step[index] for index in evenly(range(len(columns)), _MOST_ROWS)]
    chosen = [table.rows[index][0] for index in evenly(range(len(table.rows)), _MOST_ROWS)]
    losses = {f"{step:,}": loss for step, loss in zip(columns.step, columns.loss, strict=True)}
    names = sorted({*(f"{step:,}" for step in steps), *chosen}, key=lambda name: int(name.replace(",", "")))
    tasks = [_task_name(task) for task in table.headers[3:-1]]
    missing = ("-",) * (2 + len(tasks)) + ("",)
    rows = [(name, number(losses.get(name, math.nan)), *held_out.get(name, ("", *missing))[1:]) for name in names]
    yield from _table("Loss", ("step", "training loss", "held-out loss", "perplexity", *tasks, ""), rows)


def _evaluations(card: Card) -> Iterator[str]:
    """The last figures of each task, of each model that it was measured of."""
    last: dict[tuple[str, str, str], tuple[Figure, Mapping[str, Any]]] = {}
    for evaluation in card.evaluations:
        for result in map(with_intervals, evaluation.results):
            for figure in result.figures:
                last[_task_name(result.task), figure.name, evaluation.what] = figure, result.settings
    rows = [
        (task, name, what, number(figure.value), _interval(figure), f"{figure.count:,}", _stated(settings))
        for (task, name, what), (figure, settings) in last.items()
    ]
    yield from _table("Evaluation", ("task", "figure", "of", "value", "95 % interval", "count", "settings"), rows)


def _task_name(task: str) -> str:
    """'mmlu:/data/mmlu.jsonl' -> 'mmlu:mmlu.jsonl'."""
    kind, colon, argument = task.partition(":")
    return kind + colon + _name_of(argument)


def _interval(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"{number(figure.low)} to {number(figure.high)}"


def _stated(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_name_of(str(value))}" for name, value in settings.items())


def _figures(card: Card) -> Iterator[str]:
    """Memory and speed, predicted and measured."""
    plan = card.plan
    parts = memory_of(plan, card.fold, card.result)
    known = metrics_of(plan, card.fold, parts, card.result)
    speed = measured_speed(card.fold, card.result)
    rows = [
        (f"Peak memory, {own.label}", format_bytes(own.predicted_bytes), format_bytes(own.measured_bytes),
         signed(own.predicted_bytes / own.measured_bytes - 1))
        for own in shown(parts) if own.measured_bytes
    ]  # fmt: skip
    if speed:
        predicted = plan.tokens_per_second
        off = signed(predicted / speed - 1) if predicted else ""
        rows.append(("Tokens/s", format_count(predicted) if predicted else "-", format_count(speed), off))
    if "duration_s" in known:
        rows.append(("Duration", "", format_duration(known["duration_s"]), ""))
    yield from _table("Memory and speed", ("", "predicted", "measured", "prediction against measurement"), rows)


def _again(card: Card) -> Iterator[str]:
    commands = [found for each in card.commands if (found := _as_typed(each))]
    if commands:
        yield "## Command"
        yield ""
        yield "```"
        yield from commands
        yield "```"


def _as_typed(command: str) -> str:
    """A recorded launch, whatever file the program was started from."""
    words = without_folders(command).partition(" ")[2]
    return f"qdist {words}" if words else ""


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A section with a table; nothing without rows. Rows of a label without a value are left out."""
    told = [row for row in rows if any(row[1:])]
    if told:
        yield f"## {title}"
        yield ""
        yield f"| {' | '.join(headers)} |"
        yield f"|{'---|' * len(headers)}"
        yield from (f"| {' | '.join(map(_cell, row))} |" for row in told)


def _cell(text: str) -> str:
    """Text within a line of Markdown."""
    return re.sub(r"([|<>`])", r"\\\1", text.replace("\n", " "))
