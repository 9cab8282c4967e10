"""Which request do the flags of a command make, those of one struct or of several?"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from qdist.core.errors import SpecError, flag_of, nearest
from qdist.core.model.gptq import BITS, usual_format
from qdist.core.requests import Chat, Generate, GptqSettings, Kind, MakeGptq, Pack
from qdist.core.sampling import Sampling
from qdist.core.spec.keys import choices, is_texts
from qdist.core.spec.suggest import not_among, of_another_kind
from qdist.core.text import quoted

Sampled = TypeVar("Sampled", Generate, Chat)


def request_of(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """A request of what was typed, by the names of its flags: text becomes numbers, what is None is left out.

    Raises SpecError naming the flag, what is wrong with its value, and one that is right.
    """
    lists = [field.encode_name for field in msgspec.structs.fields(kind) if isinstance(field.default, tuple)]
    stated = {
        name: value.split(",") if name in lists and isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    try:
        return msgspec.convert(stated, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _value_error(kind, str(error), given) from None


def _value_error(kind: type[msgspec.Struct], message: str, given: Mapping[str, Any]) -> SpecError:
    """msgspec's 'Expected ... - at `$.samples`' with the value that was given and one to try."""
    reason, _, where = message.partition(" - at `$.")
    name = where.rstrip("`").partition("[")[0]
    if name not in given:
        return SpecError(f"{kind.__name__}: {message[:1].lower()}{message[1:]}")
    field = next(field for field in msgspec.structs.fields(kind) if field.encode_name == name)
    usual = None if field.default in (msgspec.NODEFAULT, ()) else field.default
    if is_texts(kind, name):
        return SpecError(f"{flag_of(name)}: {reason[:1].lower()}{reason[1:]}", try_="fewer of them")
    if isinstance(field.default, tuple):
        return SpecError(f"{name} cannot be {given[name]!r}", try_="numbers with commas between, such as 0.7,0.3")
    if among := choices(kind, name):
        error = not_among(name, given[name], among, "" if usual is None else str(usual))
    else:
        error = of_another_kind(name, given[name], reason, {} if usual is None else {name: usual})
    try_ = quoted(flag_of(name), *error.ways[0].values()) if error.ways else f"another {flag_of(name)}"
    return SpecError(error.message, try_=try_)


def usual_sampling(kind: type[Generate] | type[Chat]) -> Sampling:
    """What chooses tokens where no flag says otherwise."""
    usual = next(field.default for field in msgspec.structs.fields(kind) if field.name == "sampling")
    assert isinstance(usual, Sampling)
    return usual


def sampled_request_of(kind: type[Sampled], given: Mapping[str, Any]) -> Sampled:
    """The request of `qdist generate` or `qdist chat`, of its flags, those of `Sampling` among them.

    Raises SpecError as `request_of` does, also for flags that contradict each other or would change nothing.
    """
    own = {field.encode_name for field in msgspec.structs.fields(Sampling)}
    chosen = {name: value for name, value in given.items() if name in own and value is not None}
    if stops := chosen.get("stop"):
        if "" in stops:
            raise SpecError("--stop '' has no text to stop at", try_=r"--stop '\n' for the end of a line")
        chosen["stop"] = tuple(map(unescaped, stops))
    sampling = resampled(usual_sampling(kind), chosen)
    if sampling.is_greedy and (idle := [flag_of(name) for name in _OF_DRAWING if name in chosen]):
        raise SpecError(
            f"{', '.join(idle)} would change nothing: at temperature 0 the likeliest token is taken",
            try_="--temperature 0.7",
        )
    rest = {name: value for name, value in given.items() if name not in own}
    found = request_of(kind, {**rest, "sampling": sampling})
    if isinstance(found, Generate):
        _require_answers(found)
    elif found.compare and found.engine == "llama.cpp":
        raise SpecError(
            "--compare asks the base too, and llama.cpp has the adapter merged into it", try_="--engine qdist"
        )
    return found


