"""A plan as lines for a person."""

from qdist.core.plan import Plan
from qdist.core.units import format_bytes, format_count

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "gathers", "context")


def plan_lines(plan: Plan, *, notes: tuple[str, ...] = ()) -> list[str]:
    """What will run, where, and what each rank will hold."""
    spec, budget = plan.spec, plan.ranks[0].expected[0]
    where = _count(plan.world_size, "GPU", "s")
    if plan.device == "cpu":
        threads = _count(plan.threads_per_rank, "thread", "s")
        where = f"{_count(plan.world_size, 'CPU process', 'es')} of {threads}: no GPU here"
    weights = f"{spec.bits} bits" + (
        f" {spec.quant.type}{', double quantization' if spec.quant.double else ''}" if spec.bits == 4 else ""
    )
    trained = plan.facts.adapter_parameters(spec.lora.r, spec.lora.targets)
    lines = [
        f"model    {spec.model}: {format_count(plan.facts.parameters)} parameters, {weights}, "
        f"{plan.compute_dtype} arithmetic",
        f"adapter  LoRA r={spec.lora.r} alpha={spec.lora.alpha:g}: {format_count(trained)} parameters",
        f"ranks    {where}",
        f"engine   {_engine(plan)}, {plan.optimizer}",
        f"batch    {spec.global_batch} = {_count(plan.world_size, 'rank', 's')} x {plan.gradient_accumulation} x "
        f"{_count(plan.micro_batch, 'sample', 's')} of up to {plan.seq_len} tokens"
        + (", checkpointing" if plan.checkpointing else "")
        + (", Liger kernels" if plan.liger else ""),
        f"steps    {plan.steps:,}"
        + (f" over {plan.data.train_samples:,} samples, {plan.data.held_out_samples:,} held out" if plan.data else ""),
        f"memory   {format_bytes(budget.required)} a rank"
        + (f", and {format_bytes(budget.pageable)} of optimizer state where there is room" if budget.pageable else ""),
        "         at the peak: "
        + ", ".join(f"{name} {format_bytes(getattr(budget, name))}" for name in _PARTS if getattr(budget, name)),
    ]
    return lines + [f"note     {note}" for note in (*notes, *plan.notes)]


def _count(number: int, name: str, plural: str) -> str:
    return f"{number} {name}{'' if number == 1 else plural}"


def _engine(plan: Plan) -> str:
    if plan.engine == "torch":
        return "torch, one rank"
    return f"DeepSpeed ZeRO-{plan.zero_stage}" + (" with CPU offload" if plan.spec.zero.offload == "cpu" else "")
