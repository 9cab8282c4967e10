"""Quantizes a model by GPTQ, one decoder layer at a time, reporting progress on stderr."""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.model.gptq import WORD, Gptq, Override, Shape
from qdist.core.requests import GptqSettings, MakeGptq
from qdist.core.text import format_bytes, format_duration
from qdist.host.files import require_space
from qdist.host.sources.models import locate, read_json
from qdist.host.terminal import say
from qdist.runtime.data.tokenizer import copy_beside
from qdist.runtime.formats.gptq_folder import Quantized, entries, finish, how_to_use
from qdist.runtime.formats.packed_folder import Entry, Written, file_name, finished, opened, write_tensors
from qdist.runtime.formats.work_folder import filled, reserved
from qdist.runtime.quantize.gptq.calibrate import Calibration, batches
from qdist.runtime.quantize.gptq.job import GptqJob, out_of_memory, peak, read_job, require_memory
from qdist.runtime.quantize.gptq.solve import Curvature, Solution, curvature, solve, unpacked

_WIDTH = 80


class Outcome(NamedTuple):
    """Statistics of a linear, without its solution, which would occupy the GPU for as long."""

    bits: int
    error: float
    damping: float
    """The damping that its Hessian needed."""


class Progress:
    """Progress, with the time left estimated from the layers made in this process."""

    def __init__(
        self, name: str, layers: int, samples: int, tokens: int, *, made: int, most_error: float, memory: int
    ) -> None:
        """made: layers that exist already. most_error: error up to which to choose widths; 0: one width for all.

        memory: bytes that the fullest GPU will need; 0 where there is none.
        """
        self._most_error = most_error
        self._layers, self._left, self._took = layers, layers - made, list[float]()
        self._position, self._began, self._names = 0, time.monotonic(), tuple[str, ...]()
        self._told = dict[str, Outcome]()
        again = f"; {made} of {layers} layers are there already" if made else ""
        room = f", about {format_bytes(memory)} of GPU memory" if memory else ""
        _say(f"quantizing {name} by GPTQ, {samples} samples of {tokens} tokens{room}{again}")

    def begin(self, position: int) -> None:
        self._position, self._began = position, time.monotonic()

    def passed(self) -> None:
        """Count a layer that exists already."""
        _say(f"{self._place()}  there already")

    def done(self, outcomes: Mapping[str, Outcome], *, damping: float) -> None:
        """outcomes: of each linear of the layer, by its path in it.

        damping: what was asked for.
        """
        self._took.append(time.monotonic() - self._began)
        self._left -= 1
        self._told |= {f"{path} of layer {self._position + 1}": outcome for path, outcome in outcomes.items()}
        names = tuple(path.rpartition(".")[2].removesuffix("_proj") for path in outcomes)
        if names != self._names:
            self._names = names
            bits = "bits:" if self._most_error else ""
            _say(f"{bits}relative squared error of each linear's outputs, of these samples")
            _say(self._line(f"{'layer':>{len(self._place())}}", names, "left"))
        cells = [_cell(outcome, mixed=bool(self._most_error)) for outcome in outcomes.values()]
        left = _short(self._left * sum(self._took) / len(self._took)) if self._left else "done"
        _say(self._line(self._place(), cells, left))
        for name, outcome in zip(names, outcomes.values(), strict=True):
            if outcome.damping > damping:
                _say(f"{'':>{len(self._place())}}  {name}: its Hessian took a damping of {outcome.damping:g}")

    def ended(self) -> None:
        """Report which linears of this process exceed the wanted error."""
        above = {path: outcome for path, outcome in self._told.items() if outcome.error > self._most_error}
        if self._most_error and above:
            path, worst = max(above.items(), key=lambda item: item[1].error)
            _say(
                f"{len(above)} of {len(self._told)} linears err more than {self._most_error:g} in the widest of the "
                f"widths, the most\n  {path}: {worst.error:.2g} with {worst.bits} bits. A wider one in "
                "--candidate-bits helps"
            )

    def _place(self) -> str:
        return f"{self._position + 1:>{len(str(self._layers))}} of {self._layers}"

    def _line(self, place: str, cells: list[str] | tuple[str, ...], left: str) -> str:
        width = len("3:2.1e-4") if self._most_error else len("2.1e-4")
        columns = [f"{cell:>{max(width, len(name))}}" for cell, name in zip(cells, self._names, strict=True)]
        words = [place, *columns, f"{left:>6}"]
        return next((line for gap in ("  ", " ") if len(line := gap.join(words)) <= _WIDTH), " ".join(words))


def _cell(outcome: Outcome, *, mixed: bool) -> str:
    mantissa, _, exponent = f"{outcome.error:.1e}".partition("e")
    error = f"{mantissa}e{int(exponent)}" if outcome.error else "0"
    return f"{outcome.bits}:{error}" if mixed else error


