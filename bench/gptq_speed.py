"""Time of quantizing a large model by GPTQ: `python bench/gptq_speed.py --model llama-7b --gpus 1`.

Random 16-bit weights, made on the first GPU, and text of random letters: nothing to download. --layers takes fewer.
"""

import argparse
import filecmp
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qdist.core.model.aliases import config_of
from qdist.core.text import format_bytes
from qdist.runtime.quantize.source import blueprint


def main() -> None:
    """Print what `qdist quantize` prints, and its seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--gpus", default="1", help="such as 1,4: one after the other")
    parser.add_argument("--cards", nargs="+", help="instead: the GPUs of each run, such as 0 0 1 0,1")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--group-size", default="128")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        source = Path(folder, "model")
        print(f"{made(source, given.model, given.layers)} of random weights", flush=True)
        text = Path(folder, "text.txt")
        text.write_text("\n".join(random.Random(0).choices("abcdefghijklmnop", k=given.samples * 2100)))
        cards = given.cards or [",".join(map(str, range(int(count)))) for count in given.gpus.split(",")]
        outs = [Path(folder, f"out-{number}-on-{visible}") for number, visible in enumerate(cards)]
        for visible, out in zip(cards, outs, strict=True):
            command = ["quantize", str(source), "--method", "gptq", "--data", str(text), "--out", str(out)]
            command += ["--samples", str(given.samples), "--group-size", given.group_size]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "qdist", *command], check=True, env=environment)
            print(f"GPUs {visible}: {time.monotonic() - began:.0f} s", flush=True)
            if out != outs[0]:
                print(f"{out.name} and {outs[0].name}: {differences(outs[0], out)}", flush=True)


def differences(one: Path, other: Path) -> str:
    """How many files are not the same, and of their packed words which part."""
    names = [path.name for path in one.iterdir()]
    _, differ, absent = filecmp.cmpfiles(one, other, names, shallow=False)
    words, changed, first = 0, 0, ""
    for name in sorted(differ):
        if not name.endswith(".safetensors"):
            continue
        with safe_open(one / name, "pt") as mine, safe_open(other / name, "pt") as theirs:
            for key in mine.keys():  # noqa: SIM118  (no dictionary)
                if key.endswith(".qweight"):
                    unlike = int((mine.get_tensor(key) != theirs.get_tensor(key)).sum())
                    words, changed = words + mine.get_tensor(key).numel(), changed + unlike
                    first = first or key * bool(unlike)
    share = f", {changed / words:.2e} of whose words differ, {first} first" if words else ""
    return f"{len(differ) + len(absent)} of {len(names)} files differ{share}"


def made(folder: Path, model: str, layers: int | None) -> str:
    """Write a model of normal numbers with deviation 0.02, and a tokenizer of bytes; its size."""
    folder.mkdir()
    config = dict(config_of(model)) | {"torch_dtype": "bfloat16"}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    weight_map, size = {}, 0
    shapes = sorted(blueprint(folder).shapes.items())
    for start in range(0, len(shapes), 32):
        tensors = {
            name: torch.randn(shape, device=device, generator=generator).mul_(0.02).bfloat16().cpu()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes[start : start + 32]
        }
        file = f"model-{start:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return format_bytes(size)


if __name__ == "__main__":
    main()
