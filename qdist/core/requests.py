"""What may a process that imports torch be asked to do? A request a job, refused here where arguments alone tell.

A command's flags are the fields of its request that have a description (`cli.settings.flags_of`); nothing else checks
them. What needs a file, a GPU or a model to be looked at is checked by the command, before the process is started.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from qdist.core import errors
from qdist.core.data.overview import Overview
from qdist.core.data.reading import Reading
from qdist.core.errors import QdistError, SpecError, flag_of
from qdist.core.model.gptq import WORD, Gptq, Override, Shape
from qdist.core.model.shapes import ModelFacts
from qdist.core.model.storage import GgufType, Packing
from qdist.core.planning.plan import Prepared
from qdist.core.sampling import Sampling
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import Count, Positive
from qdist.core.text import parse_bytes, quoted

Kind = TypeVar("Kind", bound=msgspec.Struct)
Bits = Literal[2, 3, 4, 8]
Onto = Literal["dequantized", "original"]
"""A backbone as training sees it, or as it was before it was packed."""
_KEPT = "the same command goes on from what is written"
_OUT_FOLDER = "Folder to write; must be empty or absent."


def _help(text: str) -> Meta:
    """Help text of a field's flag; a field without it is not a flag."""
    return Meta(description=text)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True, tag_field="job"):
    """One job for a process of its own. `composed.request_of` makes one of flags or keywords."""

    asks: ClassVar[bool] = False
    """Whether it reads standard input and handles Ctrl-C itself."""
    passes_on_sigterm: ClassVar[bool] = False
    """Whether SIGTERM is for it to handle: it finishes what it is at."""
    when_stopped: ClassVar[str] = ""
    """Message for the user after Ctrl-C has ended it."""


class Prepare(Request, frozen=True, kw_only=True):
    """Convert, repair, pack and tokenize what a run needs; answered with `Prepared`."""

    spec: RunSpec


class PrepareModel(Request, frozen=True, kw_only=True):
    """Convert, repair and pack a model alone; answered with `Prepared` without data."""

    spec: RunSpec


class Describe(Request, frozen=True, kw_only=True):
    """Read a model's facts from transformers' class for it; answered with `ModelFacts`."""

    config: dict[str, Any]
    """The content of its config.json."""
    name: str
    """What the user calls the model."""
    code: str = ""
    """Folder of the model's own code, if its user has asked to run that."""


class Gather(Request, frozen=True, kw_only=True):
    """Write a run's adapter from one of its checkpoints."""

    run: str
    checkpoint: Annotated[str, _help("last, best, or a step.")] = "last"
    out: Annotated[str | None, _help("A folder to write instead; must not be there yet.  [default: RUN/adapter]")] = (
        None
    )


class Folding(Request, frozen=True, kw_only=True):
    """Fields common to all ways of exporting one or several runs over one base."""

    runs: tuple[str, ...]
    out: Annotated[str, _help("What to write; must not be there yet.")]
    weights: Annotated[
        tuple[float, ...], _help("What each run's update is multiplied by, such as 0.7,0.3.  [default: 1]")
    ] = ()
    onto: Annotated[
        Onto | None, _help("16 bits: what the adapter was trained on, or the original.  [default: dequantized]")
    ] = None
    dtype: Annotated[Literal["bfloat16", "float16"] | None, _help("16 bits.  [default: bfloat16]")] = None

    def __post_init__(self) -> None:
        factors, count = self.weights, len(self.runs)
        if factors and len(factors) != count:
            raise SpecError(f"weights are {len(factors)}, runs are {count}", try_="a weight for each run")
        if not all(map(math.isfinite, factors)):
            text = ",".join(f"{factor:g}" for factor in factors)
            raise SpecError(f"weights cannot be {text!r}: they are finite", try_="such as 0.7,0.3")

    @property
    def backbone(self) -> Onto:
        """Which weights the update is added to."""
        return self.onto or "dequantized"

    @property
    def stored(self) -> Literal["bfloat16", "float16"]:
        """Dtype in which 16-bit weights are written."""
        return self.dtype or "bfloat16"


class Merge(Folding, frozen=True, kw_only=True):
    """Fold adapters into their backbone, and evaluate what that costs."""

    when_stopped = _KEPT


