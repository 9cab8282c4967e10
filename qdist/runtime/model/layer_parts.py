"""What is a decoder layer made of? Its linears, experts, norms and the rest, read from the modules of its class."""

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from qdist.core.model.shapes import UNPACKED_EXPERTS, Experts, Kept, LayerShape, Linear, Reads
from qdist.runtime.model.experts import is_computed

FUSED = "read by a fused kernel"
"""Reason for a linear that its own module does not call, but whose weight it hands to a function."""
RESCALED = "rescaled in place by the model"
SHARED = "shared between layers"
NO_GRADIENTS = "computed without gradients"
"""Reason for a linear of a module that only chooses, such as the indexer of sparse attention."""
SMALL = "too small to pack"
ROUTER = "router"
SKIPPED = "of a layer that text without images skips"
RENAMED = "its adapter would be loaded under another name"
"""Reason for a linear whose name one of transformers' patterns for old checkpoints takes for another, as PEFT applies
them to adapters too: in transformers 5.17 'mlp.shared_expert.' of Laguna, whose dot is any letter."""
OWN_LINEAR = "a linear with arithmetic of its own"
_MOST_SMALL = 64
"""Inputs or outputs up to which a linear is too small; an eighth of the hidden size where that is less."""
_KEYS_OR_VALUES = re.compile(r"(k|v|kv|key|value)(_|$)")
_ROUTERS = re.compile(r"(^|\.)(router|gate|classifier|wg)(\.|$)")
_ROUTER_CLASS = re.compile(r"Router$|TopK\w*$|M[oO][eE]Gate$")
"""Whole ends of names: Qwen's MoeGatedDeltaNet is none."""
_FOR_IMAGES = re.compile(r"CrossAttention\w*Layer$")
"""A layer that reads images alone, between layers that read text (Mllama)."""
_RECURRENT = re.compile(r"Mamba|DeltaNet|DeltaAttention|RecurrentBlock|Rglru|Rwkv|ShortConv|LSTM|LightningAttention")
_ATTENTION = re.compile(r"Attention|Attn|MoA$")
_PLAIN_PRODUCT = "input @ self.weight.T"
"""What a subclass of `nn.Linear` (Falcon's) computes that spells out the product."""
_MIXER_PATH = re.compile(r"attn|attention|mixer|mamba|conv|temporal|recurrent|rwkv|ssm|mlstm|delta")
_MLP_PATH = re.compile(r"mlp|feed_forward|ffn?($|\.)|moe|expert")
_MLP_LEAF = re.compile(r"(fc\d|dense_h|dense_4h|lin\d|up_proj|down_proj)")
_MIXER_LEAF = re.compile(r"(q|k|v|o|qkv|in|out)(_|$)|query|key|value")
_WRAPPED = ("linear", "layer")
"""Names of a linear that is all that its parent has."""
_OUT = re.compile(r"(^|_)(o|out|down|output|dense|wo|w2|c_proj|fc2|fc_o|lin2|dense_4h_to_h)(_proj|_lin|$)")
_Q_OR_K = re.compile(r"(^|\.)(q|k|query|key)_?(layer)?_?norm$|\.(norm_[qk]|[qk]_ln|ln_[qk])$")
_WEIGHT_READ = re.compile(r"(?<!target_dtype = )\bself\.(\w+)\.weight\b(?!\[|\.device|\.shape)")
"""A use of a child's weight in a module's code. Its dtype is asked for in flash attention of float32, which never runs
here; slices of it are of tensor parallelism, which old configurations state for pretraining."""
_ACTIVE = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k",
    "top_k_experts", "num_selected_experts", "moe_num_active_experts", "num_experts_per_topk",
)  # fmt: skip
"""Spellings of the experts that a token visits."""


class Facts(NamedTuple):
    """What a layer's shape takes from the configuration and the class rather than from the layer's modules."""

    config: Any
    """transformers' configuration of the text model."""
    hidden: int
    attention: Literal["flash", "repacked", "eager"]
    shared: frozenset[int]
    """Identities of the parameters that several layers have."""
    rescaled: frozenset[str] = frozenset()
    """Paths in a layer of linears whose weights the model multiplies in place."""


def read(config: Any, *spellings: str, default: int = 0) -> int:
    """A count of a configuration, the largest where it states one a layer."""
    for key in spellings:
        value = getattr(config, key, None)
        if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
            return max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix as `nn.Linear` does, perhaps one that is stored transposed (GPT-2)."""
    kind: Any = type(module)
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and _multiplies(kind))


@cache
def _multiplies(kind: Any) -> bool:
    forward = kind.forward
    return forward is nn.Linear.forward or _PLAIN_PRODUCT in inspect.getsource(forward)


def inputs_and_outputs(module: Any) -> tuple[int, int]:
    """Of a linear."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)


