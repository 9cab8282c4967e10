"""The GPTQ checkpoint that a run was trained on, as files of tensors that can be written anew with a change."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.core.gptq import WORD
from qdist.core.plan import Plan
from qdist.runtime.gptq.folder import QUANTIZE_CONFIG
from qdist.runtime.methods.backbone import DTYPES
from qdist.runtime.methods.packed_gptq import PackedGptq
from qdist.runtime.methods.skeleton import decoder_layers, skeleton
from qdist.runtime.methods.weights import RandomWeights
from qdist.runtime.packed_folder import Entry, Written, entries_of, file_name, stored_entries, tensor_files
from qdist.runtime.quantize_pack import goes_along

_QWEIGHT = ".qweight"
_PACKED = (_QWEIGHT, ".qzeros", ".scales", ".g_idx")


class Packed(NamedTuple):
    """A packed linear."""

    path: str
    inputs: int
    outputs: int


class GptqBase:
    """A folder as it is; or the random weights of a dummy run, a file a decoder layer, made when they are asked for."""

    def __init__(self, plan: Plan) -> None:
        assert plan.source.gptq is not None
        self.plan, self.gptq = plan, plan.source.gptq
        self.folder = Path(plan.source.packed) if plan.source.packed else None
        if self.folder is not None and not self.folder.is_dir():
            raise ModelError(f"{self.folder}, which the run was trained on, is gone", try_="put it back where it was")

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the files of tensors."""
        if self.folder is not None:
            return tuple(sorted(set(tensor_files(self.folder).values())))
        return tuple(file_name(position, self.plan.facts.layers) for position in range(self.plan.facts.layers + 1))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        if self.folder is None:
            return dict(self.plan.source.config)
        content: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return content

    @property
    def beside(self) -> list[Path]:
        """What goes along as it is: the run's own tokenizer, and the folder's other files."""
        folders = [self.folder] if self.folder else []
        if self.plan.source.tokenizer:
            folders.append(Path(self.plan.source.tokenizer))
        found = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if goes_along(path)}
        found.pop(QUANTIZE_CONFIG, None)
        return list(found.values())

    @property
    def stamp(self) -> str:
        """Says which base it is, without reading it: names, sizes and times of its files."""
        paths = [self.folder / file for file in self.files] if self.folder else []
        return " ".join([str(self.folder), *(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths)])

    @property
    def bytes(self) -> int:
        """Of all files."""
        if self.folder is not None:
            return sum((self.folder / file).stat().st_size for file in self.files)
        return sum(rank.weights for rank in self.plan.ranks[0].expected)

    def entries(self, file: str) -> list[Entry]:
        """The tensors of one file. Those of random weights are made here, a decoder layer of them."""
        return self._random(self.files.index(file)) if self.folder is None else stored_entries(self.folder, file)

    def linears(self, file: str) -> list[Packed]:
        """The packed linears that have their words in a file."""
        if self.folder is None:
            own = self._modules[self.files.index(file)]
            return [Packed(path, m.in_features, m.out_features) for path, m in own if isinstance(m, PackedGptq)]
        found = []
        for entry in stored_entries(self.folder, file):
            path = entry.name.removesuffix(_QWEIGHT)
            if path != entry.name:
                shape = self.gptq.of(path)
                assert shape is not None  # `check.checked` has seen to it
                found.append(Packed(path, entry.shape[0] * WORD // shape.bits, entry.shape[1]))
        return found

    def _random(self, position: int) -> list[Entry]:
        dtype = DTYPES[self.plan.compute_dtype]
        weights = RandomWeights(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), dtype)
        tensors: dict[str, torch.Tensor] = {}
        for path, module in self._modules[position]:
            own = weights.of(path, module)
            for name in module._parameters:
                if module._parameters[name] is not None:
                    stored = "qweight" if isinstance(module, PackedGptq) and name == "weight" else name
                    tensors[f"{path}.{stored}"] = own[name][:].cpu()
        return entries_of(tensors)

    @cached_property
    def _modules(self) -> dict[int, list[tuple[str, torch.nn.Module]]]:
        """Modules that hold tensors, by the file that theirs are in."""
        spec, facts = self.plan.spec, self.plan.facts
        model = skeleton(
            self.plan.source, bits=spec.bits, quant=spec.quant, dtype=DTYPES[self.plan.compute_dtype],
            linear_names=facts.linear_names,
        )  # fmt: skip
        within = {id(part): index for index, layer in enumerate(decoder_layers(model)) for part in layer.modules()}
        found: dict[int, list[tuple[str, torch.nn.Module]]] = {index: [] for index in range(facts.layers + 1)}
        for path, module in model.named_modules():
            if module._parameters and not (module is model.get_output_embeddings() and facts.tied_embeddings):
                found[within.get(id(module), facts.layers)].append((path, module))
        return found


def packed_hash(files: Mapping[str, Written]) -> str:
    """SHA-256 over names and checksums of the packed tensors of a checkpoint, in the order of their names."""
    sums = sorted((name, *s) for file in files.values() for name, s in file.checksums.items() if name.endswith(_PACKED))
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
