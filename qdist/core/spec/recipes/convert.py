"""What does another program's recipe come to here, and which of its keys are not honoured?"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from qdist.core.errors import SpecError, nearest
from qdist.core.spec.keys import known_keys
from qdist.core.spec.recipe import toml_value
from qdist.core.spec.recipes import axolotl, llama_factory, trl
from qdist.core.spec.recipes.rules import (
    ACCUMULATION,
    EVALS,
    MICRO,
    SAVES,
    STAGE,
    WARMUP_SHARE,
    Kind,
    Outcome,
    Remark,
    Rule,
    Values,
)
from qdist.core.spec.run_spec import RunSpec, flatten, nest, resolve
from qdist.core.text import counted, first_few, printable, quoted

ProgramName = Literal["axolotl", "llama-factory", "trl"]
_MOST_WARMUP = 100
"""Most steps of the warmup that Axolotl chooses."""


class Given(NamedTuple):
    """A key's value in a recipe, and where it is."""

    value: Any
    line: int


class Program(NamedTuple):
    """A program whose recipes are read."""

    title: str
    signs: frozenset[str]
    defaults: Values
    table: Mapping[str, Rule]
    refusal: Callable[[Values], str]
    """(recipe) -> why it is for another kind of training; empty if it is not."""


PROGRAMS: Mapping[str, Program] = {
    name: Program(title, own.SIGNS, own.DEFAULTS, own.TABLE, own.refusal)
    for name, title, own in (
        ("axolotl", "Axolotl", axolotl), ("llama-factory", "LLaMA-Factory", llama_factory), ("trl", "TRL", trl),
    )
}  # fmt: skip
_RIVALS = {
    "warmup_ratio": ("warmup_steps",), "max_length": ("max_seq_length",),
    "lora_target_modules": ("lora_target_linear",),
    "num_epochs": ("max_steps",), "num_train_epochs": ("max_steps",), "eval_strategy": ("evaluation_strategy",),
    "gradient_accumulation_steps": ("batch_size",), "assistant_only_loss": ("completion_only_loss",),
}  # fmt: skip
"""Keys whose default is void where another is given."""


class Said(NamedTuple):
    """What is not honoured of a key, or not as it was."""

    key: str
    line: int
    """0 for what the program takes by default."""
    kind: Kind
    why: str

    def __str__(self) -> str:
        where = f"line {self.line}, {self.key}" if self.line else f"{self.key}, by default"
        return printable(f"{where}: {self.why}".replace("\n", " "))


class Converted(NamedTuple):
    """A recipe as settings of ours."""

    name: str
    """The file's."""
    title: str
    """The program's."""
    settings: Mapping[str, Any]
    """By dotted key."""
    origins: Mapping[str, str]
    """Which key each is from."""
    said: tuple[Said, ...]

    def of(self, kind: Kind) -> tuple[Said, ...]:
        """What was said of one kind."""
        return tuple(each for each in self.said if each.kind == kind)


def program_of(recipe: Mapping[str, Given], *, name: str) -> ProgramName:
    """The program that a recipe is of, by its keys. Raises SpecError where that is open."""
    scores = {program: len(own.signs & recipe.keys()) for program, own in PROGRAMS.items()}
    best = max(scores.values())
    found = [program for program, score in scores.items() if score == best]
    if not best or len(found) > 1:
        why = f"as many keys of {' as of '.join(found)}" if best else f"none of the keys of {', '.join(PROGRAMS)}"
        raise SpecError(f"{name} has {why}", try_=quoted("--from", found[0]))
    return next(program for program in ("axolotl", "llama-factory", "trl") if program == found[0])