class Export(Folding, frozen=True, kw_only=True):
    """Write what runs have learnt in a form that needs no qdist."""

    to: Annotated[
        Literal["lora", "vllm", "16bit", "gguf", "gptq", "zeros"],
        _help(
            "lora: an ordinary LoRA adapter. vllm: adapters of experts, as vLLM reads them. 16bit: merged, for plain "
            "transformers. gguf: merged, for llama.cpp. gptq: merged and quantized again. zeros: QA-LoRA in integer "
            "zeros."
        ),
    ]
    type: Annotated[GgufType | None, _help("gguf.  [default: q4_1 where QA-LoRA's groups allow it, else f16]")] = None
    data: Annotated[str | None, _help("gptq: calibration data.  [default: the run's own]")] = None
    samples: Annotated[Positive | None, _help("gptq: of them.  [default: 128]")] = None
    bits: Annotated[Bits | None, _help("gptq.  [default: as the run's own, or 4]")] = None
    group_size: Annotated[int | None, _help("gptq.  [default: as the run's own, or 128]")] = None
    lossy: Annotated[bool, _help("zeros: write them, whatever is lost.")] = False
    cached: bool = False
    """Whether the file is for an engine of qdist's, which asks: nothing is said, and no Modelfile written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("onto", "dtype", "type", "data", "samples", "bits", "group_size", "lossy"):
            if getattr(self, name) not in (None, False) and name not in _OF_TARGET[self.to]:
                owners = " and ".join(target for target, options in _OF_TARGET.items() if name in options)
                raise SpecError(f"{flag_of(name)} is of --to {owners}, not {self.to}", try_="leave it out")
        if self.to == "gguf" and not self.out.endswith(".gguf"):
            raise SpecError(
                f"{self.out} is not the name of a GGUF file", try_=quoted("--out", f"{self.out.rstrip('/')}.gguf")
            )
        _check_group_size(self.group_size)


_OF_TARGET: Mapping[str, tuple[str, ...]] = {
    "lora": (),
    "vllm": (),
    "16bit": ("onto", "dtype"),
    "gguf": ("onto", "type"),
    "gptq": ("onto", "data", "samples", "bits", "group_size"),
    "zeros": ("lossy",),
}
"""Fields of `Export` that only some targets take, by target."""


class Pack(Request, frozen=True, kw_only=True):
    """Pack a model by bitsandbytes."""

    when_stopped = _KEPT

    model: str
    out: Annotated[str, _help(_OUT_FOLDER)]
    method: Literal["nf4", "fp4", "int8"] = "nf4"
    double: Annotated[bool | None, _help("Quantize the scales of 4-bit blocks too.  [default: double]")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _help("Of what is not packed, and what is packed from; auto: as the model is stored."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, _help("Run the Python files of the model's own repository where transformers has no class for it.")
    ] = False

    def __post_init__(self) -> None:
        if self.method == "int8" and self.double is not None:
            raise SpecError(
                "--double and --no-double are of 4-bit blocks; int8 has one scale a row", try_="leave it out"
            )

    @property
    def packing(self) -> Packing:
        """Packing of the weights."""
        if self.method == "int8":
            return Packing(bits=8, dtype=self.dtype)
        return Packing(bits=4, type=self.method, double=self.double is not False, dtype=self.dtype)


class GptqSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How GPTQ is to quantize."""

    data: Annotated[str, _help("GPTQ: calibration data, a .txt file or what `launch --data` takes.")] = ""
    reading: Reading = Reading()
    """How the records of `data` are read."""
    skip_bad: int = 0
    """Records that cannot be used and may be left out."""
    bits: tuple[Bits, ...] = (4,)
    """Widths to try for each linear, narrowest first; the last is used if none meets `max_error`."""
    max_error: Annotated[float, _help("GPTQ: relative squared error of outputs, for --candidate-bits.")] = 0.0
    """Relative error of a linear's outputs that ends the trying."""
    group_size: Annotated[int, _help("GPTQ: inputs that share a scale; -1: all.")] = 128
    sym: Annotated[bool, _help("GPTQ: zeros in the middle of the range.")] = True
    desc_act: Annotated[bool, _help("GPTQ: take inputs by falling activation.")] = False
    format: Annotated[
        Literal["gptq", "gptq_v2"], _help("GPTQ: of the files.  [default: gptq where all read it alike]")
    ] = "gptq"
    samples: Annotated[Positive, _help("GPTQ: calibration samples.")] = 128
    seq_len: Annotated[Count, _help("GPTQ: tokens of each; 0: 2048, if the model can.")] = 0
    seed: Annotated[Count, _help("GPTQ: of the choice of samples.")] = 0
    damping: Annotated[float, _help("GPTQ: part of the Hessian's mean diagonal added to it.")] = 0.01

    def __post_init__(self) -> None:
        if not self.data:
            raise SpecError("gptq needs calibration data", try_="--data FILE, such as what it will be trained on")
        _check_group_size(self.group_size)
        if not 0 < self.damping <= 1:
            raise SpecError(f"damping cannot be {self.damping:g}: it is above 0 and at most 1", try_="--damping 0.01")
        if not 0 <= self.max_error < 1 or (len(self.bits) > 1 and not self.max_error):
            raise SpecError(f"max error cannot be {self.max_error:g}: it is between 0 and 1", try_="--max-error 0.05")

    def gptq(self, bits: Bits, overrides: tuple[Override, ...] = ()) -> Gptq:
        """GPTQ settings stated by the checkpoint."""
        shape = Shape(bits, self.group_size)
        return Gptq(shape=shape, sym=self.sym, desc_act=self.desc_act, format=self.format, overrides=overrides)


