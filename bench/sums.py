"""What do the sums cost when a packed model is loaded? With and without, side by side, the files in the page cache.

    python bench/sums.py [--model llama-7b] [--layers 4] [--device cpu] [--times 5] [--folder DIR]

A folder of NF4 with nested absmaxes is written, its bytes drawn at random. Loads alternate; on a CPU, where packed
tensors stay in their files, each load is followed by a first reading of every page, which a training step would do.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.shapes import ModelFacts
from qdist.core.model.storage import BLOCK, NESTED_BLOCK
from qdist.core.planning.plan import Source
from qdist.core.spec.sections import Quant
from qdist.runtime.formats.checksum import slice_sums
from qdist.runtime.formats.packed_folder import entries_of, write_tensors
from qdist.runtime.formats.recorded_sums import keep_sums
from qdist.runtime.model import skeleton as backbone
from qdist.runtime.model.packed import Packed4bit
from qdist.runtime.model.skeleton import skeleton

_FILE = "model-{:05d}.safetensors"


def written(folder: Path, config: dict[str, object], facts: ModelFacts) -> Source:
    """A packed folder of random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    source = Source(kind="folder", path=str(folder), packed=str(folder), config=config, tokenizer="")
    if not (folder / "checksums.json").is_file():
        model = skeleton(source, bits=4, quant=Quant(), dtype=torch.bfloat16, facts=facts)
        files = [write_tensors(folder, _FILE.format(n), entries_of(own)) for n, own in enumerate(_parts(model))]
        keep_sums(folder, files)
    return source


def _parts(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of some hundred MB of modules at a time."""
    tensors: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Packed4bit):
            blocks = -(-module.in_features * module.out_features // BLOCK)
            tensors[f"{path}.weight"] = _bytes(module.weight.shape)
            tensors[f"{path}.weight.absmax"] = _bytes((blocks,))
            tensors[f"{path}.weight.nested_absmax"] = torch.rand(-(-blocks // NESTED_BLOCK))
            state = json.dumps({"nested_offset": 0.02}).encode()
            tensors[f"{path}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
        else:
            own = module.named_parameters(recurse=False)
            tensors |= {f"{path}.{name}": torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in own}
        if sum(value.nbytes for value in tensors.values()) > 1 << 28:
            yield tensors
            tensors = {}
    yield tensors


def _bytes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def loaded(source: Source, facts: ModelFacts, device: torch.device, *, summed: bool) -> tuple[float, float]:
    """Seconds until the backbone is there; and until every page of it was read."""
    began = time.perf_counter()
    with mock.patch.object(backbone, "expected_sums", backbone.expected_sums if summed else lambda source: None):
        model = backbone.load_backbone(source, bits=4, quant=Quant(), dtype=torch.bfloat16, device=device, facts=facts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    there = time.perf_counter() - began
    for value in model.parameters():
        if device.type == "cpu":
            value.detach().view(-1).view(torch.uint8)[::4096].sum()
    return there, time.perf_counter() - began


def rate(device: torch.device) -> float:
    """Bytes a second that are summed, of a matrix of 64 MiB."""
    content = torch.randint(0, 256, (1 << 26,), dtype=torch.uint8, device=device)
    slice_sums(content, 0).tolist()
    began = time.perf_counter()
    for _ in range(3):
        slice_sums(content, 0).tolist()
    return 3 * content.numel() / (time.perf_counter() - began)


def main() -> None:
    """Write, load, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    config = {**config_of(given.model), "num_hidden_layers": given.layers}
    facts, device = from_config(config, name=given.model), torch.device(given.device)
    with tempfile.TemporaryDirectory() as temporary:
        source = written(given.folder or Path(temporary) / "packed", config, facts)
        size = sum(file.stat().st_size for file in Path(source.packed).glob("*.safetensors"))
        loaded(source, facts, device, summed=True)
        pairs = [[loaded(source, facts, device, summed=summed) for summed in (False, True)] for _ in range(given.times)]
    print(f"{given.model}, {given.layers} layers, {size / 2**30:.2f} GiB on {given.device}, median of {given.times}")
    print(f"summing alone {rate(device) / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    for which, what in enumerate(("until it is there", "and every page was read")):
        without, held = (statistics.median(pair[summed][which] for pair in pairs) for summed in (0, 1))
        print(f"{what:24} {without:6.2f} s without  {held:6.2f} s with  {held / without - 1:+.1%}")


if __name__ == "__main__":
    main()