def shape_of(layer: nn.Module, facts: Facts, counted: set[int]) -> LayerShape:
    """The shape of a decoder layer.

    counted: identities of the parameters of earlier layers, which are not counted again; this layer's are added.
    """
    parts = _Parts(layer, facts, counted)
    linears, experts, kept = parts.linears(), parts.experts(), parts.kept()
    norm, norms, qk_norm, odd = parts.norms()
    counted.update(map(id, layer.parameters()))
    return LayerShape(
        hidden=facts.hidden,
        linears=linears,
        intermediate=_intermediate(linears, experts),
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        norm=norm,
        norms=norms,
        qk_norm=qk_norm,
        mlp=_mlp(linears, experts, facts.config),
        attention=facts.attention,
        experts=experts,
        kept=(*kept, *odd),
        mixer=parts.mixer,
    )


class _Parts:
    """The modules of one layer, sorted by what they are."""

    def __init__(self, layer: nn.Module, facts: Facts, counted: set[int]) -> None:
        self._facts, self._counted = facts, counted
        self._modules = dict(layer.named_modules())
        self._stacked = dict(_stacked(self._modules))
        self._routed = bool(self._stacked) or any(map(_is_expert, self._modules, self._modules.values()))
        kinds: dict[str, Any] = {path: type(module) for path, module in self._modules.items()}
        self._without_gradients = [path for path, kind in kinds.items() if _has_no_gradients(kind)]
        self._kept_linears = {path: why for path in self._linear_paths() if (why := self._why_kept(path))}
        self.recurrent = any(_is_recurrent(module) for module in self._modules.values())
        self._attention = self._find_attention()

    def _linear_paths(self) -> list[str]:
        return [path for path, module in self._modules.items() if is_linear(module)]

    def _find_attention(self) -> Any:
        found = [module for path, module in self._modules.items() if path and _is_attention(module)]
        return next((module for module in found if any(map(is_linear, module.modules()))), None)

    @property
    def mixer(self) -> Literal["attention", "recurrent", "none"]:
        """What mixes tokens; recurrent too where attention stands beside it."""
        if self.recurrent:
            return "recurrent"
        return "attention" if self._attention is not None else "none"

    def _why_kept(self, path: str) -> str:
        """Why a linear is not packed; empty if it is."""
        module, (within, _, leaf) = self._modules[path], path.rpartition(".")
        owner: Any = type(self._modules[within])
        if _FOR_IMAGES.search(type(self._modules[""]).__name__):
            return SKIPPED
        if leaf in weights_read(owner):
            return FUSED
        if any(path.startswith(f"{each}.") for each in self._without_gradients):
            return NO_GRADIENTS
        if path in self._facts.rescaled:
            return RESCALED
        if _renamed(path, self._facts.config.model_type).rpartition(".lora_A")[0] not in self._modules:
            return RENAMED
        if id(module.weight) in self._facts.shared:
            return SHARED
        if self._routed and _routes(path, self._modules[within]):
            return ROUTER
        inputs, outputs = inputs_and_outputs(module)
        most = min(_MOST_SMALL, self._facts.hidden // 8)
        smallest = min(inputs, outputs)
        return SMALL if smallest < most or (smallest == most and not _KEYS_OR_VALUES.match(leaf)) else ""

    def linears(self) -> tuple[Linear, ...]:
        """The linears that are packed, in module order."""
        paths = self._linear_paths()
        leaves = [path.rpartition(".")[2] for path in paths]
        found = []
        for path in paths:
            if path in self._kept_linears or id(self._modules[path].weight) in self._counted:
                continue
            within, _, leaf = path.rpartition(".")
            inputs, outputs = inputs_and_outputs(self._modules[path])
            bias = getattr(self._modules[path], "bias", None) is not None
            found.append(
                Linear(
                    leaf, inputs, outputs, bias, _reads(path, inputs, outputs, self._facts.hidden),
                    within if leaves.count(leaf) > 1 or "shared_expert" in within else "",
                    isinstance(self._modules[path], Conv1D),
                )
            )  # fmt: skip
        return tuple(found)

    def experts(self) -> Experts | None:
        """The routed experts; None if there are none."""
        if not self._stacked:
            return None
        path = self._experts_path
        flat = self._stacked[path]
        first = next(iter(flat.values()))
        owner = self._modules[path]
        transposed = getattr(owner, "is_transposed", None)
        if transposed is None:
            transposed = _is_transposed(flat, self._facts.hidden)
        names = dict(owner.named_parameters(recurse=False))
        matrices = tuple(
            Linear(
                name,
                value.shape[1 if transposed else 2],
                value.shape[2 if transposed else 1],
                f"{name}_bias" in names,
                "mlp_out" if _OUT.search(name) else "mlp_in",
            )
            for name, value in flat.items()
        )
        count = int(first.shape[0])
        active = min(count, read(self._facts.config, *_ACTIVE, default=count))
        return Experts(path=path, count=count, active=active, matrices=matrices, transposed=bool(transposed))

    @property
    def _experts_path(self) -> str:
        """The module whose stacked parameters are the largest."""
        sizes = {path: sum(value.numel() for value in flat.values()) for path, flat in self._stacked.items()}
        return max(sizes, key=lambda path: sizes[path])

    def kept(self) -> tuple[Kept, ...]:
        """Everything that is neither a packed linear nor an expert nor a norm."""
        experts = self._experts_path if self._stacked else None
        owned = set()
        if experts is not None:
            names = self._stacked[experts]
            owned = {f"{experts}.{name}" for name in names} | {f"{experts}.{name}_bias" for name in names}
        found: dict[str, Kept] = {}
        for path, module in self._modules.items():
            if _is_norm(module) or (is_linear(module) and path not in self._kept_linears):
                continue
            own = dict(module.named_parameters(recurse=False))
            leaf_module = not list(module.children())
            for name, value in own.items():
                full = f"{path}.{name}" if path else name
                if full in owned:
                    continue
                where = path if leaf_module and path else full
                count = 0 if id(value) in self._counted else value.numel()
                reason = self._kept_linears.get(path) or _reason(path, name, module, value, self._routed)
                before = found[where].parameters if where in found else 0
                found[where] = Kept(where, before + count, reason)
        return tuple(found.values())

    def norms(self) -> "tuple[Literal['rms', 'layer'], int, bool | Literal['whole'], tuple[Kept, ...]]":
        """Kind of norms over the hidden size, their number, norms of queries and keys, and norms of other widths."""
        sizes = {
            path: sum(value.numel() for value in module.parameters(recurse=False) if id(value) not in self._counted)
            for path, module in self._modules.items()
            if _is_norm(module)
        }
        sizes = {path: size for path, size in sizes.items() if size}
        qk_norm = self._qk_norm(sizes)
        rest = {path: size for path, size in sizes.items() if not (qk_norm and _Q_OR_K.search(path))}
        hidden = self._facts.hidden
        layer = sum(size == 2 * hidden for size in rest.values())
        rms = sum(size == hidden for size in rest.values())
        kind: Literal["rms", "layer"] = "layer" if layer > rms else "rms"
        width = 2 * hidden if kind == "layer" else hidden
        odd = tuple(Kept(path, size, "norms") for path, size in rest.items() if size != width)
        return kind, len(rest) - len(odd), qk_norm, odd

    def _qk_norm(self, sizes: Mapping[str, int]) -> bool | Literal["whole"]:
        found = tuple(size for path, size in sizes.items() if _Q_OR_K.search(path))
        if not found:
            return False
        if found == (self.head_dim, self.head_dim):
            return True
        whole = (self.heads * self.head_dim, self.kv_heads * self.head_dim)
        return "whole" if found == whole else False

    @property
    def head_dim(self) -> int:
        """Width of a head; 0 without attention."""
        if self._attention is None:
            return 0
        own = read(self._attention, "head_dim", "qk_head_dim", "head_size", "kv_channels", "d_kv")
        return own or read(self._facts.config, "head_dim", default=self._facts.hidden // max(1, self.heads))

    @property
    def heads(self) -> int:
        """Query heads; 0 without attention."""
        if self._attention is None:
            return 0
        keys = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
        return read(self._attention, *keys) or read(self._facts.config, *keys, default=1)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; 0 without attention."""
        if self._attention is None:
            return 0
        keys = dict(self._attention.named_children())
        for name in ("k_proj", "key", "wk"):
            if name in keys and is_linear(keys[name]) and self.head_dim:
                outputs = inputs_and_outputs(keys[name])[1]
                if outputs % self.head_dim == 0:
                    return outputs // self.head_dim
        own = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num", "kv_n_heads")
        return min(self.heads, read(self._attention, *own) or read(self._facts.config, *own, default=self.heads))


def _stacked(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The 3-D parameters of routed experts, a matrix an expert, by the path of the module that has them all.

    Those of a module whose forward pass is not known are not packed, as nothing could read them.
    """
    for path, module in modules.items():
        own = {name: value for name, value in module.named_parameters(recurse=False) if value.dim() == 3}
        is_whole = len(own) > 1 and len({value.shape[0] for value in own.values()}) == 1
        if is_whole and is_computed(module) and _is_expert(path, module) and "shared" not in path.rpartition(".")[2]:
            yield path, own


def _is_expert(path: str, module: nn.Module) -> bool:
    return ("xpert" in type(module).__name__ or "expert" in path) and "shared_expert" not in path.rpartition(".")[0]


def _routes(path: str, module: nn.Module) -> bool:
    """Whether a module of a layer with experts chooses among them, by its path and the class that has it."""
    return bool(_ROUTERS.search(path) or _ROUTER_CLASS.search(type(module).__name__))


def _is_transposed(flat: Mapping[str, Any], hidden: int) -> bool:
    """Whether experts are [count, inputs, outputs], by the matrix that reads hidden states."""
    name, value = next(iter(flat.items()))
    into = not _OUT.search(name)
    return bool(value.shape[1 if into else 2] == hidden and value.shape[2 if into else 1] != hidden)


@cache
def weights_rescaled(kind: Any) -> frozenset[str]:
    """Paths in a layer of the weights that a model's code multiplies in place, as RWKV's does on the way to `eval`."""
    return frozenset(re.findall(r"\bblock\.([\w.]+)\.weight\.(?:mul|div)_", inspect.getsource(kind)))


@cache
def weights_read(kind: Any) -> frozenset[str]:
    """Names of the children whose weights a module's code reads by itself, instead of calling them."""
    names: set[str] = set()
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        if name != "__init__" and function.__module__ == kind.__module__:
            names.update(_WEIGHT_READ.findall(inspect.getsource(function)))
    return frozenset(names)


def _renamed(path: str, model_type: str) -> str:
    """What transformers makes of the name of the adapter of a linear, by the linear's path in its layer."""
    name = f"{path}.lora_A.weight"
    for each in _renamings(model_type):
        name = each.rename_source_key(name)[0]
    return name


@cache
def _renamings(model_type: str) -> tuple[Any, ...]:
    """How transformers renames the tensors of old checkpoints of a type."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found = get_checkpoint_conversion_mapping(model_type) or ()
    return tuple(each for each in found if type(each) is WeightRenaming)


@cache
def _has_no_gradients(kind: Any) -> bool:
    """Whether nothing in a module has a gradient, so that no adapter would learn: it only returns indices."""
    is_theirs = kind.__module__.startswith("transformers.models")
    return kind.__name__.endswith("Indexer") or (is_theirs and "@torch.no_grad" in inspect.getsource(kind.forward))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _is_recurrent(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    is_mixer = bool(_RECURRENT.search(type(module).__name__)) and not _is_norm(module)
    return bool(names & {"A_log", "dt_bias", "time_decay"}) or (is_mixer and any(map(is_linear, module.children())))


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__
    return bool(_ATTENTION.search(kind)) and not _is_recurrent(module) and not _is_norm(module)


def _reads(path: str, inputs: int, outputs: int, hidden: int) -> Reads:
    within, _, leaf = path.rpartition(".")
    if leaf in _WRAPPED and within:
        within, _, leaf = within.rpartition(".")
    named_out = bool(_OUT.search(leaf.lower())) and outputs == hidden
    mixes = bool(_MIXER_PATH.search(within)) and not _MLP_PATH.search(within) and leaf not in ("up_proj", "down_proj")
    if mixes or (not _MLP_PATH.search(path) and not _MLP_LEAF.match(leaf) and _MIXER_LEAF.match(leaf)):
        return "attention_out" if named_out else "attention_in"
    return "mlp_out" if named_out or (outputs == hidden != inputs) else "mlp_in"


def _reason(path: str, name: str, module: nn.Module, value: Any, routed: bool) -> str:
    """Why a parameter that is no packed linear stays as it is."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or "conv" in name:
        return "convolution"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if routed and _routes(path, module):
        return ROUTER
    if isinstance(module, nn.Linear):
        return OWN_LINEAR
    if _is_expert(path, module) and value.dim() > 1:
        return UNPACKED_EXPERTS
    if "sink" in name:
        return "attention sinks"
    if _is_recurrent(module) or _RECURRENT.search(type(module).__name__):
        return "part of a recurrence"
    return "not a linear"


def _intermediate(linears: tuple[Linear, ...], experts: Experts | None) -> int:
    own = [linear.inputs for linear in linears if linear.reads == "mlp_out"]
    of_experts = [each.inputs for each in experts.matrices if each.reads == "mlp_out"] if experts else []
    return max(own or of_experts, default=0)


def _mlp(linears: tuple[Linear, ...], experts: Experts | None, config: Any) -> Literal["gated", "gelu", "relu"]:
    """A gate shows in what reads the MLP's input: twice as many outputs as its last linear has inputs."""
    every = (*linears, *(experts.matrices if experts else ()))
    into = [each for each in every if each.reads == "mlp_in"]
    out = {each.inputs for each in every if each.reads == "mlp_out"}
    if any(each.outputs // 2 in out for each in into if each.outputs % 2 == 0) or len(into) > 1:
        return "gated"
    names = ("hidden_act", "activation_function", "hidden_activation", "activation", "mlp_hidden_act")
    return "relu" if any("relu" in str(getattr(config, key, "")) for key in names) else "gelu"