class MakeGptq(Request, frozen=True, kw_only=True):
    """Quantize a model by GPTQ."""

    when_stopped = _KEPT

    model: str
    out: str
    settings: GptqSettings


class Convert(Request, frozen=True, kw_only=True):
    """Turn another project's packed checkpoint into a GPTQ folder."""

    source: str
    out: Annotated[str, _help(_OUT_FOLDER)]
    origin: Annotated[
        Literal["sparsebit"], _help("Whose format IN has: sparsebit is that of alpaca-qlora, 2 to 4 bits.")
    ] = msgspec.field(name="from")
    config: Annotated[
        str | None,
        _help(
            "Folder with config.json and tokenizer; by default the first Llama's 7B to 65B are told by their shapes."
        ),
    ] = None
    drop_bias: Annotated[bool, _help("Leave biases out, as alpaca-qlora's own training did.")] = False


class Push(Request, frozen=True, kw_only=True):
    """Upload from `run`, or a folder with an adapter or a merged model, to `repo`: `owner/name` on the hub."""

    when_stopped = "nothing was published; the same command sends again what had not arrived"
    run: str
    repo: str
    what: Annotated[Literal["adapter", "merged"], _help("What of a run; merged: what is in RUN/merged.")] = "adapter"
    private: Annotated[bool, _help("Only you see it. A repository that is there and public is refused.")] = False
    revision: Annotated[str, _help("Branch to write; is made if it is not there.")] = "main"


