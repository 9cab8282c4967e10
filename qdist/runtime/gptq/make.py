"""Quantizes a model by GPTQ, a decoder layer at a time: `python -m qdist.runtime.gptq.make MODEL OUT --data D`.

Killed, the same command goes on: layers that are written are run through again, not made again.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qdist.core.gptq import BITS, FORMATS, WORD, Gptq, Override, Shape
from qdist.core.units import format_bytes, format_duration
from qdist.host.disk import require_space
from qdist.host.sources import locate, read_json
from qdist.host.terminal import say
from qdist.runtime.gptq.calibrate import Calibration, batches
from qdist.runtime.gptq.folder import Quantized, entries, finish, how_to_use
from qdist.runtime.gptq.job import Job, Wanted, read_job
from qdist.runtime.gptq.progress import Outcome, Progress, note_few_tokens
from qdist.runtime.gptq.room import out_of_memory, peak, require_memory
from qdist.runtime.gptq.solve import Curvature, Solution, curvature, solve, unpacked
from qdist.runtime.packed_folder import Entry, Written, file_name, finished, opened, write_tensors
from qdist.runtime.quiet import quiet
from qdist.runtime.tokenizer import copy_beside
from qdist.runtime.work_folder import filled, reserved


def make(
    model: str,
    out: Path,
    wanted: Wanted,
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
    from qdist.runtime.materialize import materialize

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


def _require_space(job: Job, work: Path) -> None:
    widest = Shape(job.wanted.bits[-1], job.wanted.group_size)
    linears = sum(widest.bytes_of(part.inputs, part.outputs, ordered=True) for part in job.decoder.facts.linears)
    needed = 0
    for position in range(job.layers + 1):
        if finished(work, file_name(position, job.layers)) is None:
            needed += sum(entry.bytes for entry in job.plain(position)) + linears * (position < job.layers)
    needed += sum(path.stat().st_size for path in job.beside)
    require_space(work.parent, needed, purpose=f"quantizing {job.name}")


def _write_layers(job: Job, work: Path, memory: int) -> dict[str, Written]:
    """All files of tensors, those that are there already as they are. memory: bytes that a GPU will need."""
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


def _write_missing(job: Job, work: Path, progress: Progress, missing: list[int]) -> dict[str, Written]:
    """The files of layers. One thread reads from the disk and writes to it, while the devices are at another layer."""
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


def _quantize_layer(job: Job, calibration: Calibration, position: int) -> tuple[list[Entry], dict[str, Outcome]]:
    """A layer's packed linears; for the user, what became of each.

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
    job: Job, calibration: Calibration, inputs: Curvature, step: list[str], root: str
) -> list[tuple[Solution, Quantized]]:
    """The linears that read the same inputs, each on a device of its own as far as there are some; packed on the CPU.

    No linear is divided: its products would be rounded otherwise on another number of devices.
    """
    copies = [inputs.to(device) for device in job.devices[: len(step)]]

    def solved(number: int, worker: int) -> tuple[Solution, Quantized]:
        path = step[number]
        solution = _narrowest(job, calibration.weight(path.removeprefix(root), worker), copies[worker], path)
        packed = solution.packed(offset=job.offset, name=path)
        return solution, Quantized(*(part.cpu() for part in packed[:4]))

    return calibration.workers.spread(solved, len(step))


def _narrowest(job: Job, weight: torch.Tensor, inputs: Curvature, path: str) -> Solution:
    """In the first of the wanted widths that errs as little as wanted, else in the last."""
    wanted = job.wanted
    for bits in wanted.bits:
        shape = Shape(bits, wanted.group_size)
        solution = solve(weight, inputs, shape, sym=wanted.sym, lowest_zero=job.offset, name=path)
        if solution.error <= wanted.max_error:
            break
    return solution


def _restore(job: Job, calibration: Calibration, file: Path, position: int) -> None:
    """Give a layer the weights that an earlier process wrote."""
    with opened(file) as handle:
        for path in (path for step in job.decoder.steps(position) for path in step):
            parts = [handle.get_tensor(f"{path}.{name}").to(job.devices[0]) for name in Quantized._fields[:4]]
            linear = Quantized(*parts)
            weight = unpacked(linear, _bits(len(linear.qweight), len(linear.g_idx)), offset=job.offset)
            calibration.replace(path.removeprefix(f"{job.decoder.path(position)}."), weight)


def _bits(words: int, inputs: int) -> int:
    return words * WORD // inputs


def _described(job: Job, work: Path) -> Gptq:
    """The widths that were chosen, as the files have them: the most common, and linears that have another."""
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


def main() -> None:
    """Started by the command line, which has checked the flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", type=int, choices=BITS, nargs="+", default=[4])
    parser.add_argument("--max-error", type=float, default=0.0)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--no-sym", dest="sym", action="store_false")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damping", type=float, default=0.01)
    given = vars(parser.parse_args())
    model, out = given.pop("model"), given.pop("out")
    quiet()
    began = time.monotonic()
    try:
        gptq = make(model, out, Wanted(**{**given, "bits": tuple(given["bits"])}))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(_devices(), error) from error
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    most = f", tensors took {format_bytes(held)} of a GPU at most" if (held := peak(_devices())) else ""
    say(f"{out}: {gptq}, {format_bytes(size)}, {format_duration(time.monotonic() - began)}{most}")
    say(how_to_use(out, gptq))


if __name__ == "__main__":
    main()
