"""The GPTQ checkpoint that a run was trained on, and the per-group updates of its QA-LoRA adapters."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, partial
from math import gcd
from pathlib import Path
from typing import NamedTuple

import torch

from qdist.core.errors import RunError
from qdist.core.model.gptq import WORD, Gptq
from qdist.core.planning.plan import Plan
from qdist.host.sources.models import read_json
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.model_files import write_model_files
from qdist.runtime.exports.update import Adapters, require_finite
from qdist.runtime.formats.gptq_folder import finish
from qdist.runtime.formats.packed_folder import (
    Entry,
    Written,
    entries_of,
    file_name,
    read_tensor,
    stored_entries,
    tensor_files,
)
from qdist.runtime.kernels.gptq_bits import group_of_inputs
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.skeleton import DTYPES
from qdist.runtime.model.weights import stored_buffers

_QWEIGHT = ".qweight"
_PACKED = (_QWEIGHT, ".qzeros", ".scales", ".g_idx")


class Packed(NamedTuple):
    """A packed linear."""

    path: str
    inputs: int
    outputs: int


class GptqBase:
    """An unmodified folder; or a dummy run's random weights, one file per decoder layer, generated on demand.

    Tables have the rows of new tokens that adapters have trained; nothing else differs from the base.
    """

    def __init__(self, plan: Plan, adapters: Adapters) -> None:
        if plan.source.gptq is None:
            raise RunError(
                f"the run's {plan.spec.model} is not a GPTQ checkpoint", try_="qdist export --to 16bit, or gptq"
            )
        self.plan, self.gptq, self._adapters = plan, plan.source.gptq, adapters
        self.backbone = Backbone(plan)
        packed = self.backbone.source.packed
        self.folder = Path(packed) if packed else None

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the tensor files."""
        if self.folder is not None:
            return tuple(sorted(set(tensor_files(self.folder).values())))
        return tuple(file_name(position, self.backbone.layers) for position in range(self.backbone.layers + 1))

    @property
    def stamp(self) -> str:
        """Identifies the base without reading it."""
        return self.backbone.identity()

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        if self.folder is not None:
            return sum((self.folder / file).stat().st_size for file in self.files)
        return max(budget.weights for rank in self.plan.ranks for budget in rank.expected) * self.plan.gpus_per_group

    def entries(self, file: str) -> list[Entry]:
        """The tensors of one file; random weights are generated here, one decoder layer at a time."""
        if self.folder is None:
            return self._random(self.files.index(file))
        return [self._with_rows(entry) for entry in stored_entries(self.folder, file, self.backbone.sums)]

    def untouched(self, file: str) -> list[Entry]:
        """A file's tensors that are copied unchanged, without those that get new rows; none for random weights."""
        if self.folder is None:  # random weights are made of nothing but their names
            return []
        tables = {f"{path}.weight" for path in self.backbone.tables}
        return [entry for entry in stored_entries(self.folder, file, self.backbone.sums) if entry.name not in tables]

    def linears(self, file: str) -> list[Packed]:
        """The packed linears whose words are in a file."""
        if self.folder is None:
            own = self._modules[self.files.index(file)]
            return [Packed(path, m.in_features, m.out_features) for path, m in own if isinstance(m, PackedGptq)]
        found = []
        for entry in stored_entries(self.folder, file, self.backbone.sums):
            path = entry.name.removesuffix(_QWEIGHT)
            if path != entry.name:
                shape = self.gptq.of(path)
                assert shape is not None  # `check.checked` has seen to it
                found.append(Packed(path, entry.shape[0] * WORD // shape.bits, entry.shape[1]))
        return found

    def finish(self, folder: Path, gptq: Gptq, files: Mapping[str, Written]) -> None:
        """Write what accompanies the tensors: the run's tokenizer, configurations, the index."""
        write_model_files(folder, self.backbone.model, self.plan, getattr(torch, self._dtype))
        finish(folder, read_json(folder / "config.json"), gptq, files)

    @property
    def _dtype(self) -> str:
        """The dtype that the base states for computing; that of its scales if it states none."""
        stored = read_json(self.folder / "config.json") if self.folder else self.plan.source.config
        name = stored.get("dtype") or stored.get("torch_dtype")
        return name if name in DTYPES else self.gptq.scales

    def _with_rows(self, entry: Entry) -> Entry:
        path = entry.name.removesuffix(".weight")
        rows = self.plan.source.vocab_rows
        if path not in self.backbone.tables or rows is None:
            return entry
        return entry._replace(shape=(rows, *entry.shape[1:]), make=partial(self._table, path, entry))

    def _table(self, path: str, entry: Entry) -> torch.Tensor:
        table, trained = self.backbone.with_new_rows(entry.make()), self._adapters.rows(path)
        if trained is None and self.plan.facts.tied_embeddings:  # a head that is stored beside the table it is tied to
            found = (self._adapters.rows(other) for other in sorted(self.backbone.tables))
            trained = next((rows for rows in found if rows is not None), None)
        if trained is not None:
            table[list(self.plan.source.new_token_ids)] = trained.to(table.dtype)
        return table

    def _random(self, position: int) -> list[Entry]:
        tensors: dict[str, torch.Tensor] = {}
        for path, module in self._modules[position]:
            own = self.backbone.linear(path) if isinstance(module, PackedGptq) else None
            for name in (*dict(module.named_parameters(recurse=False)), *stored_buffers(module)):
                stored = "qweight" if own is not None and name == "weight" else name
                value = own.get_parameter(name) if own is not None else self.backbone.read(f"{path}.{name}")
                tensors[f"{path}.{stored}"] = value.detach().cpu()
            if own is not None:
                tensors[f"{path}.g_idx"] = group_of_inputs(own.in_features, own.shape.group_size)
        return entries_of(tensors)

    @cached_property
    def _modules(self) -> dict[int, list[tuple[str, torch.nn.Module]]]:
        """Modules with tensors, by the file that holds those."""
        found: dict[int, dict[str, torch.nn.Module]] = {index: {} for index in range(self.backbone.layers + 1)}
        for weight in self.backbone.weights():
            path = weight.name.rpartition(".")[0]
            found[weight.position][path] = self.backbone.model.get_submodule(path)
        return {position: list(own.items()) for position, own in found.items()}


def packed_hash(files: Mapping[str, Written]) -> str:
    """SHA-256 over names and checksums of a checkpoint's packed tensors, in name order."""
    sums = sorted((name, *s) for file in files.values() for name, s in file.checksums.items() if name.endswith(_PACKED))
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


OFFSET = ".weight_offset"


class GroupUpdates:
    """Updates per group, in weight units. Raises RunError for plain LoRA, whose updates differ within a group."""

    def __init__(self, base: GptqBase, adapters: Adapters) -> None:
        if adapters.pool == 1:
            raise RunError(
                f"{adapters.runs[0].path} has plain LoRA, which changes each weight by itself, not groups of them",
                try_="qdist export --to 16bit, or --to gptq",
            )
        packed = {linear.path for file in base.files for linear in base.linears(file)}
        plain = sorted(adapters.paths - packed)
        if plain:
            raise RunError(
                f"the adapter changes {len(plain)} linears that the checkpoint has in 16 bits, such as {plain[0]}",
                try_="qdist export --to 16bit",
            )
        self._base, self._adapters, old = base, adapters, base.gptq.offset
        self.size = gcd(adapters.pool, old.group_size) if old else adapters.pool
        """Inputs that share an update."""
        leaves = {path.rpartition(".")[2] for path in adapters.paths}
        self.leaves = tuple(sorted(leaves | set(old.linears if old else ())))
        """Leaf names of the changed linears."""

    def linears(self, file: str) -> list[Packed]:
        """The changed linears whose words are in a file."""
        return [linear for linear in self._base.linears(file) if linear.path.rpartition(".")[2] in self.leaves]

    def groups(self, linear: Packed) -> int:
        """Number of groups among the linear's inputs."""
        return linear.inputs // self.size

    def whole(self, file: str, linear: Packed) -> torch.Tensor:
        """Float32 [groups, out]: the update plus what was merged before."""
        update, old, folder = self.update(linear), self._base.gptq.offset, self._base.folder
        if old is None or folder is None or not old.of(linear.path):
            return update
        stored = read_tensor(folder / file, linear.path + OFFSET, self._base.backbone.sums)
        before = stored.float() * old.scale
        whole = update + before.repeat_interleave(old.group_size // self.size, dim=0)
        require_finite(whole, linear.path)
        return whole

    def update(self, linear: Packed) -> torch.Tensor:
        """Float32 [groups, out]: the sum of the adapters' updates."""
        update = self._adapters.of(linear.path)
        if update is None:
            return torch.zeros(self.groups(linear), linear.outputs)
        return update.pooled(self.size)
