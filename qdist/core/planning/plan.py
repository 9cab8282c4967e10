"""Every decision of a run, made once by `qdist.core.planning.planner`; the rest derives from it."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from qdist.core.data.conversation import Wording
from qdist.core.data.sources import epoch_of
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import Machine, Network
from qdist.core.machine.world import World, world_of
from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.registry import ADAPTERS, adapter_parameters, beside_experts, expert_adapter_parameters
from qdist.core.model.families import FAMILIES
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import LayerShape, ModelFacts
from qdist.core.model.storage import Packing, packing_of
from qdist.core.planning.activations import Recurrence
from qdist.core.planning.memory import MemoryBudget
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import Optimizer, Placement, Schedule

VERSION = 5


class Fullest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fullest micro-batch of `samples` samples in a run, for each data-parallel rank."""

    samples: int
    positions: tuple[int, ...]
    """Positions per data-parallel rank: tokens and padding."""
    learned: tuple[int, ...]
    """Tokens with a loss per data-parallel rank."""


class Fill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How full the micro-batches of one size are: one row of packed samples, or a row a sample."""

    samples: int
    """Longest sequences that a micro-batch has room for: the plan's `micro_batch`."""
    ranks: int
    """Data-parallel ranks; 1 for rows of one sample, which are as full on any number of ranks."""
    micro_batches: float
    """Mean number of micro-batches of a rank and optimizer step."""
    share: float
    """Share of their positions that hold tokens."""
    packed: bool = True
    """Whether samples share a row of `samples` times the longest sequence; otherwise each is padded to the width of its
    micro-batch."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The samples of one source of the tokenized data set, which lie behind one another."""

    name: str
    """The source as typed, without weight and count."""
    first: int
    """Index of its first sample."""
    samples: int
    weight: float | None = None
    """Its share of the samples of a step, in proportion to the others' weights; None to take each once an epoch."""
    held_out: bool = False
    """Whether it is evaluated on instead of trained on: `data.eval`."""
    digest: str = ""
    """Digest of its files; empty if they are on a hub or it was not kept."""

    @property
    def stop(self) -> int:
        """Index behind its last sample."""
        return self.first + self.samples


class DataFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenized data set. Lengths are in tokens."""

    path: str
    """Path of the token cache; empty for synthetic data."""
    samples: int
    train_samples: int
    held_out_samples: int
    tokens: int
    longest: int
    attended: float = 0.0
    """Mean over all tokens of the length of their sample; 0 if not counted."""
    records: int = 0
    """Records in the source, dropped ones included; 0 if not counted."""
    wording: Wording | None = None
    """How its records, and prompts, become text; None for synthetic data."""
    digest: str = ""
    """Digest of the tokenized files; empty if they are on a hub or it was not kept."""
    parts: tuple[Part, ...] = ()
    """Its sources, in order; empty if it was not kept."""
    mixture: int = 0
    """Samples of an epoch of weighted sources; 0 if they have no weights, and an epoch has each sample once."""
    bad: int = 0
    """Records that could not be used and were left out, as `data.skip_bad` allows."""
    fullest: tuple[Fullest, ...] = ()
    """Fullest micro-batch for each possible micro-batch size and number of ranks; empty if not counted."""
    fills: tuple[Fill, ...] = ()
    """How full micro-batches are, by size and number of ranks, packed and not; empty if not counted."""

    @property
    def epoch(self) -> int:
        """Samples of an epoch."""
        return self.mixture or self.train_samples


def mean_length(data: DataFacts | None, *, longest: int) -> float:
    """Mean tokens of a sample; those of the longest, if the data were not read."""
    return min(data.tokens / data.samples, longest) if data and data.path and data.tokens else float(longest)


def held_out_of(samples: int, held_out: float) -> int:
    """Number of held-out samples: at least one if any are held out, and never all.

    held_out: a share below 1, or a number of samples.
    """
    wanted = held_out if held_out >= 1 else samples * held_out
    return min(max(round(wanted), 1), samples - 1) if held_out else 0


def mixture_of(parts: Sequence[Part], train_samples: Sequence[int]) -> int:
    """Samples of an epoch of weighted sources, for `DataFacts.mixture`; 0 if they have no weights.

    train_samples: of each source that is trained on.
    """
    weights = [part.weight for part in parts if part.weight is not None]
    return epoch_of(train_samples, weights) if weights else 0


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the backbone comes from."""

    kind: Literal["folder", "dummy"]
    path: str
    """The folder of a pretrained model; empty for random weights."""
    packed: str = ""
    """The folder of safetensors that ranks read: packed to the run's bits, under the names of the modules."""
    fingerprint: str = ""
    """Fingerprint of the tensors in `packed`, if that is the user's own folder, where another may replace them."""
    original: str = ""
    """Fingerprint of the weights in `path`, from which `packed` was made; empty in older plans, which kept none."""
    digest: str = ""
    """SHA-256 over names and checksums of all tensors in `packed`; empty in older plans, which kept none."""
    config: dict[str, object]
    """transformers' configuration, from which random weights are made."""
    tokenizer: str
    """Folder of the repaired tokenizer; empty if there is none."""
    gptq: Gptq | None = None
    """How a GPTQ backbone is quantized; None for others."""
    new_token_ids: tuple[int, ...] = ()
    """Vocabulary rows that the repair added."""
    vocab_rows: int | None = None
    """Rows of the embedding after the repair; None if it added none."""
    own_code: str = ""
    """Folder of Python files out of the model's own repository that every process of the run executes; empty for none.
    `spec.trust_remote_code` asks for it."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan needs first: the model as a folder, its tokenizer, the tokenized data."""

    source: Source
    data: DataFacts | None
    notes: tuple[str, ...] = ()
    """What was repaired, cut or dropped, as messages for the user."""


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The existing adapter that a run starts from."""

    path: str
    """Folder of the adapter, needed until the first checkpoint."""
    digest: str
    """SHA-256 of the adapter's tensor file."""


class RankPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one process owns. `expected` is aligned with `gpus`; a CPU rank has one entry and no GPU."""

    rank: int
    node: int
    gpus: tuple[int, ...]
    expected: tuple[MemoryBudget, ...]
    group: int = 0
    """The ranks of a group hold one backbone between them; ranks are numbered group by group."""
    position: int = 0
    """Place within the group: the shard of a sharded backbone, the stage of a split one."""


class Alternative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate that was not chosen, and why."""

    placement: Placement
    schedule: Schedule | None = None
    groups: int
    gpus_per_group: int
    micro_batch: int
    checkpointed_layers: int
    tokens_per_second: float
    """Predicted tokens/s of all ranks together; 0 if it does not fit."""
    required_bytes: int
    """Bytes on the fullest GPU; 0 for a layout that cannot exist."""
    engine: Literal["torch", "deepspeed"] = "torch"
    zero_stage: int = 0
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run, decided. Encodings (DeepSpeed, Accelerate, the launch script) are derived from it."""

    version: int = VERSION
    spec: RunSpec
    source: Source
    facts: ModelFacts
    data: DataFacts | None
    start: Start | None = None
    """Adapter to start from; None if the run makes a new one."""
    pool: int = 1
    """Inputs of a linear that share a column of the adapter's A: 1, or QA-LoRA's group size."""
    device: Literal["cuda", "cpu"]
    placement: Placement
    schedule: Schedule | None = None
    """None unless the backbone is split."""
    groups: int
    gpus_per_group: int
    layer_map: tuple[int, ...] = ()
    """Position in its group of each decoder layer of a split backbone, never decreasing; empty otherwise."""
    offloaded_layers: tuple[int, ...] = ()
    """Decoder layers whose packed weights are offloaded to host memory and visit the GPU for each use."""
    world_size: int
    micro_batch: int
    gradient_accumulation: int
    """Micro-batches of a rank and optimizer step; packed ones vary, and this is their mean, rounded up."""
    packed: bool = False
    """Whether a micro-batch is one row of `micro_batch * seq_len` positions that holds as many samples as fit."""
    fill: Fill | None = None
    """How full its micro-batches are expected to be; None if all samples count as the longest."""
    graphs: bool = False
    """Whether the passes of a micro-batch are captured as a CUDA graph, once a shape, and replayed."""
    steps: int
    seq_len: int
    """Tokens of the longest sequence that the ranks will see: `spec.seq_len`, or less if the data are shorter."""
    checkpointed_layers: int
    """Decoder layers, from the first, that are recomputed in the backward pass; the others keep what they computed."""
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    optimizer: Optimizer
    engine: Literal["torch", "deepspeed"]
    zero_stage: int
    liger: bool
    recurrence: Recurrence | None = None
    """Kernel that recurrent layers run; None if there are none."""
    threads_per_rank: int
    ranks: tuple[RankPlan, ...]
    tokens_per_second: float = 0.0
    """Predicted tokens/s of all ranks together, without padding; 0 if the device's speed is unknown."""
    load_peak_bytes: int = 0
    """Predicted peak bytes of a GPU while the backbone is loaded."""
    nodes: tuple[Machine, ...] = ()
    """Nodes with the GPUs (CPU ranks) that the run may use of each; empty for one machine."""
    network: Network | None = None
    """The network between them that the predictions assume; None for one machine."""
    network_bytes: int = 0
    """Bytes that a node sends to others in an optimizer step: of the node that sends most."""
    network_seconds: float = 0.0
    """Seconds that the network adds to an optimizer step, also where the device's speed is unknown."""
    alternatives: tuple[Alternative, ...] = ()
    correction: Correction | None = None
    """Correction learnt from earlier runs on this machine, already applied to the predictions."""
    notes: tuple[str, ...]
    """What was decided for the user, and why."""

    @property
    def world(self) -> World:
        """Its ranks on their nodes."""
        numbers = Counter(rank.node for rank in self.ranks)
        nodes = tuple(numbers[node] for node in sorted(numbers)) if len(numbers) > 1 else ()
        return world_of(self.groups, self.gpus_per_group, size=self.world_size, nodes=nodes)

    @property
    def useful_share(self) -> float:
        """Expected share of the computed positions that hold tokens."""
        return self.fill.share if self.fill else 1.0

    @property
    def positions_per_second(self) -> float:
        """Predicted positions/s of all ranks together, padding included; 0 if the device's speed is unknown."""
        return self.tokens_per_second / self.useful_share

    @property
    def step_tokens(self) -> float:
        """Expected tokens of an optimizer step, without padding."""
        return self.spec.batch * mean_length(self.data if self.fill else None, longest=self.seq_len)

    @property
    def wording(self) -> Wording | None:
        """How the run's records became text; None for random tokens, and for older runs, which did not keep it."""
        return self.data.wording if self.data else None

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer, as the run learned it."""
        return self.wording.ends if self.wording else ()

    @property
    def adapter(self) -> LoraMethod:
        """Adapter method that is trained."""
        return ADAPTERS[self.spec.method](self.pool)

    @property
    def adapter_parameters(self) -> int:
        """Adapter parameters of the whole model, beside linears and experts."""
        return adapter_parameters(self.facts, self.spec.lora.r, self.spec.lora.targets, self.adapter)

    @property
    def expert_adapter_parameters(self) -> int:
        """Those of them that are beside experts."""
        return expert_adapter_parameters(self.facts, self.spec.lora.r, self.spec.lora.targets)

    @property
    def active_adapter_parameters(self) -> float:
        """Adapter parameters that a token passes: of experts' those of the ones that it visits."""
        lora, idle = self.spec.lora, 0.0
        for run in self.facts.layers:
            if experts := run.shape.experts:
                idle += (
                    (1 - experts.active / experts.count) * run.count * beside_experts(run.shape, lora.r, lora.targets)
                )
        return self.adapter_parameters - idle

    @property
    def grouped(self) -> bool:
        """Whether one kernel multiplies all experts: torch's, for bfloat16 on GPUs; else they are taken in turn."""
        return self.device == "cuda" and self.compute_dtype == "bfloat16"

    @property
    def packing(self) -> Packing | None:
        """How the weights are packed; None if they come as GPTQ."""
        return None if self.source.gptq else packing_of(self.spec, self.source.config)

    @property
    def checkpointing(self) -> bool:
        """Whether any layer is recomputed in the backward pass."""
        return self.checkpointed_layers > 0

    @property
    def data_parallel(self) -> int:
        """Micro-batches computed at a time on different samples; the stages of a pipeline share one."""
        return self.groups if self.layer_map else self.world_size


