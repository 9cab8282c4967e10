"""Which linears, experts and kept modules do the layers of several families have?"""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from qdist.core.model.shapes import Experts, Kept, LayerRun, LayerShape, Linear

ROUTER = "router"
"""Reason why a router is kept in 16 bits: which experts a token visits depends on small differences of its output."""
TOO_SMALL = "too small to pack"
NORM = "norms"
CONVOLUTION = "convolution"
RECURRENCE = "part of a recurrence"
SINKS = "attention sinks"


def attention_linears(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    query_gate: bool = False,
) -> tuple[Linear, ...]:
    """Llama's four linears of attention. out_bias: None for `bias`. query_gate: q_proj also makes the output's gate."""
    return (
        Linear("q_proj", hidden, heads * head_dim * (2 if query_gate else 1), bias, "attention_in"),
        Linear("k_proj", hidden, kv_heads * head_dim, bias, "attention_in"),
        Linear("v_proj", hidden, kv_heads * head_dim, bias, "attention_in"),
        Linear("o_proj", heads * head_dim, hidden, bias if out_bias is None else out_bias, "attention_out"),
    )


def mlp_linears(
    hidden: int, inner: int, *, bias: bool = False, fused: bool = False, gated: bool = True, within: str = ""
) -> tuple[Linear, ...]:
    """Llama's three linears of an MLP. fused: gate and up are one. gated: whether there is a gate."""
    apart = [("gate_proj", inner), ("up_proj", inner)] if gated else [("up_proj", inner)]
    up = [("gate_up_proj", 2 * inner)] if fused else apart
    return (
        *(Linear(leaf, hidden, width, bias, "mlp_in", within) for leaf, width in up),
        Linear("down_proj", inner, hidden, bias, "mlp_out", within),
    )


def gated_experts(
    hidden: int,
    inner: int,
    *,
    count: int,
    active: int,
    path: str = "mlp.experts",
    bias: bool = False,
    transposed: bool = False,
) -> Experts:
    """Experts with gate and up in one matrix."""
    matrices = (
        Linear("gate_up_proj", hidden, 2 * inner, bias, "mlp_in"),
        Linear("down_proj", inner, hidden, bias, "mlp_out"),
    )
    return Experts(path=path, count=count, active=active, matrices=matrices, transposed=transposed)


def router(parameters: int, path: str = "mlp.gate") -> Kept:
    """A router, which is neither packed nor adapted."""
    return Kept(path, parameters, ROUTER)


class Mlp(NamedTuple):
    """The part of a layer behind its attention: an MLP, or experts with a router."""

    linears: tuple[Linear, ...]
    intermediate: int
    """Width of the MLP that every token visits; of an expert where there is none."""
    experts: Experts | None = None
    kept: tuple[Kept, ...] = ()


def in_runs(shapes: Iterable[LayerShape]) -> tuple[LayerRun, ...]:
    """The layers of a model, run-length coded."""
    return tuple(LayerRun(shape, len(list(same))) for shape, same in groupby(shapes))