def convert(
    recipe: Mapping[str, Given],
    program: ProgramName,
    *,
    name: str,
    gpus: int | None = None,
    steps: int | None = None,
    beside: Values | None = None,
) -> Converted:
    """A recipe as settings that agree with each other.

    name: of the file, for messages. gpus: on which it ran, each with a batch of its own. steps: of the run, where the
    recipe counts epochs. beside: what else its values depend on, such as LLaMA-Factory's list of data sets.
    Raises SpecError for another kind of training, and for values that mean nothing.
    """
    own = PROGRAMS[program]
    stated = {key: each for key, each in recipe.items() if each.value is not None}
    taken = {key: value for key, value in own.defaults.items() if _is_open(key, stated)}
    values = {**taken, **{key: each.value for key, each in stated.items()}, **(beside or {})}
    if why := own.refusal(values):
        raise SpecError(f"{name} is not a recipe for quantized LoRA: {why}", try_="a recipe for LoRA or QLoRA")
    draft = _Draft(own.title, name)
    for key, value in taken.items():
        draft.add(key, 0, _outcome(own, key, value, values, name, 0))
    for key, each in stated.items():
        draft.add(key, each.line, _outcome(own, key, each.value, values, name, each.line))
    draft.finish(gpus=gpus, steps=steps)
    done = draft.done()
    try:
        spec = flatten(resolve(nest(done.settings)))
    except SpecError as error:
        origins = [origin for setting, origin in done.origins.items() if setting in error.message]
        raise SpecError(
            f"{name}: {error.message}", try_=f"another value of {' or of '.join(origins)}" if origins else ""
        ) from error
    return done._replace(settings={key: spec[key] for key in done.settings})


def _is_open(key: str, stated: Mapping[str, Given]) -> bool:
    return key not in stated and not any(rival in stated for rival in _RIVALS.get(key, ()))


def _outcome(own: Program, key: str, value: Any, values: Values, name: str, line: int) -> Outcome:
    rule = own.table.get(key)
    if rule is None:
        near = nearest(key, own.table)
        why = f"no key of {own.title} that qdist knows" + (f"; {near} is one" if near else "")
        return Outcome(remarks=(Remark("lost", why),))
    try:
        return rule.how(value, values)
    except SpecError as error:
        raise SpecError(f"{name}, line {line}, {key}: {error.message}", try_=error.try_) from error