def upgraded(found: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of an earlier version, as read from its JSON, in the fields of this one; any other as it is."""
    if found.get("version") not in (2, 3, 4):
        return dict(found)
    found = {**found, "spec": _with_section_of_data(found.get("spec"))}
    if found["version"] == 4:
        return {**found, "version": VERSION}
    fields = {key: value for key, value in found.items() if key != "memory_cap_bytes"}  # spec.max_memory says it
    facts = found.get("facts")
    if isinstance(facts, Mapping):
        facts = facts if found["version"] == 3 else _facts_in_runs(facts)
        own = FAMILIES.get(str(facts.get("family")))
        facts = {**facts, **({"modules": own.modules} if own else {})}
    return {**fields, "version": VERSION, "facts": facts}


def _with_section_of_data(spec: Any) -> Any:
    """A spec from before `data` had settings of its own."""
    data = spec.get("data") if isinstance(spec, Mapping) else None
    return {**spec, "data": {"path": data}} if isinstance(data, str) else spec


def _facts_in_runs(facts: Mapping[str, Any]) -> Any:
    """Facts of a model whose layers all had one shape, from an earlier version."""
    renamed = {"norms" if key == "norms_per_layer" else key: value for key, value in facts.items()}
    shape = {key: renamed.pop(key) for field in msgspec.structs.fields(LayerShape) if (key := field.name) in renamed}
    return {**renamed, "layers": [{"shape": shape, "count": renamed.get("layers")}]}


def digest(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(plan, order="sorted")).hexdigest()
