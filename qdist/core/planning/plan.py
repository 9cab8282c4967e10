"""Every decision of a run, made once by `qdist.core.planning.planner`; the rest derives from it."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from qdist.core.data.conversation import Wording
from qdist.core.machine.calibration import Correction
from qdist.core.machine.world import World
from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.registry import ADAPTERS, adapter_parameters
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import LayerShape, ModelFacts
from qdist.core.planning.memory import MemoryBudget
from qdist.core.spec.run_spec import Placement, RunSpec, Schedule

VERSION = 3


class Fullest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most that a micro-batch of so many samples holds in a run, for each of its data-parallel ranks."""

    samples: int
    positions: tuple[int, ...]
    """Tokens and padding."""
    learned: tuple[int, ...]
    """Tokens with a loss."""


class DataFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenized data set. Lengths in tokens."""

    path: str
    """The token cache; empty for synthetic data."""
    samples: int
    train_samples: int
    held_out_samples: int
    tokens: int
    longest: int
    records: int = 0
    """Of the source, the dropped ones included; 0 where nobody counted."""
    wording: Wording | None = None
    """How its records became text, which prompts do as well; None for synthetic data."""
    digest: str = ""
    """Of the files that were tokenized; empty where they lie on a hub, or nobody kept it."""
    fullest: tuple[Fullest, ...] = ()
    """For each size of a micro-batch and number of ranks that there may be; empty where nobody has counted."""


def held_out_of(samples: int, share: float) -> int:
    """Samples that are held out: at least one where the share is above 0, and never all."""
    return min(max(round(samples * share), 1), samples - 1) if share else 0


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the backbone comes from."""

    kind: Literal["folder", "dummy"]
    path: str
    """The folder of a pretrained model; empty for random weights."""
    packed: str = ""
    """The folder of safetensors that ranks read: packed to the run's bits, under the names of the modules."""
    fingerprint: str = ""
    """Of the tensors in `packed`, where that is the user's model as it came, which another may replace."""
    original: str = ""
    """Fingerprint of the weights in `path`, from which `packed` was made; empty in plans of a qdist that kept none."""
    digest: str = ""
    """SHA-256 over names and checksums of all tensors in `packed`; empty in plans of a qdist that kept none."""
    config: dict[str, object]
    """transformers' configuration, from which random weights are made."""
    tokenizer: str
    """The folder of the repaired tokenizer; empty where there is none."""
    gptq: Gptq | None = None
    """How a GPTQ backbone is quantized; None for others."""
    new_token_ids: tuple[int, ...] = ()
    """Vocabulary rows that the repair added."""
    vocab_rows: int | None = None
    """Rows of the embedding after the repair, where it added any."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be there before a plan: the model as a folder, its tokenizer, the tokenized data."""

    source: Source
    data: DataFacts | None
    notes: tuple[str, ...] = ()
    """What was repaired, cut or dropped, for the user."""


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter that a run starts from."""

    path: str
    """Its folder, needed until the first checkpoint."""
    digest: str
    """SHA-256 of its file of tensors."""


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
    """A way to run that lost, and why."""

    placement: Placement
    schedule: Schedule | None = None
    groups: int
    gpus_per_group: int
    micro_batch: int
    checkpointed_layers: int
    tokens_per_second: float
    """Predicted, all ranks together; 0 where it does not fit."""
    required_bytes: int
    """Of the fullest GPU; 0 for a layout that cannot exist."""
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
    """None where the run makes a new adapter."""
    pool: int = 1
    """Inputs of a linear that share a column of the adapter's A: 1, or QA-LoRA's group."""
    device: Literal["cuda", "cpu"]
    placement: Placement
    schedule: Schedule | None = None
    """None unless the backbone is split."""
    groups: int
    gpus_per_group: int
    layer_map: tuple[int, ...] = ()
    """Of a split backbone: each decoder layer's position in its group, never decreasing. Empty otherwise."""
    offloaded_layers: tuple[int, ...] = ()
    """Decoder layers whose packed weights are offloaded to host memory and visit the GPU for each use."""
    world_size: int
    micro_batch: int
    gradient_accumulation: int
    steps: int
    seq_len: int
    """Longest sequence that the ranks will see: `spec.seq_len`, or less where the data are shorter."""
    checkpointed_layers: int
    """Decoder layers, from the first, that are recomputed in the backward pass; the others keep what they computed."""
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    optimizer: Literal["adamw", "paged-adamw"]
    engine: Literal["torch", "deepspeed"]
    zero_stage: int
    liger: bool
    threads_per_rank: int
    ranks: tuple[RankPlan, ...]
    tokens_per_second: float = 0.0
    """Predicted, all ranks together; 0 where nothing is known of the device."""
    load_peak_bytes: int = 0
    """Predicted peak of a GPU while the backbone is loaded."""
    alternatives: tuple[Alternative, ...] = ()
    correction: Correction | None = None
    """What earlier runs on this machine had taught, and is in the predictions."""
    notes: tuple[str, ...]
    """What was decided for the user, and why."""

    @property
    def world(self) -> World:
        """Its ranks on their nodes."""
        nodes = 1 + max(rank.node for rank in self.ranks)
        return World(self.groups, self.gpus_per_group, self.groups * self.gpus_per_group // self.world_size, nodes)

    @property
    def wording(self) -> Wording | None:
        """How the run's records became text; None for random tokens, and for runs of a qdist that did not keep it."""
        return self.data.wording if self.data else None

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end the answers that the run learned."""
        return self.wording.ends if self.wording else ()

    @property
    def adapter(self) -> LoraMethod:
        """What is trained."""
        return ADAPTERS[self.spec.method](self.pool)

    @property
    def adapter_parameters(self) -> int:
        """Trained parameters beside the linears of the whole model."""
        return adapter_parameters(self.facts, self.spec.lora.r, self.spec.lora.targets, self.adapter)

    @property
    def checkpointing(self) -> bool:
        """Whether any layer is recomputed in the backward pass."""
        return self.checkpointed_layers > 0

    @property
    def data_parallel(self) -> int:
        """Micro-batches that are computed at a time, on different samples: a pipeline's stages share theirs."""
        return self.groups if self.layer_map else self.world_size


def upgraded(found: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of an earlier version, as read from its JSON, in the fields of this one; any other as it is."""
    if found.get("version") != 2:
        return dict(found)
    fields = {key: value for key, value in found.items() if key != "memory_cap_bytes"}  # spec.max_memory says it
    return {**fields, "version": VERSION, "facts": _facts_in_runs(found.get("facts"))}


def _facts_in_runs(facts: Any) -> Any:
    """Facts of a model of which all layers were of one shape."""
    if not isinstance(facts, Mapping):
        return facts
    renamed = {"norms" if key == "norms_per_layer" else key: value for key, value in facts.items()}
    shape = {key: renamed.pop(key) for field in msgspec.structs.fields(LayerShape) if (key := field.name) in renamed}
    return {**renamed, "layers": [{"shape": shape, "count": renamed.get("layers")}]}


def digest(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(plan, order="sorted")).hexdigest()
