"""Where does a causal language model have its embedding, decoder layers, final norm and head?"""

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

from qdist.core.errors import ModelError
from qdist.core.model.shapes import Modules

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def parts_of(model: Any) -> Modules:
    """Paths of a model's parts: those of its facts if it was made from them (`skeleton`), else found in it."""
    found: Modules | None = vars(model).get("qdist_parts")
    if found is None:
        found = model.qdist_parts = find_parts(model)
    return found


def find_parts(model: Any) -> Modules:
    """Paths of the parts of a whole model, found by what they are. Raises ModelError for a model without layers.

    A model without final norm or head has an empty path for it.
    """
    paths = {module: path for path, module in model.named_modules()}
    embedding = paths[_embedding(model)]
    layers = _layers(model, embedding)
    decoder = common_parent(embedding, layers)
    head = model.get_output_embeddings()
    inner = dict(model.get_submodule(decoder).named_children())
    norms = [name for name, child in inner.items() if "Norm" in type(child).__name__]
    behind = list(inner)[list(inner).index(layers.removeprefix(f"{decoder}.").partition(".")[0]) :]
    final = sorted((name for name in norms if name in behind or "final" in name), key=lambda name: "emb" not in name)[
        -1:
    ]
    tables = [name for name, child in inner.items() if isinstance(child, nn.Embedding)]
    return Modules(
        embedding=embedding,
        before=tuple(f"{decoder}.{name}" for name in norms if name not in (*behind, *final)),
        added=tuple(f"{decoder}.{name}" for name in tables if f"{decoder}.{name}" != embedding),
        shared=tuple(f"{decoder}.{name}" for name in inner if "rotary" in name),
        layers=layers,
        final_norm=f"{decoder}.{final[0]}" if final else "",
        head=paths.get(head, "") if head is not None else _linear_over_vocabulary(model, decoder),
    )


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
    """Length of a tuple or list as it is written, without what is added to it under another name; 0 for anything else."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _tuple_length(value.left)
    return len(value.elts) if isinstance(value, ast.Tuple | ast.List) else 0


def _embedding(model: Any) -> Any:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.num_embeddings >= vocabulary]
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # transformers does not know, either
        found = None
    if found is None and not tables:
        raise ModelError(f"{type(model).__name__} has no table of tokens", try_="a causal language model")
    return tables[0] if found is None else found


def _layers(model: Any, embedding: str) -> str:
    config = model.config.get_text_config(decoder=True)
    count = next((getattr(config, key) for key in _LAYER_COUNTS if hasattr(config, key)), None)
    lists = [path for path, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not lists:  # longcat_flash counts each layer twice
        longest = max((len(each) for each in model.modules() if isinstance(each, nn.ModuleList)), default=0)
        lists = [
            path for path, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == longest
        ]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers", try_="a causal language model")
    # Towers may have as many layers; they share less of their path with the tokens' table.
    return min(lists, key=lambda path: (-len(common_parent(path, embedding)), path.count(".")))


def _linear_over_vocabulary(model: Any, decoder: str) -> str:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    outside = [
        path
        for path, each in model.named_modules()
        if isinstance(each, nn.Linear) and each.out_features == vocabulary and not path.startswith(f"{decoder}.")
    ]
    return outside[-1] if outside else ""
