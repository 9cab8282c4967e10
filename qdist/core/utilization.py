"""Which share of the GPUs' arithmetic does a run put to use (MFU, model FLOP utilization)?"""

from qdist.core.plan import Plan
from qdist.core.snapshot import Snapshot


def model_flops_per_token(plan: Plan) -> float:
    """Floating-point operations that a token needs, forward and backward, whatever the implementation does.

    The convention is PaLM's (appendix B) for frozen weights: 2 a weight forward and 2 backward, since no gradient of
    a frozen weight is made; 6 an adapter parameter; causal attention scores over half of `seq_len`, forward once and
    backward twice. The head counts as a weight, the embedding's look-up as nothing, recomputation as nothing.
    """
    facts, lora = plan.facts, plan.spec.lora
    weights = facts.layers * sum(linear.weights for linear in facts.linears) + facts.vocab * facts.hidden
    adapter = facts.adapter_parameters(lora.r, lora.targets, plan.pool)
    scores = 6 * plan.seq_len * facts.heads * facts.head_dim * facts.layers
    return 4.0 * weights + 6 * adapter + scores


def mfu(snapshot: Snapshot, tokens_per_s: float | None) -> float | None:
    """A share: model FLOPs a second, by the sustained 16-bit matmul rate of all GPUs; None where a part is unknown."""
    gpus = sum(len(rank.gpus) for rank in snapshot.plan.ranks)
    if not gpus or not snapshot.matmul_flops_s or tokens_per_s is None:
        return None
    return tokens_per_s * model_flops_per_token(snapshot.plan) / (gpus * snapshot.matmul_flops_s)
