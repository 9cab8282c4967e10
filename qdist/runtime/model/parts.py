"""Where does a causal language model have its embedding, decoder layers, final norm and head?"""

import ast
import inspect
import re
import textwrap
from typing import Any

from torch import nn

from qdist.core.errors import ModelError
from qdist.core.model.shapes import Modules
from qdist.runtime.model.layer_parts import read

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")


def parts_of(model: Any) -> Modules:
    """Paths of a model's parts: those of its facts if it was made from them (`skeleton`), else found in it."""
    found: Modules | None = vars(model).get("qdist_parts")
    if found is None:
        found = model.qdist_parts = find_parts(model)
    return found


def find_parts(model: Any) -> Modules:
    """Paths of the parts of a whole model, found by what they are. Raises ModelError for a model without layers."""
    layers = layers_path(model)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no single list of layers", try_="a causal language model")
    return modules_around(model, layers)


def layers_path(model: nn.Module) -> str:
    """Module path of the list of decoder layers; empty if there is not exactly one.

    get_decoder of some classes returns the head or the model itself; so this is the list with the most parameters
    among those that are in no other list, beside the table of tokens rather than in a tower. A second list of layers of
    the same class is run besides it.
    """
    lists = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+(\.|$)", path)
    }
    if not lists:
        return ""
    count = read(model.config.get_text_config(decoder=True), *_COUNTS)
    tables = {path: each.num_embeddings for path, each in model.named_modules() if isinstance(each, nn.Embedding)}
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    table = max(tables, key=lambda path: (tables[path] == vocabulary, tables[path]), default="")
    others = _other_models(model)
    largest = max(
        lists,
        key=lambda path: (
            _length(model, path) == count, not path.startswith(others), len(common_parent(path, table)), lists[path],
        ),
    )  # fmt: skip
    kinds = [type(next(iter(model.get_submodule(path).children()), model)) for path in lists if lists[path]]
    return largest if kinds.count(type(model.get_submodule(largest)[0])) == 1 else ""


def _other_models(model: Any) -> tuple[str, ...]:
    """Prefixes of the paths in models inside this one that are of another configuration, such as one of images."""
    from transformers import PreTrainedModel

    own = {type(model.config), type(model.config.get_text_config(decoder=True))}
    inner = ((path, each) for path, each in model.named_modules() if isinstance(each, PreTrainedModel))
    return tuple(f"{path}." for path, each in inner if path and type(each.config) not in own)


def _length(model: nn.Module, path: str) -> int:
    found: Any = model.get_submodule(path)
    return len(found)


def modules_around(model: nn.Module, layers: str) -> Modules:
    """Paths of the parts around a list of decoder layers."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    above = layers.rpartition(".")[0]
    beside = dict(model.get_submodule(above).named_children())
    names = list(beside)
    embedding = paths[id(model.get_input_embeddings())]
    join = f"{above}." if above else ""
    norms = [name for name in names if re.search(r"norm|^ln", name, re.IGNORECASE) and _norm_of_hidden(beside[name])]
    at = names.index(layers.rpartition(".")[2])
    final = [name for name in norms if names.index(name) > at][:1] or norms[-1:]
    return Modules(
        embedding=embedding,
        before=tuple(
            f"{join}{name}" for name in names[:at]
            if name not in final and (isinstance(beside[name], nn.Dropout) or name in norms)
        ),
        added=tuple(f"{join}{name}" for name in names if _is_position_table(name, beside[name])),
        shared=tuple(f"{join}{name}" for name in names if re.search(r"rotary|rope", name)),
        layers=layers,
        final_norm=f"{join}{final[-1]}" if final else "",
        head=paths.get(id(model.get_output_embeddings()), ""),
    )  # fmt: skip


def _norm_of_hidden(module: nn.Module) -> bool:
    return not list(module.children()) and all(parameter.dim() == 1 for parameter in module.parameters())


def _is_position_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and bool(re.search(r"position|wpe", name))


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    found: nn.ModuleList = model.get_submodule(parts_of(model).layers)
    return found


def decoder_path(model: Any) -> str:
    """Path of the module that computes hidden states from tokens: the smallest around embedding and layers."""
    parts = parts_of(model)
    return common_parent(parts.embedding, parts.layers)


def decoder_of(model: Any) -> Any:
    """The module that computes hidden states from tokens. `get_decoder` gives one with a head for some wrappers."""
    return model.get_submodule(decoder_path(model))


def embedding_of(model: Any) -> Any:
    """The table of tokens, or a stand-in for it."""
    return model.get_submodule(parts_of(model).embedding)


def head_of(model: Any) -> Any:
    """The output head, or a stand-in for it."""
    return model.get_submodule(parts_of(model).head)


def common_parent(one: str, other: str) -> str:
    """The longest path that both module paths lie in."""
    shared = []
    for left, right in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def items_returned(layer: type[nn.Module]) -> int:
    """Length of the tuple or list that a class of layers returns, its hidden states first; 0 if it returns them alone.

    Read from the source of its forward pass, as a layer that is not there cannot be tried.
    """
    function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(layer.forward)))).body[0]
    lengths: dict[str, int] = {}
    appended: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            lengths[name] = max(lengths.get(name, 0), _tuple_length(node.value))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            appended[name] = max(appended.get(name, 0), _tuple_length(node.value))
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return max(
        lengths.get(value.id, 0) and lengths[value.id] + appended.get(value.id, 0)
        if isinstance(value, ast.Name)
        else _tuple_length(value)
        for value in returned
    )


def _tuple_length(value: ast.expr | None) -> int:
    """Length of a tuple or list as written, without what is added under another name; 0 for anything else."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _tuple_length(value.left)
    return len(value.elts) if isinstance(value, ast.Tuple | ast.List) else 0