def _short(seconds: float) -> str:
    """A duration in six characters."""
    for unit, name, upto in ((1, "s", 100), (60, "min", 100), (3600, "h", 1000)):
        if round(seconds / unit) < upto:
            return f"{round(seconds / unit)} {name}"
    return format_duration(seconds)


def note_few_tokens(tokens: int, linear: str, inputs: int) -> None:
    """Note if a Hessian has fewer tokens than rows: the errors shown then say little about other text."""
    if tokens < inputs:
        _say(
            f"note: {tokens:,} tokens are fewer than the {inputs:,} inputs of {linear}. On other text it will err more "
            "than is\n  told below; more --samples or a larger --seq-len help"
        )


def _say(line: str) -> None:
    """Print to stderr, separate from the output that scripts read."""
    say(line, err=True)


def make(
    model: str,
    out: Path,
    wanted: GptqSettings,
    *,
    devices: tuple[torch.device, ...] = (),
    when_written: Callable[[], None] = lambda: None,
) -> Gptq:
    """Write a GPTQ checkpoint of a model to `out`, which must be empty or absent.

    model: an alias, a folder, a GGUF file or a hub id. devices: where samples are run; all GPUs, or the CPU.
    when_written: called once all is written, before it is there: a command that ends later leaves nothing else.
    Raises ModelError for a model that cannot be quantized or turns to NaN, DataError for too little data,
    PlanError when the disk is too small, RunError when `out` is there or being written.
    """
    from qdist.runtime.quantize.materialize import materialize

    folder = materialize(locate(model))
    with reserved(out):
        job = read_job(model, folder, wanted, devices or _devices())
        with filled(out, job.identity()) as work:
            _require_space(job, work)
            files = _write_layers(job, work, require_memory(job))
            for path in job.beside:
                copy_beside(path, work)
            gptq = _described(job, work)
            finish(work, read_json(folder / "config.json"), gptq, files)
            when_written()
    return gptq


def _devices() -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count())) or (torch.device("cpu"),)


def _require_space(job: GptqJob, work: Path) -> None:
    widest = Shape(job.wanted.bits[-1], job.wanted.group_size)
    packed = [
        sum(widest.bytes_of(part.inputs, part.outputs, ordered=True) for part in shape.linears)
        for shape in job.decoder.facts.shapes
    ]
    linears = [packed[run] for run in job.decoder.facts.run_of_layer]
    needed = 0
    for position, own in enumerate((*linears, 0)):
        if finished(work, file_name(position, job.layers)) is None:
            needed += sum(entry.bytes for entry in job.plain(position)) + own
    needed += sum(path.stat().st_size for path in job.beside)
    require_space(work.parent, needed, purpose=f"quantizing {job.name}")


def _write_layers(job: GptqJob, work: Path, memory: int) -> dict[str, Written]:
    """All tensor files, reusing existing ones. memory: bytes that a GPU will need."""
    names = [file_name(position, job.layers) for position in range(job.layers + 1)]
    files = {name: there for name in names if (there := finished(work, name))}
    missing = [position for position, name in enumerate(names[:-1]) if name not in files]
    made, most_error = job.layers - len(missing), job.wanted.max_error
    progress = Progress(job.name, job.layers, *job.samples.shape, made=made, most_error=most_error, memory=memory)
    if missing:
        widest = max(job.decoder.facts.linears, key=lambda linear: linear.inputs)
        note_few_tokens(job.samples.numel(), widest.name, widest.inputs)
        files |= _write_missing(job, work, progress, missing)
        progress.ended()
    if names[-1] not in files:
        files[names[-1]] = write_tensors(work, names[-1], job.plain(job.layers))
    return {name: files[name] for name in names}


def _write_missing(job: GptqJob, work: Path, progress: Progress, missing: list[int]) -> dict[str, Written]:
    """The files of missing layers. One thread does the disk I/O while the devices work on another layer."""
    calibration = Calibration(job.decoder.start(batches(job.samples), job.dtype), job.devices)
    read = partial(job.decoder.read, pin=job.devices[0].type == "cuda")
    written = dict[str, Future[Written]]()
    with ThreadPoolExecutor(1) as disk:
        ahead = disk.submit(read, 0)
        for position in range(missing[-1] + 1):
            name = file_name(position, job.layers)
            progress.begin(position)
            calibration.enter(job.decoder.layer(position, ahead.result(), job.dtype, job.devices[0]))
            if position < missing[-1]:
                ahead = disk.submit(read, position + 1)
            if position not in missing:
                _restore(job, calibration, work / name, position)
                progress.passed()
            else:
                linears, outcomes = _quantize_layer(job, calibration, position)
                _wait_for(written)  # no more than one layer in memory that is still to be written
                written[name] = disk.submit(write_tensors, work, name, [*linears, *job.plain(position)])
                progress.done(outcomes, damping=job.wanted.damping)
            if position < missing[-1]:
                calibration.leave()
        return _wait_for(written)


