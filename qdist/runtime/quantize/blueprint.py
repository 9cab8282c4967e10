"""What tensors does a model folder's class have, and which of them are packed? Names and shapes, without values.

They are those of the whole model: towers of a wrapper are copied in 16 bits, so that the folder is a model by itself.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from qdist.core.errors import ModelError
from qdist.core.model.gptq import method_of
from qdist.core.model.shapes import ModelFacts
from qdist.core.model.storage import MX_BLOCK
from qdist.host.sources.models import read_json
from qdist.runtime.model.classes import empty_model
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.skeleton import open_config, refused

_BLOCKS, _SCALES = "_blocks", "_scales"


class Blueprint(NamedTuple):
    """A model's tensors as named by transformers' class, without their values."""

    config: Any
    architecture: str
    prefix: str
    """Prefix of the backbone's module names; older files leave it out."""
    layers: int
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and stored buffer by name; a tied one is listed once."""
    linears: frozenset[str]
    """Names of the weights to pack: the linears of decoder layers."""
    skipped: tuple[str, ...] | None
    """Linears that transformers must be told not to pack; None if it skips them by itself."""
    model: Any = None
    """The class on the meta device."""
    stack: str = "model.layers"
    """Path of the list of decoder layers."""
    experts: frozenset[str] = frozenset()
    """Names of the 3-D parameters to pack, a matrix an expert."""
    transposed: frozenset[str] = frozenset()
    """Those of `linears` that the class holds as [in, out], GPT-2's. Packed they are [out, in], as in transformers."""
    mxfp4: frozenset[str] = frozenset()
    """Names of experts' blocks and scales that the checkpoint stores as MXFP4, and that stay as they are."""
    fp8: Mapping[str, Any] | None = None
    """config.json's `quantization_config` of weights in FP8, dequantized while they are read."""

    def layer(self, name: str) -> int:
        """The decoder layer of a tensor; `layers` for anything outside."""
        found = re.match(rf"{re.escape(self.stack)}\.(\d+)\.", name)
        return int(found[1]) if found else self.layers

    def packed_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a linear's matrix as it is packed."""
        rows, columns = self.shapes[name]
        return (columns, rows) if name in self.transposed else (rows, columns)


def blueprint(folder: Path, facts: ModelFacts | None = None) -> Blueprint:
    """The blueprint of a model folder. facts: of its model, if known.

    Raises ModelError for a model that transformers has no class for.
    """
    stated = read_json(folder / "config.json").get("quantization_config") or {}
    method = method_of(stated) if stated else None
    config = open_config(folder)
    facts = facts or facts_of(config, name=str(folder))
    with refused(folder):
        model = empty_model(config, whole=True)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    experts = frozenset(f"{path}.{each.name}" for path, own in facts.experts.items() for each in own.matrices)
    mxfp4 = _as_mxfp4(shapes, experts, transposed=_are_transposed(facts)) if method == "mxfp4" else {}
    kept = {name: size for name, size in shapes.items() if not (mxfp4 and name in experts)}
    linears = {f"{path}.weight": module for path, module in _linears(model) if facts.packs(path)}
    _require_count(folder, facts, len(linears))
    return Blueprint(
        config=config,
        architecture=type(model).__name__,
        prefix=str(model.base_model_prefix),
        layers=facts.layer_count,
        shapes=kept | mxfp4,
        linears=frozenset() if mxfp4 else frozenset(linears),
        skipped=_skipped(model, linears),
        model=model,
        stack=facts.modules.layers,
        experts=frozenset() if mxfp4 else experts,
        transposed=frozenset(name for name, module in linears.items() if not isinstance(module, nn.Linear)),
        mxfp4=frozenset(mxfp4),
        fp8=stated if method == "fp8" else None,
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of a model by their paths, GPT-2's among them."""
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module


def _skipped(model: Any, linears: Mapping[str, nn.Module]) -> tuple[str, ...] | None:
    """Linears that are not packed, if there are any but the head."""
    left = [(path, module) for path, module in _linears(model) if f"{path}.weight" not in linears]
    told = any(module is not model.get_output_embeddings() for _, module in left)
    return tuple(path for path, _ in left) if told else None


def _require_count(folder: Path, facts: ModelFacts, found: int) -> None:
    expected = sum(run.count * len(run.shape.linears) for run in facts.layers)
    if found != expected:
        raise ModelError(
            f"{folder} has {found} linears in {facts.layer_count} decoder layers, not {expected}",
            try_="qdist doctor: transformers may be of another version",
        )


def _are_transposed(facts: ModelFacts) -> bool:
    return any(shape.experts is not None and shape.experts.transposed for shape in facts.shapes)


def _as_mxfp4(
    shapes: Mapping[str, tuple[int, ...]], experts: frozenset[str], *, transposed: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the blocks and scales that stand for experts' parameters: [E, out, groups, 16] and [E, out, groups]."""
    found: dict[str, tuple[int, ...]] = {}
    for name in experts:
        count, rows, columns = shapes[name]
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        groups = math.ceil(inputs / MX_BLOCK)
        found[name + _BLOCKS] = (count, outputs, groups, MX_BLOCK // 2)
        found[name + _SCALES] = (count, outputs, groups)
    return found
