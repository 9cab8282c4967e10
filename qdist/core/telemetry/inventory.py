"""What does a run train on? Bytes by precision, linears and experts adapted, tokens with a loss; and when it may not.

Each rank counts the modules that it holds (`Part`); they are summed over the ranks that hold one backbone, printed
before step 1, and kept in result.json.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from qdist.core.errors import DataError, ModelError
from qdist.core.model.shapes import ALL_LINEAR, EXPERTS, MOST_UNPACKED
from qdist.core.telemetry.kernels import Kernels
from qdist.core.text import counted, first_few, format_bytes

UNPACKED = "not packed"
"""Reason of a decoder layer's linear or expert that is in 16 bits for no other: the run is refused for such ones."""
BIASES, NORMS, EMBEDDINGS, POSITIONS, HEAD = "biases", "norms", "embeddings", "positions", "head"
STORED = "stored so in the checkpoint"
OTHER = "other parameters"

Kind = Literal["linear", "expert", "other"]


class Module(NamedTuple):
    """A module, or a parameter of experts, as one rank holds it."""

    path: str
    """Path in transformers' class."""
    kind: Kind
    """linear, expert: one of those of the model's facts."""
    bits: int
    """Bits of a weight."""
    packing: str = ""
    """nf4, int8, gptq and so on; empty if it is not packed."""
    reason: str = ""
    """Why it is not packed; empty for what is, and where 16 bits were asked for."""
    own_bytes: int = 0
    """Bytes of this rank's shard of sharded parameters."""
    whole_bytes: int = 0
    """Bytes of parameters that are whole on this rank."""
    is_targeted: bool = False
    """Whether the run's targets name it."""
    is_adapted: bool = False