def _wait_for(written: dict[str, Future[Written]]) -> dict[str, Written]:
    return {name: future.result() for name, future in written.items()}


def _quantize_layer(job: GptqJob, calibration: Calibration, position: int) -> tuple[list[Entry], dict[str, Outcome]]:
    """A layer's packed linears, and the outcome of each for the user.

    Linears see what those before them in the layer give once quantized (the paper's true-sequential order).
    """
    wanted, root = job.wanted, f"{job.decoder.path(position)}."
    made: list[Entry] = []
    outcomes: dict[str, Outcome] = {}
    for step in job.decoder.steps(position):
        hessian = calibration.hessian(step[0].removeprefix(root))
        inputs = curvature(hessian, damping=wanted.damping, by_activation=wanted.desc_act, name=step[0])
        for path, (solution, packed) in zip(step, _solved(job, calibration, inputs, step, root), strict=True):
            made += entries(path, packed)
            outcomes[path.removeprefix(root)] = Outcome(solution.shape.bits, solution.error, inputs.damping)
            calibration.replace(path.removeprefix(root), solution.weight())
    return made, outcomes


def _solved(
    job: GptqJob, calibration: Calibration, inputs: Curvature, step: list[str], root: str
) -> list[tuple[Solution, Quantized]]:
    """The linears that read the same inputs, distributed over the devices; packed on the CPU.

    No linear is divided: its products would be rounded otherwise on another number of devices.
    """
    copies = [inputs.to(device) for device in job.devices[: len(step)]]

    def solved(number: int, worker: int) -> tuple[Solution, Quantized]:
        path = step[number]
        solution = _narrowest(job, calibration.weight(path.removeprefix(root), worker), copies[worker], path)
        packed = solution.packed(offset=job.offset, name=path)
        return solution, Quantized(*(part.cpu() for part in packed[:4]))

    return calibration.workers.spread(solved, len(step))


def _narrowest(job: GptqJob, weight: torch.Tensor, inputs: Curvature, path: str) -> Solution:
    """The solution in the narrowest wanted width with a small enough error, else in the last width."""
    wanted = job.wanted
    for bits in wanted.bits:
        shape = Shape(bits, wanted.group_size)
        solution = solve(weight, inputs, shape, sym=wanted.sym, lowest_zero=job.offset, name=path)
        if solution.error <= wanted.max_error:
            break
    return solution


def _restore(job: GptqJob, calibration: Calibration, file: Path, position: int) -> None:
    """Load the weights that an earlier process wrote into a layer."""
    with opened(file) as handle:
        for path in (path for step in job.decoder.steps(position) for path in step):
            parts = [handle.get_tensor(f"{path}.{name}").to(job.devices[0]) for name in Quantized._fields[:4]]
            linear = Quantized(*parts)
            weight = unpacked(linear, _bits(len(linear.qweight), len(linear.g_idx)), offset=job.offset)
            calibration.replace(path.removeprefix(f"{job.decoder.path(position)}."), weight)


def _bits(words: int, inputs: int) -> int:
    return words * WORD // inputs


def _described(job: GptqJob, work: Path) -> Gptq:
    """The chosen widths as stored in the files: the most common one, and linears that differ."""
    shapes, widths = job.decoder.shape.shapes, dict[str, Any]()
    for position in range(job.layers):
        with opened(work / file_name(position, job.layers)) as handle:
            for path in (path for step in job.decoder.steps(position) for path in step):
                words = handle.get_slice(f"{path}.qweight").get_shape()[0]
                widths[path] = _bits(words, shapes[f"{path}.weight"][1])
    counts = Counter(widths.values())
    common = max(counts, key=lambda bits: (counts[bits], -bits))
    others = {path: bits for path, bits in widths.items() if bits != common}
    size = job.wanted.group_size
    overrides = tuple(Override(f"{re.escape(path)}$", Shape(bits, size)) for path, bits in others.items())
    return job.wanted.gptq(common, overrides)


def run(request: MakeGptq) -> None:
    """Quantize, and report the result and how to use it."""
    out, began = Path(request.out), time.monotonic()
    try:
        gptq = make(request.model, out, request.settings)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(_devices(), error) from error
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    most = f", tensors took {format_bytes(held)} of a GPU at most" if (held := peak(_devices())) else ""
    say(f"{out}: {gptq}, {format_bytes(size)}, {format_duration(time.monotonic() - began)}{most}")
    say(how_to_use(out, gptq))