class Opening(Request, frozen=True, kw_only=True):
    """Fields common to all processes that open a model to answer with."""

    max_memory: Annotated[str | None, _help("What to put on each GPU at most, such as 20GiB.")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _help("What is computed in. auto: as in training, or as the model is stored."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, _help("Run the Python files of the model's own repository where transformers has no class for it.")
    ] = False

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_bytes(self.max_memory, "max_memory")

    @property
    def max_memory_bytes(self) -> int | None:
        """Cap on each GPU in bytes; None if there is none."""
        return None if self.max_memory is None else parse_bytes(self.max_memory)


Engine = Annotated[
    Literal["auto", "qdist", "llama.cpp"],
    _help("What answers. auto: qdist; llama.cpp: on the CPU, from a GGUF file made in the cache, in 8 bits."),
]


class Answering(Opening, frozen=True, kw_only=True):
    """Fields common to all processes that answer prompts by one model."""

    run: str
    """Path of a run, or any model."""


class Generate(Answering, frozen=True, kw_only=True):
    """Answer a file of prompts into JSONL."""

    when_stopped = _KEPT

    prompts: Annotated[str, _help("Text file with a prompt a line, or data with prompt or messages.")]
    out: Annotated[str, _help("JSONL file to write; must not be there yet.")]
    batch: Annotated[Positive, _help("Answers at a time, on each GPU.")] = 8
    n: Annotated[Positive, _help("Answers a prompt, drawn with the seeds S, S + 1, ...")] = 1
    beams: Annotated[Positive, _help("Beams of a search for the likeliest answer, in transformers.")] = 1
    adapter: Annotated[Literal["run", "base"], _help("Answer with the run's adapter, or the base alone.")] = "run"
    engine: Engine = "auto"
    gpus: Annotated[
        Positive | None, _help("Copies of the model, each on a GPU of its own.  [default: one on each that holds it]")
    ] = None
    sampling: Sampling = Sampling()
    share: tuple[int, int] | None = None
    """(number, count): the part of the prompts that this process answers, as one of several; None: all."""
    references: bool = False
    """Whether the prompts are records that end with an answer: it is not shown, and written beside the model's."""
    limit: Positive | None = None
    """Records to take, from the first, where they have references; None: all."""
    reading: Reading = Reading()
    """How records of a file of prompts are read."""


class Chat(Answering, frozen=True, kw_only=True):
    """Talk to a model on a terminal."""

    asks = True

    system: Annotated[str, _help("System message.")] = ""
    compare: Annotated[bool, _help("Show the answers of base and adapter beside each other.")] = False
    context: Annotated[Positive, _help("Tokens of a conversation, at most; the model may have fewer positions.")] = 4096
    engine: Engine = "auto"
    sampling: Sampling = Sampling(max_new_tokens=512)


class Serving(Opening, frozen=True, kw_only=True):
    """Fields common to all servers."""

    asks = True
    passes_on_sigterm = True

    runs: tuple[str, ...]
    """Runs over one base, or one model; each may have a name before it, such as `legal=runs/3`."""
    host: Annotated[str, _help("Address to serve on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to serve on; 0: any that is free.")] = 8000
    slots: Annotated[Positive, _help("Answers at work at a time; others wait in line.")] = 16
    context: Annotated[Positive, _help("Tokens of a prompt and its answer together, at most.")] = 4096
    queue: Annotated[Count, _help("Questions in line, at most; more are told to come again.")] = 128


class Serve(Serving, frozen=True, kw_only=True):
    """Answer requests in OpenAI's protocol."""

    engine: Annotated[
        Literal["auto", "qdist", "llama.cpp", "vllm"],
        _help("Program that answers. vllm: export the adapters, and start vLLM, which has to be installed."),
    ] = "auto"
    out: Annotated[
        str | None, _help("vllm: folder for adapters that vLLM needs in another form.  [default: beside each run]")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine != "vllm" and self.out is not None:
            raise SpecError("--out goes with --engine vllm: nothing else is written", try_="leave it out")
        if self.engine == "vllm" and self.max_memory is not None:
            raise SpecError(
                "--max-memory is of qdist's own engine; vLLM takes a share of each GPU", try_="leave it out"
            )


class Web(Serving, frozen=True, kw_only=True):
    """The same, with a page to talk to the models."""

    engine: Engine = "auto"
    opens: Annotated[bool, _help("Open it in a browser, given a screen.")] = msgspec.field(default=True, name="open")


class ShowData(Request, frozen=True, kw_only=True):
    """Read a data set as training would; answered with an `Overview`."""

    spec: RunSpec
    samples: Annotated[Count, _help("Samples to show.")] = 3
    limit: Annotated[Positive | None, _help("Records of each source to look at, instead of the first 20,000.")] = None


class MeasureRates(Request, frozen=True, kw_only=True):
    """Measure one card and its links, together with the other ranks."""

    out: str
    """Folder in which each rank writes `rank0.json` and its like, a `CardRates`."""
    rank: Count
    ranks: Positive
    device: Literal["cuda", "cpu"] = "cuda"


_Answers = Generate | Chat | Serve | Web
_Prepared = Prepare | PrepareModel | Describe | ShowData
Job = _Prepared | Gather | Merge | Export | Pack | MakeGptq | Convert | Push | _Answers | MeasureRates


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a job ended: successfully, perhaps with a result, or with an error that the user can fix."""

    prepared: Prepared | None = None
    facts: ModelFacts | None = None
    overview: Overview | None = None
    kind: str = ""
    """Name of a class of `qdist.core.errors`."""
    message: str = ""
    try_: str = ""

    @classmethod
    def refusing(cls, error: QdistError) -> "Answer":
        """The answer that carries an error to another process."""
        kind = next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
        return cls(kind=kind, message=error.message, try_=error.try_)

    @property
    def error(self) -> QdistError | None:
        """The error, in its original class."""
        error: QdistError | None = getattr(errors, self.kind)(self.message, try_=self.try_) if self.kind else None
        return error


def _check_group_size(size: int | None) -> None:
    """Refuse group sizes that readers of GPTQ checkpoints have no kernels for."""
    if size is not None and size != -1 and (size <= 0 or size % WORD):
        raise SpecError(f"group size cannot be {size}: it is -1 or a multiple of {WORD}", try_="--group-size 128")
