"""Converts packed checkpoints of Sparsebit's alpaca-qlora to GPTQ folders, if they hold a complete Llama."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError, PlanError
from qdist.core.model.aliases import config_of
from qdist.core.model.gptq import WORD, Gptq, Override, Shape
from qdist.core.requests import Convert
from qdist.core.text import format_bytes, format_duration
from qdist.host.files import folder_to_write, write_atomic
from qdist.host.progress import ProgressLine
from qdist.host.sources.models import read_json
from qdist.host.terminal import say
from qdist.runtime.data.tokenizer import copy_beside
from qdist.runtime.formats.gptq_folder import Quantized, entries, finish, how_to_use
from qdist.runtime.formats.packed_folder import Entry, Written, entries_of, file_name, write_tensors
from qdist.runtime.formats.work_folder import built
from qdist.runtime.kernels.gptq_bits import group_of_inputs, pack_zeros, period
from qdist.runtime.quantize.blueprint import Blueprint, blueprint
from qdist.runtime.quantize.sparsebit.read import Checkpoint, Linear, halves, integer_zeros, read, words

_KNOWN = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")
_BESIDE = (".json", ".jinja", ".model", ".txt")
_OURS = ("config.json", "quantize_config.json", "qdist.json")
_BIASED = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}
"""Key of a Llama's config -> the linears whose bias it enables."""


def model_config(checkpoint: Checkpoint, folder: Path | None, source: Path) -> tuple[dict[str, Any], list[str]]:
    """The model's config.json, and notes about it."""
    embedding = checkpoint.plain.get("model.embed_tokens.weight")
    dtype = str(embedding.dtype).removeprefix("torch.") if embedding is not None else "float16"
    if folder is None:
        name = _known(checkpoint)
        if name is None:
            shapes = {path: checkpoint.shape(path) for path in ("model.embed_tokens", "model.layers.0.mlp.gate_proj")}
            said = ", ".join(f"{path} {'absent' if size is None else list(size)}" for path, size in shapes.items())
            raise ModelError(
                f"{source} has the shapes of no Llama 7B, 13B, 33B or 65B: {checkpoint.layers} layers, {said}",
                try_="--config FOLDER, with the model's config.json and tokenizer",
            )
        note = f"config: that of {name}, by the shapes; no tokenizer (--config FOLDER brings both)"
        return {**config_of(name), "torch_dtype": dtype}, [note]
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"no file {file}", try_="a folder with the model's config.json and tokenizer")
    config = read_json(file)
    if config.get("model_type") != "llama":
        raise ModelError(f"{file} is of model_type {config.get('model_type')!r}; Sparsebit packs llama")
    config.pop("quantization_config", None)
    if "dtype" not in config:
        config.setdefault("torch_dtype", dtype)
    if "max_sequence_length" in config:  # what alpaca-qlora's own config.json calls it
        config.setdefault("max_position_embeddings", config["max_sequence_length"])
    return config, []


def _known(checkpoint: Checkpoint) -> str | None:
    """Name of the original Llama with the checkpoint's shapes."""
    found = (
        checkpoint.shape("model.embed_tokens"),
        checkpoint.shape("model.layers.0.mlp.gate_proj"),
        checkpoint.layers,
    )
    for name in _KNOWN:
        config = config_of(name)
        hidden = config["hidden_size"]
        sizes = ((config["vocab_size"], hidden), (config["intermediate_size"], hidden), config["num_hidden_layers"])
        if found == sizes:
            return name
    return None


