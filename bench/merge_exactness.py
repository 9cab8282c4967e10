"""How much of a QA-LoRA adapter do the forms lose that it can be merged into? `python bench/merge_exactness.py BASE`.

BASE: a GPTQ checkpoint with groups. For each share, every linear gets a random update of rank 16 that is constant
within groups and whose root mean square is that share of the root mean square of its scales. Printed: norm of what is
lost by norm of the update, over all linears, in float32 arithmetic.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from qdist.core.model.gptq import Gptq
from qdist.host.sources.model_folder import stated
from qdist.runtime.exports.qalora_merge import LARGEST
from qdist.runtime.formats.packed_folder import tensor_files
from qdist.runtime.kernels.gptq_bits import unpack_zeros

SHARES = (0.005, 0.02, 0.1, 0.3, 1.0)
RANK = 16
Kept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(update, scales, zeros, highest) -> what a form keeps of the update; all [groups, out]."""


def offsets(update: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, highest: int) -> torch.Tensor:
    """Float16 beside the checkpoint, times a power of two: `qdist merge`."""
    scale = 2.0 ** math.ceil(math.log2(float(update.abs().max()) / LARGEST))
    return (update / scale).half().float() * scale


def minimums(update: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, highest: int) -> torch.Tensor:
    """Q4_1's, in float16: `qdist export --to gguf`."""
    return (update - scales * zeros).half().float() + scales * zeros


def zeros_in(dtype: torch.dtype) -> Kept:
    """Zeros that are no integers."""
    return lambda update, scales, zeros, highest: (zeros - (zeros - update / scales).to(dtype).float()) * scales


def integers(update: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, highest: int) -> torch.Tensor:
    """`qdist export --to zeros --lossy`."""
    return (zeros - (zeros - update / scales).round().clamp(0, highest)) * scales


FORMS: dict[str, Kept] = {
    "offsets, float16": offsets,
    "Q4_1's minimums, float16": minimums,
    "zeros in float16": zeros_in(torch.float16),
    "zeros in bfloat16": zeros_in(torch.bfloat16),
    "integer zeros": integers,
}


def main() -> None:
    """Print a row for each form, a column for each share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    base: Path = parser.parse_args().base
    gptq = stated(base)
    if gptq is None:
        raise SystemExit(f"{base} is not a GPTQ checkpoint")
    lost = {(form, share): [0.0, 0.0] for form in FORMS for share in SHARES}
    generator = torch.Generator().manual_seed(0)
    for path, scales, zeros in linears(base, gptq):
        shape = gptq.of(path)
        assert shape is not None
        update = torch.randn(len(scales), RANK, generator=generator)
        update = update @ torch.randn(RANK, scales.shape[1], generator=generator)
        update *= scales.square().mean().sqrt() / update.square().mean().sqrt()
        for (form, share), sums in lost.items():
            wanted = share * update
            kept = FORMS[form](wanted, scales, zeros, (1 << shape.bits) - 1)
            sums[0] += float((kept - wanted).square().sum())
            sums[1] += float(wanted.square().sum())
    print("| form | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    for form in FORMS:
        row = (math.sqrt(missing / total) for missing, total in (lost[form, share] for share in SHARES))
        print(f"| {form} | " + " | ".join(f"{value:.2%}" for value in row) + " |")


def linears(base: Path, gptq: Gptq) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(path, scales, zeros) of each, float32 [groups, out]."""
    files, found = tensor_files(base), []
    for name, file in files.items():
        path = name.removesuffix(".qzeros")
        if path == name:
            continue
        shape = gptq.of(path)
        assert shape is not None
        with safe_open(base / file, framework="pt") as handle:
            zeros = unpack_zeros(handle.get_tensor(name), shape.bits, gptq.zero_offset).float()
        with safe_open(base / files[f"{path}.scales"], framework="pt") as handle:
            found.append((path, handle.get_tensor(f"{path}.scales").float(), zeros))
    return found


if __name__ == "__main__":
    main()