class Part(NamedTuple):
    """What a rank holds of a backbone."""

    modules: tuple[Module, ...]
    missing: tuple[str, ...] = ()
    """Linears and experts of this rank's layers that the plan counts, and the model does not have, in words."""
    kernels: Kernels = Kernels()


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Modules that are held alike, all ranks of a group together."""

    bits: int
    packing: str = ""
    reason: str = ""
    modules: int
    bytes: int


class Adapted(msgspec.Struct, frozen=True, kw_only=True):
    """Modules with an adapter, out of those in decoder layers that could have one."""

    linears: int
    of_linears: int
    experts: int
    """3-D parameters, each of one matrix an expert."""
    of_experts: int


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of a run, and their tokens with a loss."""

    samples: int
    tokens: int
    learned_tokens: int
    records: int
    none: int
    """Records without a learned token, which were left out."""
    whole: int | None = None
    """Records of which every token is learned; None if not counted."""


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What a run trains on, as counted before its first step."""

    bits: int
    """Bits of a weight that were asked for."""
    held: tuple[Held, ...]
    """Fewest bits first, most bytes first."""
    unpacked: tuple[str, ...] = ()
    """Paths of linears and experts that are in 16 bits without a reason."""
    adapted: Adapted
    data: Learned
    kernels: tuple[str, ...] = ()
    """Which kernels run, such as 'attention sdpa'."""

    @property
    def unpacked_share(self) -> float:
        """Share of the bytes of linears and experts that is in 16 bits without a reason."""
        counted = sum(held.bytes for held in self.held if held.packing or held.reason == UNPACKED)
        return sum(held.bytes for held in self.held if held.reason == UNPACKED) / counted if counted else 0.0


def take_inventory(
    parts: Sequence[Part], *, bits: int, targets: Sequence[str], data: Learned, kernels: tuple[str, ...]
) -> Inventory:
    """The inventory of a backbone from the parts of all ranks of a group.

    bits, targets: as asked for.
    Raises ModelError where modules are not those of the plan, and where a linear or an expert is left unpacked or
    unadapted; DataError where no token has a loss.
    """
    modules = merged(parts)
    _refuse_missing([path for part in parts for path in part.missing])
    _refuse_unadapted(modules, targets)
    if not data.learned_tokens:
        raise DataError(
            f"none of the {data.tokens:,} tokens of {data.samples:,} samples has a loss",
            try_="records with an answer that is to be learned",
        )
    found = Inventory(
        bits=bits,
        held=_held(modules),
        unpacked=tuple(module.path for module in modules if module.reason == UNPACKED),
        adapted=_adapted(modules),
        data=data,
        kernels=kernels,
    )
    _refuse_unpacked(found)
    return found


def merged(parts: Iterable[Part]) -> tuple[Module, ...]:
    """The modules of all ranks of a group, each once: shards add up, and what is whole on several ranks counts once."""
    found: dict[str, Module] = {}
    for module in (module for part in parts for module in part.modules):
        before = found.get(module.path)
        if before is not None:
            module = module._replace(
                own_bytes=before.own_bytes + module.own_bytes,
                whole_bytes=max(before.whole_bytes, module.whole_bytes),
                is_adapted=before.is_adapted and module.is_adapted,
            )
        found[module.path] = module
    return tuple(found.values())


def _held(modules: Iterable[Module]) -> tuple[Held, ...]:
    alike: dict[tuple[int, str, str], list[int]] = {}
    for module in modules:
        alike.setdefault((module.bits, module.packing, module.reason), []).append(module.own_bytes + module.whole_bytes)
    held = [
        Held(bits=bits, packing=packing, reason=reason, modules=len(sizes), bytes=sum(sizes))
        for (bits, packing, reason), sizes in alike.items()
    ]
    return tuple(sorted(held, key=lambda one: (one.bits, -one.bytes)))


def _adapted(modules: Sequence[Module]) -> Adapted:
    linears = [module for module in modules if module.kind == "linear"]
    experts = [module for module in modules if module.kind == "expert"]
    return Adapted(
        linears=sum(module.is_adapted for module in linears),
        of_linears=len(linears),
        experts=sum(module.is_adapted for module in experts),
        of_experts=len(experts),
    )


def _refuse_missing(missing: Sequence[str]) -> None:
    if missing:
        raise ModelError(
            f"{counted(len(missing), 'module')} that the plan counts {_are(missing)} not in the model: "
            f"{first_few(missing)}",
            try_="report this with the output of qdist doctor: the model's facts are wrong",
        )


def _refuse_unadapted(modules: Sequence[Module], targets: Sequence[str]) -> None:
    """Every targeted module, and no other, has an adapter; and each target names one at least."""
    report = "report this with the output of qdist doctor"
    targeted = [module for module in modules if module.is_targeted]
    lacking = [module.path for module in targeted if not module.is_adapted]
    if lacking:
        raise ModelError(
            f"{len(lacking)} of the {len(targeted)} linears and experts that lora.targets names have no adapter: "
            f"{first_few(lacking)}",
            try_=report,
        )
    strangers = [module.path for module in modules if module.is_adapted and not module.is_targeted]
    if strangers:
        raise ModelError(
            f"{counted(len(strangers), 'module')} that lora.targets does not name {_are(strangers)} adapted: "
            f"{first_few(strangers)}",
            try_=report,
        )
    for target in targets:
        if not any(_names(target, module) for module in targeted):
            raise ModelError(
                f"the target {target!r} matches no module of the model", ways=[{"lora.targets": (ALL_LINEAR,)}]
            )


def _names(target: str, module: Module) -> bool:
    leaf = module.path.rpartition(".")[2]
    if module.kind == "expert":
        return target in (EXPERTS, f"{EXPERTS}.{leaf}")
    return module.kind == "linear" and target in (ALL_LINEAR, leaf)


def _refuse_unpacked(found: Inventory) -> None:
    if found.bits >= 16 or found.unpacked_share <= MOST_UNPACKED:
        return
    size = sum(held.bytes for held in found.held if held.reason == UNPACKED)
    raise ModelError(
        f"{format_bytes(size)} of the linears and experts of the decoder layers, {found.unpacked_share:.1%} of their "
        f"bytes, would stay in 16 bits where {found.bits} were asked for: {first_few(found.unpacked)}",
        ways=[{"bits": 16}],
    )


def _are(paths: Sequence[str]) -> str:
    return "is" if len(paths) == 1 else "are"


def lines_of(found: Inventory) -> Iterator[str]:
    """The inventory in a few lines: 'adapted   210 of 210 linears'."""
    rows = {
        "backbone": _backbone(found.held),
        "adapted": _adapted_in_words(found.adapted),
        "data": _data(found.data),
        "kernels": ", ".join(found.kernels),
    }
    return (f"{label:<9} {words}" for label, words in rows.items() if words)


def rows_of(lines: str) -> tuple[tuple[str, str], ...]:
    """The lines as labels, each with its words."""
    parts = (line.partition(" ") for line in lines.splitlines())
    return tuple((label, words.strip()) for label, _, words in parts)


def _backbone(held: Sequence[Held]) -> str:
    """'60.2 MiB in 4 bits (nf4), 1.1 MiB in 16: embeddings 0.9 MiB, norms 0.2 MiB'."""
    sizes: dict[int, list[Held]] = {}
    for one in held:
        sizes.setdefault(one.bits, []).append(one)
    return ", ".join(_in_bits(bits, alike, first=bits == held[0].bits) for bits, alike in sizes.items())


def _in_bits(bits: int, held: Sequence[Held], *, first: bool) -> str:
    packings = ", ".join(dict.fromkeys(one.packing for one in held if one.packing))
    size, unit = format_bytes(sum(one.bytes for one in held)), " bits" if first else ""
    reasons: dict[str, int] = {}
    for one in held:
        if one.reason:
            reasons[one.reason] = reasons.get(one.reason, 0) + one.bytes
    why = ", ".join(f"{reason} {format_bytes(part)}" for reason, part in reasons.items())
    return f"{size} in {bits}{unit}" + (f" ({packings})" if packings else "") + (f": {why}" if why else "")


def _adapted_in_words(adapted: Adapted) -> str:
    words = f"{adapted.linears:,} of {adapted.of_linears:,} linears"
    if adapted.of_experts:
        words += f", {adapted.experts:,} of {adapted.of_experts:,} parameters of experts"
    return words


def _data(data: Learned) -> str:
    """'1,024 samples, 78 % of their tokens have a loss; 3 of 1,027 records have none'."""
    share = 100 * data.learned_tokens / max(1, data.tokens)
    words = f"{data.samples:,} samples, {share:.0f} % of their {data.tokens:,} tokens have a loss"
    few = {"none": data.none, "all": data.whole or 0}
    shares = [f"{_share(number, data.records)} have {which}" for which, number in few.items() if number]
    return words + (f"; of {data.records:,} records {', '.join(shares)}" if shares else "")


def _share(number: int, of: int) -> str:
    return f"{number:,} ({100 * number / max(1, of):.1f} %)"


def plain(found: Inventory) -> Mapping[str, object]:
    """The inventory as JSON has it."""
    made: Mapping[str, object] = msgspec.to_builtins(found)
    return made