def decide_biases(
    checkpoint: Checkpoint, config: dict[str, Any], *, drop: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """The configuration with its bias keys set, the biases to write, and notes on the others.

    transformers' Llama has a bias on all linears of attention or of the MLP, or on none of them.
    """
    nonzero = {path for path, value in checkpoint.biases.items() if bool(value.any())}
    kept: dict[str, torch.Tensor] = {}
    keys = {}
    for key, part in _BIASED.items():
        keys[key] = not drop and any(part in path for path in nonzero)
        if keys[key]:
            kept.update({path: value for path, value in checkpoint.biases.items() if part in path})
    stray = sorted(path for path in nonzero if not any(part in path for part in _BIASED.values()))
    if stray and not drop:
        raise ModelError(f"{stray[0]} has a bias, which transformers' Llama has no place for", try_="--drop-bias")
    said = []
    if drop and nonzero:
        said = [f"biases: {len(checkpoint.biases)} left out as asked, {len(nonzero)} of them not zero"]
    elif nonzero:
        said = [f"biases: {len(kept)} kept, {len(nonzero)} of them not zero; config.json asks for them"]
    elif checkpoint.biases:
        said = [f"biases: all {len(checkpoint.biases)} are zero and left out"]
    changed = {key: value for key, value in keys.items() if value or config.get(key)}
    return {**config, **changed}, kept, said


def check(checkpoint: Checkpoint, shape: Blueprint, source: Path) -> None:
    """Compare with what the model's class expects, and with what GPTQ's words can hold."""
    held: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in checkpoint.plain.items()}
    held.update({f"{path}.weight": linear.shape for path, linear in checkpoint.linears.items()})
    held.update({f"{path}.bias": tuple(value.shape) for path, value in checkpoint.biases.items()})
    missing = sorted(name for name in shape.shapes if name not in held and not name.endswith(".bias"))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        total = f"{len(shape.shapes)} tensors"
        raise ModelError(f"{source} lacks {missing[0]}{more} of {total}", try_="the whole checkpoint")
    for name, size in sorted(held.items()):
        if name not in shape.shapes:
            raise ModelError(
                f"{source} holds {name} {list(size)}, which a Llama of {shape.layers} layers has not",
                try_="--config FOLDER of the model that was packed",
            )
        if size != shape.shapes[name]:
            raise ModelError(
                f"{name} has shape {list(size)} in {source}, {list(shape.shapes[name])} in the configuration",
                try_="--config FOLDER of the model that was packed",
            )
    for path, linear in checkpoint.linears.items():
        if f"{path}.weight" not in shape.linears:
            raise ModelError(f"{path} is quantized; GPTQ folders quantize the linears of decoder layers alone")
        count = period(linear.bits)[0]
        if linear.shape[0] % count:
            raise ModelError(
                f"{path} has {linear.shape[0]} outputs; GPTQ packs the zeros of {count} at {linear.bits} bits into "
                f"{count * linear.bits // WORD} words"
            )


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear in a decoder layer."""
    return any(part in name for part in _BIASED.values()) and name.endswith(".weight")


def beside(config: Path | None) -> list[Path]:
    """Tokenizer, chat template and generation settings of a model folder, or of the `tokenizer` folder inside it."""
    if config is None:
        return []
    files = {
        path.name: path
        for folder in (config / "tokenizer", config)
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _BESIDE and path.name not in _OURS
        and not path.name.startswith(".") and not path.name.endswith(".index.json")
    }  # fmt: skip
    return list(files.values())


class Converted(NamedTuple):
    """What was written, and notes for the user."""

    gptq: Gptq
    layers: int
    bytes: int
    notes: tuple[str, ...]


class Conversion(NamedTuple):
    """A checkpoint, the model that it belongs to, and its number formats."""

    checkpoint: Checkpoint
    shape: Blueprint
    heads: dict[str, int]
    """Number of heads of the linears whose rows are reordered."""
    zeros: dict[str, torch.Tensor]
    """int8 [groups, out] of each linear."""
    gptq: Gptq


def convert(source: Path, out: Path, *, config: Path | None = None, drop_bias: bool = False) -> Converted:
    """Write a Sparsebit checkpoint as a GPTQ folder, completely or not at all.

    config: a folder with config.json and tokenizer files; None tells the model by its shapes.
    Raises ModelError for a checkpoint or configuration that cannot be used, RunError where `out` exists, PlanError when
    the disk is too small.
    """
    folder_to_write(str(out))
    checkpoint = read(source)
    settings, notes = model_config(checkpoint, config, source)
    settings, biases, said = decide_biases(checkpoint, settings, drop=drop_bias)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = source.stat().st_size, shutil.disk_usage(out.parent).free
    if needed > free:
        raise PlanError(
            f"{out} will take up to {format_bytes(needed)}; {out.parent} has {format_bytes(free)} free",
            try_="another disk: --out FOLDER",
        )
    identity = f"{source.resolve()} {source.stat().st_size} {source.stat().st_mtime_ns} {config} {drop_bias}"
    with built(out, identity) as work, _nothing_kept(work):
        write_atomic(work / "config.json", json.dumps(settings))
        shape = blueprint(work)
        check(checkpoint._replace(biases=biases), shape, source)
        zeros = _all_zeros(checkpoint)
        job = Conversion(
            checkpoint._replace(biases=biases), shape, _heads(checkpoint, shape), zeros, _gptq(checkpoint, zeros)
        )
        files, loss = _write(job, work)
        for path in beside(config):
            copy_beside(path, work)
        finish(work, {**settings, "architectures": [shape.architecture]}, job.gptq, files)
    size = sum(written.tensor_bytes for written in files.values())
    return Converted(job.gptq, shape.layers, size, (*notes, *said, *_more_notes(job, loss)))


@contextmanager
def _nothing_kept(work: Path) -> Iterator[None]:
    """Empty the work folder if conversion fails: redoing it takes seconds and measures every scale's change again."""
    try:
        yield
    except BaseException:
        shutil.rmtree(work)
        work.mkdir()
        raise