def _require_answers(request: Generate) -> None:
    """Raise SpecError for numbers of beams and of answers that contradict other flags."""
    count, beams, greedy = request.n, request.beams, request.sampling.is_greedy
    if beams > 1 and not greedy:
        raise SpecError(f"--beams {beams} looks for the likeliest answer, and --temperature draws", try_="one of them")
    if beams > 1 and request.engine == "llama.cpp":
        raise SpecError(f"--beams are transformers', not --engine {request.engine}'s", try_="--engine auto")
    if beams > 1 and count > 1:
        raise SpecError(
            f"--beams {beams} looks for the one likeliest answer, and --n {count} asks for {count}",
            try_="one of them, --n with --temperature 0.7",
        )
    if count > 1 and greedy:
        raise SpecError(
            f"--n {count}: without a temperature all {count} answers of a prompt are the same",
            try_="--temperature 0.7",
        )


_OF_DRAWING = ("top_p", "top_k", "min_p", "seed")
"""Settings that change nothing where the likeliest token is taken."""


def unescaped(typed: str) -> str:
    r"""A text to stop at, of what was typed on one line: `\n` is the end of a line, `\t` a tab."""
    return typed.replace("\\n", "\n").replace("\\t", "\t")


def resampled(sampling: Sampling, changes: Mapping[str, Any]) -> Sampling:
    """Sampling settings with some of them changed, to what was typed. Raises SpecError as `request_of` does."""
    return request_of(Sampling, {**msgspec.structs.asdict(sampling), **changes})


METHODS = ("nf4", "fp4", "int8", "gptq")
"""Methods that `quantization_of` accepts."""


def quantization_of(method: str, given: Mapping[str, Any]) -> Pack | MakeGptq:
    """The request of `qdist quantize`, of its flags. Raises SpecError, also for flags of another method."""
    if method not in METHODS:
        raise SpecError(
            f"method cannot be {method!r}: it is one of {', '.join(METHODS)}",
            try_=f"--method {nearest(method, METHODS) or METHODS[0]}",
        )
    stated = {name: value for name, value in given.items() if value is not None}
    of_gptq = (*(field.name for field in msgspec.structs.fields(GptqSettings)), "candidate_bits")
    own = {"model", "out", *(of_gptq if method == "gptq" else _OF_PACK)}
    if foreign := [flag_of(name) for name in stated if name not in own]:
        owner = "nf4, fp4 and int8" if method == "gptq" else "gptq"
        raise SpecError(f"{', '.join(foreign)}: {owner} alone, not {method}", try_="leave it out")
    if method != "gptq":
        return request_of(Pack, {**stated, "method": method})
    model, out, mixed = stated.pop("model"), stated.pop("out"), stated.pop("candidate_bits", None)
    widths = _widths(mixed, stated)
    layout = {"format": usual_format(sym=stated.get("sym", True), widths=widths), **stated, "bits": widths}
    return MakeGptq(model=model, out=out, settings=request_of(GptqSettings, layout))


_OF_PACK = ("double", "dtype", "trust_remote_code")


def _widths(mixed: str | None, given: Mapping[str, Any]) -> Collection[int]:
    """The widths to try, narrowest first. mixed: `--candidate-bits` as it was typed."""
    if mixed and "bits" in given:
        raise SpecError("--bits and --candidate-bits both say how wide weights are", try_="one of them")
    if bool(mixed) != ("max_error" in given):
        raise SpecError("--candidate-bits and --max-error go together", try_="--candidate-bits 2,3,4 --max-error 0.05")
    stated = mixed.split(",") if mixed else [str(given.get("bits", 4))]
    if wrong := [width for width in stated if width.strip() not in map(str, BITS)]:
        flag = "--candidate-bits 2,3,4" if mixed else "--bits 4"
        raise SpecError(f"bits cannot be {wrong[0]}: GPTQ has 2, 3, 4 or 8", try_=flag)
    return sorted({int(width) for width in stated})
