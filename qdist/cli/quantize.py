"""`qdist quantize`: pack a model's weights once, as a folder that plain transformers loads too."""

from shlex import quote
from typing import Any

import click
import msgspec

from qdist.cli.flags import flags_of
from qdist.core.composed import METHODS, quantization_of
from qdist.core.data.sources import written
from qdist.core.errors import SpecError
from qdist.core.requests import GptqSettings, MakeGptq, Pack
from qdist.core.spec.sections import Data
from qdist.host.data.sources import check_data as check_sources
from qdist.host.data.sources import split_sources, unweighted
from qdist.host.files import folder_to_write
from qdist.host.sources.targets import check_model
from qdist.host.tasks import run_task


@click.command()
@click.argument("model")
@click.option("--method", default="nf4", show_default=True, metavar=f"[{'|'.join(METHODS)}]",
              help="4-bit normal floats, 4-bit floats, LLM.int8, or GPTQ.")  # fmt: skip
@flags_of(Pack)
@flags_of(GptqSettings)
@click.option("--bits", help="GPTQ: 2, 3, 4 or 8.  [default: 4]")
@click.option("--candidate-bits", metavar="B,B,...", help="GPTQ: for each linear the narrowest of these widths whose "
              "outputs err by --max-error or less.")  # fmt: skip
def quantize(method: str, **given: Any) -> None:
    """Pack the decoder's linear layers of MODEL: an alias, a folder, a GGUF file or a hub id.

    The folder is a complete model for transformers and for `qdist launch --model`. Killed, the same command goes on
    where it was.
    """
    request = quantization_of(method, given)
    if isinstance(request, MakeGptq):
        check_data(request.settings.data)
    check_model(request.model, trusted=isinstance(request, Pack) and request.trust_remote_code)
    run_task(msgspec.structs.replace(request, out=folder_to_write(request.out)))


def check_data(text: str) -> None:
    """Check calibration data, which are read as for training. Raises SpecError for weights: each is read once."""
    if unweighted(text) != written(split_sources(text)):
        raise SpecError("calibration reads each record once, without weights", try_=f"--data {quote(unweighted(text))}")
    check_sources(Data(path=text))
