"""How many parameters have the towers that are left out of a model of images and text?"""

from qdist.core.model.config import Keys
from qdist.core.model.shapes import Kept

REASON = "not needed for text"


def left_out(path: str, parameters: int) -> Kept:
    """A tower that is not loaded."""
    return Kept(path, parameters, REASON)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def siglip(vision: Keys) -> int:
    """Parameters of a SigLIP tower."""
    hidden, inner = vision.count("hidden_size", default=768), vision.count("intermediate_size", default=3072)
    patch = vision.count("patch_size", default=16)
    positions = (vision.count("image_size", default=224) // patch) ** 2
    norm = 2 * hidden
    layer = 4 * _linear(hidden, hidden) + _linear(hidden, inner) + _linear(inner, hidden) + 2 * norm
    head = 5 * hidden + 4 * hidden**2 + norm + _linear(hidden, inner) + _linear(inner, hidden)
    return (
        _linear(vision.count("num_channels", default=3) * patch**2, hidden)
        + positions * hidden
        + vision.count("num_hidden_layers", default=12) * layer
        + norm
        + head * vision.flag("vision_use_head", default=True)
    )


def pixtral(vision: Keys) -> int:
    """Parameters of a Pixtral tower."""
    hidden, inner = vision.count("hidden_size", default=1024), vision.count("intermediate_size", default=4096)
    layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    patches = vision.count("num_channels", default=3) * vision.count("patch_size", default=16) ** 2 * hidden
    return patches + hidden + vision.count("num_hidden_layers", default=24) * layer


def qwen(vision: Keys) -> int:
    """Parameters of the tower of Qwen3.5, with its merger of patches."""
    hidden, inner = vision.count("hidden_size", default=1152), vision.count("intermediate_size", default=4304)
    patch, frames = vision.count("patch_size", default=16), vision.count("temporal_patch_size", default=2)
    merged = hidden * vision.count("spatial_merge_size", default=2) ** 2
    norm = 2 * hidden
    layer = 2 * norm + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    layer += _linear(hidden, inner) + _linear(inner, hidden)
    merger = norm + _linear(merged, merged) + _linear(merged, vision.count("out_hidden_size", default=3584))
    return (
        _linear(vision.count("in_channels", default=3) * frames * patch**2, hidden)
        + vision.count("num_position_embeddings", default=2304) * hidden
        + vision.count("depth", default=27) * layer
        + merger
    )


def gemma4(vision: Keys) -> int:
    """Parameters of the tower of Gemma 4."""
    hidden, inner = vision.count("hidden_size", default=768), vision.count("intermediate_size", default=3072)
    heads, kv_heads = vision.count("num_attention_heads", default=12), vision.count("num_key_value_heads", default=12)
    head_dim = vision.count("head_dim", default=64)
    attention = 2 * hidden * (heads + kv_heads) * head_dim + 2 * head_dim
    layer = attention + 3 * hidden * inner + 4 * hidden
    patches = 3 * vision.count("patch_size", default=16) ** 2 * hidden
    positions = 2 * vision.count("position_embedding_size", default=10_240) * hidden
    return patches + positions + vision.count("num_hidden_layers", default=16) * layer