def _all_zeros(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The integer zeros of every linear. Raises ModelError naming the one furthest from integers."""
    found = {path: integer_zeros(linear) for path, linear in checkpoint.linears.items()}
    off = {path: zeros.residual for path, zeros in found.items() if zeros.residual}
    if off:
        worst = max(off, key=lambda path: off[path])
        others = f", and so are {len(off) - 1} more" if len(off) > 1 else ""
        raise ModelError(
            f"{checkpoint.linears[worst].name}.zeros over its scales is {off[worst]:.3f} away from integers{others}: "
            "GPTQ needs integer zeros",
            try_="a checkpoint whose zeros are zero x scale, as Sparsebit writes them",
        )
    return {path: zeros.values for path, zeros in found.items()}


def _gptq(checkpoint: Checkpoint, zeros: dict[str, torch.Tensor]) -> Gptq:
    """The GPTQ settings: the most common width as the base, overrides for others; the older v1 if readers agree on it.

    v1 stores zeros minus one. GPTQModel takes that back as it loads (gptqmodel/utils/model.py,
    convert_gptq_v1_to_v2_format) by adding one constant to whole words, at the base's width in every linear: wrong for
    linears of other widths, at 3 bits (its constants count from the other end of a word), and where a zero is 2^bits.
    v2 stores zeros as they are.
    """
    linears = checkpoint.linears
    if not linears:
        raise ModelError("the checkpoint has no quantized linear", try_="a checkpoint with layers_bit")
    for path, value in zeros.items():
        low, high, bits = int(value.min()), int(value.max()), linears[path].bits
        if low < 0 or high >= 1 << bits:
            raise ModelError(
                f"{linears[path].name}.zeros are {low} to {high} times the scales; GPTQ at {bits} bits holds zeros of "
                f"0 to {(1 << bits) - 1}"
            )
    widths = Counter(linear.bits for linear in linears.values())
    base, size = widths.most_common(1)[0][0], checkpoint.group_size
    v1 = list(widths) in ([2], [4]) and all(int(value.min()) >= 1 for value in zeros.values())
    others = {path: Shape(linear.bits, size) for path, linear in linears.items() if linear.bits != base}
    plain = {name.removesuffix(".weight"): None for name in checkpoint.plain if is_linear(name)}
    overrides = {**others, **plain}
    return Gptq(
        shape=Shape(base, size),
        sym=all(bool((value == 1 << (linears[path].bits - 1)).all()) for path, value in zeros.items()),
        format="gptq" if v1 else "gptq_v2",
        overrides=tuple(Override(re.escape(path) + "$", overrides[path]) for path in sorted(overrides)),
    )


def _heads(checkpoint: Checkpoint, shape: Blueprint) -> dict[str, int]:
    pairs = {path for path, linear in checkpoint.linears.items() if linear.in_pairs} | checkpoint.in_pairs
    config = shape.config
    return {
        path: config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads for path in pairs
    }


def _write(job: Conversion, work: Path) -> tuple[dict[str, Written], float]:
    """Write one file per decoder layer and one for the rest; also returns the largest relative change of a scale."""
    layers, loss = job.shape.layers, 0.0
    files: dict[str, Written] = {}
    with ProgressLine(layers + 1, "files written") as progress:
        for position in range(layers + 1):
            tensors, lost = _tensors(job, position)
            loss, file = max(loss, lost), file_name(position, layers)
            files[file] = write_tensors(work, file, tensors)
            progress.advance(1)
    return files, loss


def _tensors(job: Conversion, position: int) -> tuple[list[Entry], float]:
    """A file's tensors, and the largest relative change of a scale among them."""
    tensors, loss = list[Entry](), 0.0
    for name in (name for name in job.shape.shapes if job.shape.layer(name) == position):
        path, _, leaf = name.rpartition(".")
        if path in job.checkpoint.linears and leaf == "weight":
            linear, lost = _linear(job, path)
            loss = max(loss, lost)
            tensors += entries(path, linear)
        elif path not in job.checkpoint.linears:
            tensors += entries_of({name: _plain(job, name)})
    return tensors, loss


def _rows(job: Conversion, path: str, value: torch.Tensor, dim: int) -> torch.Tensor:
    """The outputs of a linear in transformers' order."""
    if path not in job.heads:
        return value
    return value.index_select(dim, halves(value.shape[dim], job.heads[path]))


def _linear(job: Conversion, path: str) -> tuple[Quantized, float]:
    linear = job.checkpoint.linears[path]
    scales, lost = _half_scales(linear)
    zeros = _rows(job, path, job.zeros[path], 1)
    shape = Shape(linear.bits, job.checkpoint.group_size)
    quantized = Quantized(
        qweight=_rows(job, path, words(linear), 1),
        qzeros=pack_zeros(zeros, linear.bits, job.gptq.zero_offset, name=f"{linear.name}.zeros"),
        scales=_rows(job, path, scales, 1),
        g_idx=group_of_inputs(linear.shape[1], shape.group_size),
        bias=_plain(job, f"{path}.bias") if f"{path}.bias" in job.shape.shapes else None,
    )
    return quantized, lost


def _half_scales(linear: Linear) -> tuple[torch.Tensor, float]:
    """Scales as float16 [groups, out], and the largest relative change that caused.

    Raises ModelError for scales that float16 cannot hold.
    """
    halves = linear.scales.to(torch.float16)
    wide, kept = linear.scales.double(), halves.double()
    if not bool((torch.isfinite(kept) & (kept > 0)).all()):
        extremes = f"{float(wide.min()):.1e} to {float(wide.max()):.1e}"
        raise ModelError(f"{linear.name}: scales of {extremes} do not fit float16, in which GPTQ files hold them")
    return halves.t().contiguous(), float(((kept - wide).abs() / wide).max())


def _plain(job: Conversion, name: str) -> torch.Tensor:
    """An unquantized tensor; zeros for a bias that only other layers have."""
    path, _, leaf = name.rpartition(".")
    if leaf == "bias":
        given = job.checkpoint.biases.get(path)
        value = torch.zeros(job.shape.shapes[name], dtype=torch.float16) if given is None else given
    else:
        value = job.checkpoint.plain[name]
    return _rows(job, path, value, 0)


def _more_notes(job: Conversion, loss: float) -> list[str]:
    notes = []
    if job.heads:
        notes.append(f"rows of {len(job.heads)} query and key weights reordered from Meta's order to transformers'")
    if job.checkpoint.dropped:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in job.checkpoint.dropped}))
        notes.append(f"dropped: {len(job.checkpoint.dropped)} buffers that a model computes itself ({kinds})")
    stored = {str(linear.scales.dtype).removeprefix("torch.") for linear in job.checkpoint.linears.values()}
    lost = f"change by at most {100 * loss:.2g} %" if loss else "stay the same"
    notes.append(f"scales: {' and '.join(sorted(stored))} to float16, which {lost}")
    return notes


def run(request: Convert) -> None:
    """Convert, and report the result and how to use it."""
    out, began = Path(request.out), time.monotonic()
    config = Path(request.config) if request.config else None
    done = convert(Path(request.source), out, config=config, drop_bias=request.drop_bias)
    took = format_duration(time.monotonic() - began)
    say(f"{out}: {done.gptq}, {done.layers} layers, {format_bytes(done.bytes)}, {took}")
    say("\n".join(f"  {note}" for note in done.notes))
    if config:
        say(how_to_use(out, done.gptq))
