"""Entry point for work that needs torch: `python -m qdist.runtime.tasks JOB GIVEN TOLD`, by `qdist.host.tasks`.

JOB is for people who look at processes; GIVEN and TOLD are descriptors of a file with the request and of one for its
answer. Nothing here prints an error: the process that asked does.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import msgspec

from qdist.core import requests
from qdist.core.data.overview import Overview
from qdist.core.errors import QdistError
from qdist.core.model.shapes import ModelFacts
from qdist.core.requests import Answer, Request
from qdist.host.children import hear_ctrl_c
from qdist.host.files import told_of_disks
from qdist.host.terminal import guard_output

JOBS: Mapping[type[Request], str] = {
    requests.Prepare: "qdist.runtime.train.prepare:run",
    requests.PrepareModel: "qdist.runtime.train.prepare:run_model",
    requests.Describe: "qdist.runtime.model.describe:run",
    requests.Gather: "qdist.runtime.train.result:run",
    requests.Merge: "qdist.runtime.exports.merge:run",
    requests.Pack: "qdist.runtime.quantize.bitsandbytes:run",
    requests.MakeGptq: "qdist.runtime.quantize.gptq.make:run",
    requests.Convert: "qdist.runtime.quantize.sparsebit.convert:run",
    requests.Push: "qdist.runtime.exports.push:run",
    requests.Generate: "qdist.runtime.infer.generate:run",
    requests.Chat: "qdist.runtime.infer.chat:run",
    requests.Serve: "qdist.runtime.serve.server:run",
    requests.Web: "qdist.runtime.serve.server:run_page",
    requests.ShowData: "qdist.runtime.train.overview:run",
    requests.MeasureRates: "qdist.runtime.gpu_rates:run",
}
"""Request -> the function that handles it, imported on demand."""
TARGETS: Mapping[str, str] = {
    "lora": "qdist.runtime.exports.qalora_as_lora:run",
    "vllm": "qdist.runtime.exports.vllm_adapter:run",
    "16bit": "qdist.runtime.exports.merged_16bit:run",
    "gguf": "qdist.runtime.exports.gguf.export:run",
    "gptq": "qdist.runtime.exports.requantize:run",
    "zeros": "qdist.runtime.exports.qalora_integer_zeros:run",
}
"""The same for `Export`, by target."""


def perform(request: Request) -> Any:
    """Do the job; returns what `Prepare` and `Describe` are asked for. Raises QdistError for what the user can fix."""
    quiet()
    if not isinstance(request, requests.Prepare | requests.Describe | requests.ShowData):
        _import_early()
    place = TARGETS[request.to] if isinstance(request, requests.Export) else JOBS[type(request)]
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)(request)


def quiet() -> None:
    """Hide from users what transformers prints for its own developers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _import_early() -> None:
    """Import bitsandbytes, which PEFT would import in its own, slow way."""
    from qdist.runtime.kernels.libraries import import_bitsandbytes

    import_bitsandbytes()


def answer_to(request: Request) -> Answer:
    """`perform`, with errors as answers too; buffered output is flushed first."""
    try:
        with told_of_disks():
            found = perform(request)
            sys.stdout.flush()
    except QdistError as error:
        return Answer.refusing(error)
    match found:
        case ModelFacts():
            return Answer(facts=found)
        case Overview():
            return Answer(overview=found)
    return Answer(prepared=found)


def main() -> None:
    """Read the request, do the job, answer. Ctrl-C leaves no traceback; a bug keeps its own."""
    guard_output()
    given, told = map(int, sys.argv[-2:])
    with open(given, "rb") as file:
        file.seek(0)
        request = msgspec.json.decode(file.read(), type=requests.Job)
    try:
        hear_ctrl_c()
        answer = answer_to(request)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    with open(told, "wb") as file:
        file.write(msgspec.json.encode(answer))
    if error := answer.error:
        raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
