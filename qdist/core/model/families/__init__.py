"""Which model families are there, and which of them is a configuration of?"""

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import structs

from qdist.core.errors import ModelError
from qdist.core.model.config import Keys
from qdist.core.model.families.arcee import ARCEE
from qdist.core.model.families.baichuan import BAICHUAN
from qdist.core.model.families.bloom import BLOOM
from qdist.core.model.families.cohere2 import COHERE2
from qdist.core.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from qdist.core.model.families.family import Family
from qdist.core.model.families.gemma2 import GEMMA2
from qdist.core.model.families.gemma3 import GEMMA3, GEMMA3_TEXT
from qdist.core.model.families.gemma4 import GEMMA4, GEMMA4_TEXT
from qdist.core.model.families.glm import GLM, GLM4
from qdist.core.model.families.glm4_moe import GLM4_MOE, GLM4_MOE_LITE
from qdist.core.model.families.gpt2 import GPT2
from qdist.core.model.families.gpt_neox import GPT_NEOX
from qdist.core.model.families.gpt_oss import GPT_OSS
from qdist.core.model.families.granite import GRANITE
from qdist.core.model.families.llama import LLAMA
from qdist.core.model.families.mistral import MISTRAL
from qdist.core.model.families.mistral3 import MINISTRAL3, MISTRAL3
from qdist.core.model.families.mixtral import MIXTRAL
from qdist.core.model.families.olmo2 import OLMO2
from qdist.core.model.families.olmo3 import OLMO3
from qdist.core.model.families.opt import OPT
from qdist.core.model.families.phi3 import PHI3
from qdist.core.model.families.qwen import QWEN2, QWEN3
from qdist.core.model.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT
from qdist.core.model.families.qwen3_moe import QWEN3_MOE
from qdist.core.model.families.seed_oss import SEED_OSS
from qdist.core.model.families.smollm3 import SMOLLM3
from qdist.core.model.shapes import ModelFacts

_FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, BLOOM, OPT, GPT_NEOX, BAICHUAN, GLM, GLM4, OLMO2),
    *(PHI3, SMOLLM3, GRANITE, OLMO3, COHERE2, ARCEE, SEED_OSS),
    *(GEMMA2, GEMMA3_TEXT, GEMMA3, GEMMA4_TEXT, GEMMA4, MINISTRAL3, MISTRAL3),
    *(QWEN3_MOE, MIXTRAL, QWEN3_5_TEXT, QWEN3_5, QWEN3_5_MOE_TEXT, QWEN3_5_MOE, QWEN3_NEXT, GPT_OSS),
    *(GLM4_MOE, GLM4_MOE_LITE, DEEPSEEK_V2, DEEPSEEK_V3, GPT2),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
"""Each family by its `model_type`, in the order in which models are listed."""
_TOKENS = "tokenizer.ggml.tokens"


def from_config(config: Mapping[str, object], *, name: str) -> ModelFacts:
    """Facts from the content of a config.json. Keys a family may omit take transformers' defaults.

    Raises ModelError when the model_type is not supported, a key is missing or its value is of the wrong kind.
    """
    keys = Keys(config, name)
    family = keys.text("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        own = ", and brings code of its own" if config.get("auto_map") else ""
        raise ModelError(f"{name} has model_type {family!r}, which qdist does not know{own}", try_=f"one of: {known}")
    known_family = FAMILIES[family]
    return structs.replace(known_family.read(keys), modules=known_family.modules, measured=known_family.measured)


def config_of_header(
    metadata: Mapping[str, object], lengths: Mapping[str, int], tensors: Collection[str], *, name: str
) -> dict[str, Any]:
    """The shape that the header of a GGUF file states, as a config.json.

    metadata: its keys with one value each. lengths: of its keys that hold an array, how long that is.
    tensors: names of all tensors of the model.
    Raises ModelError for an architecture that qdist does not read.
    """
    readable = {key: own.gguf.header_keys for key, own in FAMILIES.items() if own.gguf and own.gguf.header_keys}
    architecture = str(metadata.get("general.architecture"))
    if architecture not in readable:
        raise ModelError(
            f"{name} has architecture {architecture!r}, which qdist does not read from GGUF",
            try_=f"one of {', '.join(readable)}, or the model's own folder or hub id",
        )
    found = {key: metadata.get(f"{architecture}.{own}") for own, key in readable[architecture].items()}
    config = {key: value for key, value in found.items() if value is not None}
    if _TOKENS in lengths:
        config.setdefault("vocab_size", lengths[_TOKENS])
    return {"model_type": architecture, **config, "tie_word_embeddings": "output.weight" not in tensors}


def require_library_class(config: Mapping[str, object], *, name: str, trusted: bool = False) -> None:
    """Raise ModelError for a model that only code out of its own repository computes. config: of its config.json.

    trusted: whether that code may be run.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family and family.own_code and not trusted:
        raise own_code(name)


def own_code(name: str) -> ModelError:
    """The error for a model whose own code would have to be run, which nobody has asked for."""
    return ModelError(
        f"transformers has no class for {name}: Python files out of its own repository compute it, and would run on "
        "this machine with all your rights",
        try_="--trust-remote-code with its folder or hub id, once you have read those files",
    )