class _Draft:
    """Settings while they are put together."""

    def __init__(self, title: str, name: str) -> None:
        self.title, self.name = title, name
        self.settings: dict[str, Any] = {}
        self.origins: dict[str, tuple[str, int]] = {}
        self.said: list[Said] = []

    def add(self, key: str, line: int, outcome: Outcome) -> None:
        """Take in what a key came to; lists of the same setting are joined."""
        for setting, value in outcome.settings.items():
            before = self.settings.get(setting)
            both = isinstance(before, list) and isinstance(value, list) and setting in ("trackers", "new_tokens")
            self.settings[setting] = list(dict.fromkeys([*before, *value])) if both and before else value
            self.origins[setting] = key, line
        self.said += [Said(key, line, remark.kind, remark.why) for remark in outcome.remarks]

    def finish(self, *, gpus: int | None, steps: int | None) -> None:
        """Make settings of what takes several keys, and drop what others make void."""
        if gpus is not None:
            self.settings["gpus"], self.origins["gpus"] = gpus, ("--gpus", 0)
        self._batch(gpus or 1)
        self._share(steps)
        self._stage(gpus or 1)
        if "steps" in self.settings:
            self._drop("epochs", "max_steps counts")
        if self.settings.get("bits", 4) != 4 or self.settings.get("method", "qlora") != "qlora":
            for setting in ("quant.type", "quant.double"):
                self._drop(setting, "a setting of 4-bit backbones")
        if self.settings.get("optim.name") == "adamw-8bit":
            self._drop("zero.stage", "moments in 8 bits are whole on each GPU")
        if self.settings.get("data.eval"):
            self._drop("train.held_out", "records to evaluate on are given")
        elif not self.settings.get("train.held_out"):
            self._drop("train.eval_steps", "nothing is held out to evaluate on")

    def done(self) -> Converted:
        """The settings, without theirs that are ours by default too."""
        usual = flatten(RunSpec())
        kept = {
            key: value
            for key, value in self.settings.items()
            if key in usual and (self.origins[key][1] or value != usual[key])
        }
        origins = {key: self._origin(*self.origins[key]) for key in kept}
        return Converted(self.name, self.title, kept, origins, tuple(sorted(self.said, key=lambda each: each.line)))

    def _origin(self, key: str, line: int) -> str:
        return f"{key}, line {line}" if line else key if key.startswith("--") else f"the default of {self.title}"

    def _drop(self, setting: str, why: str) -> None:
        if setting in self.settings:
            del self.settings[setting]
            key, line = self.origins.pop(setting)
            if line:
                self.said.append(Said(key, line, "anyhow", why))

    def _batch(self, gpus: int) -> None:
        micro, key = self.settings.pop(MICRO, None), self.origins.pop(MICRO, None)
        count = self.settings.pop(ACCUMULATION, 1)
        if micro is not None and key is not None:
            self.settings["global_batch"] = micro * count * gpus
            self.origins["global_batch"] = key
            why = f"{micro} x {count} accumulated x {counted(gpus, 'GPU')} is global_batch; the planner divides it"
            self.said.append(Said(*key, "anyhow", why))

    def _share(self, steps: int | None) -> None:
        """Shares of the steps, and times an epoch, as steps."""
        share, warmup = self.settings.pop(WARMUP_SHARE, None), self.origins.pop(WARMUP_SHARE, None)
        total = self.settings.get("steps") or steps
        if share is not None and warmup is not None and total:
            count = math.ceil(share * int(total))
            # Axolotl alone warms up by default.
            self.settings["optim.warmup_steps"] = count if warmup[1] else min(count, _MOST_WARMUP)
            self.origins["optim.warmup_steps"] = warmup
        elif share is not None and warmup is not None:
            why = f"{share:g} of the steps, and optim.warmup_steps counts them: --steps N says how many there are"
            self.said.append(Said(*warmup, "lost", why))
        for times, setting in ((EVALS, "train.eval_steps"), (SAVES, "train.save_steps")):
            often, key = self.settings.pop(times, None), self.origins.pop(times, None)
            if often and key and steps:
                epochs = float(self.settings.get("epochs", 1))
                self.settings[setting] = max(1, round(steps / epochs / often))
                self.origins[setting] = key
            elif often and key:
                self.said.append(
                    Said(*key, "anyhow", f"times an epoch, and {setting} counts steps: --steps N says how many")
                )

    def _stage(self, gpus: int) -> None:
        stage, key = self.settings.pop(STAGE, None), self.origins.pop(STAGE, None)
        if not stage or key is None:
            return
        if gpus == 1:
            self.said.append(Said(*key, "anyhow", "one GPU shares nothing; --gpus N says how many there are"))
            return
        setting, value = ("placement", "shard") if stage == 3 else ("zero.stage", stage)
        self.settings[setting], self.origins[setting] = value, key


def to_text(found: Converted) -> str:
    """The recipe as TOML, each setting with the key that it is from, and all that is not honoured in comments."""
    head = f"# From {found.name}, a recipe of {found.title}, by `qdist convert recipe`."
    return "\n".join([printable(head.replace("\n", " ")), *_settings_of(found), *_remarks_of(found)]) + "\n"


def _settings_of(found: Converted) -> Iterator[str]:
    sections = [""] + [key for key, kind in known_keys(RunSpec).items() if kind is not None]
    for section in sections:
        own = [key for key in known_keys(RunSpec) if key in found.settings and key.rpartition(".")[0] == section]
        if own:
            yield ""
            yield from ([f"[{section}]"] if section else [])
            for key in own:
                yield f"{key.rpartition('.')[2]} = {toml_value(found.settings[key])}  # {printable(found.origins[key])}"


def _remarks_of(found: Converted) -> Iterator[str]:
    titles: tuple[tuple[Kind, str], ...] = (
        ("lost", "Not honoured, so that training differs:"),
        ("altered", "With another meaning:"),
        ("anyhow", "Without a setting, and without effect on what is learned:"),
    )
    for kind, title in titles:
        if said := found.of(kind):
            yield f"\n# {title}"
            yield from (f"#   {each}" for each in said)


def require_honoured(found: Converted) -> None:
    """Raise SpecError if training would differ from what the recipe asks for."""
    if said := found.of("lost"):
        keys = first_few([each.key for each in said])
        only_steps = all("--steps N" in each.why for each in said)
        raise SpecError(
            f"{found.name}: {counted(len(said), 'key')} that training depends on cannot be honoured: {keys}",
            try_="--steps N, the optimizer steps of the run" if only_steps else "--lossy, which leaves them out",
        )
