"""How fast does a 7B with an adapter answer, by rows of one cache, with CUDA graphs and without?

    python bench/decode.py [--model llama-7b] [--method qlora] [--rows 1,8,32] [--profile] [--json FILE]   # one GPU
    python bench/decode.py --tiny                                                                        # a CPU

A random model in 4 bits with an adapter of r=64 in bfloat16, greedy, 64 tokens in and 256 out. limit: tokens/s if a
step read nothing but the weights once and the keys and values of its rows, at the card's bandwidth. --profile: which
kernels a step at batch 1 spends its time in. --json: appends what bench/decode_predictions.py reads, a line a batch.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

import qdist

BANDWIDTH = 4.8e12
"""Bytes/s of an H200, by its sheet."""
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    prompt, new, long = (8, 16, 64) if arguments.tiny else (64, 256, 2048)
    model, linears = loaded(arguments, device)
    print(f"linears: {linears}; {weight_bytes(model) / 2**30:.2f} GiB of weights are read in a step")
    for rows in map(int, arguments.rows.split(",")):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ways = {way: measured(model, rows, prompt, new, graphs=way == "graph") for way in ways_on(device)}
        limit = rows * BANDWIDTH / (weight_bytes(model) + rows * (prompt + new / 2) * token_bytes(model))
        for way, (seconds, _, why) in ways.items():
            speed = rows / seconds
            print(
                f"batch {rows:2} {way:8} {speed:8,.0f} tok/s {1e3 * seconds:7.2f} ms/step, "
                f"{100 * speed / limit:5.1f} % of the limit of {limit:,.0f}{f' ({why})' if why else ''}",
                flush=True,
            )
        if arguments.json:
            best = min(seconds for seconds, _, _ in ways.values())
            reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
            append(arguments, rows=rows, prompt=prompt, new=new, tokens_per_second=rows / best, reserved=reserved)
        tokens = [own for _, own, _ in ways.values()]
        same = (tokens[0] == tokens[-1]).float().mean()
        print(f"batch {rows:2} tokens with and without a graph: {100 * float(same):.2f} % the same", flush=True)
    print(f"first token of a {long:,}-token prompt: {1e3 * first_token_s(model, long):.1f} ms")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved at most")
    if arguments.profile:
        profile(model, prompt)


def append(arguments: argparse.Namespace, **measured: float) -> None:
    """Write a line of what was measured."""
    with arguments.json.open("a") as file:
        file.write(json.dumps({"model": arguments.model, "method": arguments.method, **measured}) + "\n")


def ways_on(device: torch.device) -> tuple[str, ...]:
    """How steps are run there."""
    return ("graph", "launched") if device.type == "cuda" else ("launched",)


def loaded(arguments: argparse.Namespace, device: torch.device):
    """(a random model with its adapter, which linears compute it)."""
    from qdist.runtime.adapters.attach import add_adapter
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.setup import load_part

    name = arguments.model
    if arguments.tiny:
        name = tempfile.mkdtemp(prefix="qdist-decode-")
        Path(name, "config.json").write_text(json.dumps(TINY))
    settings = {"seq_len": 64, "micro_batch": 1, "global_batch": 1, "steps": 2, "train.held_out": 0.0, "lora.r": 64}
    settings["method"] = arguments.method
    plan = qdist.plan(model=name, **{"load_format": "dummy", "gpus": 1, "dtype": "bfloat16", **settings})
    model = add_adapter(load_part(placement_of(plan, 0, (device,))).backbone, plan).eval()
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.data.normal_(std=0.01)
    if find_spec("qdist.runtime.infer.linears") is None:
        return model, "as trained"
    from qdist.runtime.infer.linears import prepare_linears

    choice = prepare_linears(model)
    choice.set_rows(torch.ones(1, dtype=torch.int64, device=device))
    return (model, choice), "prepared for answers"


def parts(model):
    """(the model, what each pass is to call with the row of each token)."""
    if not isinstance(model, tuple):
        return model, None
    return model[0], lambda rows: model[1].set_rows(torch.ones_like(rows))


def decoder_of(model, rows: int, positions: int, *, graphs: bool | None):
    """A greedy decoder that is ready."""
    from qdist.runtime.infer.decoder import Decoder

    whole, assign = parts(model)
    return Decoder(
        whole, slots=rows, positions=positions, choose=lambda logits, _: logits.argmax(-1), assign=assign, graphs=graphs
    )


def measured(model, rows: int, prompt: int, new: int, *, graphs: bool) -> tuple[float, torch.Tensor, str]:
    """(seconds of a step, tokens [new, rows], why steps were not captured)."""
    decoder = decoder_of(model, rows, prompt + new, graphs=graphs)
    if graphs:
        decoder.prepare()
    found = []
    decoder.prefill(prompts(rows, prompt), list(range(rows)))
    for step in range(new - 1):
        if step == 4:
            began = now(decoder.device)
        decoder.step(rows)
        found.append(decoder.tokens.clone())
    seconds = (now(decoder.device) - began) / (new - 5)
    why = decoder.refused if graphs else ""
    del decoder
    gc.collect()
    return seconds, torch.stack(found), why


def first_token_s(model, length: int) -> float:
    """Seconds until the first token of a long prompt is known, the median of 5."""
    decoder = decoder_of(model, 1, length + 8, graphs=False)
    taken = []
    for _ in range(6):
        began = now(decoder.device)
        decoder.prefill(prompts(1, length), [0])
        decoder.tokens.tolist()
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def prompts(rows: int, length: int) -> list[list[int]]:
    """Random prompts."""
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(rows)).tolist()


def now(device: torch.device) -> float:
    """The time when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def weight_bytes(model) -> int:
    """Bytes of all tensors of a model but its table of tokens, of which a step reads a few rows."""
    whole, _ = parts(model)
    tensors = {value.data_ptr(): value.nbytes for value in (*whole.parameters(), *whole.buffers())}
    return sum(tensors.values()) - whole.get_input_embeddings().weight.nbytes


def token_bytes(model) -> int:
    """Bytes of keys and values of a token."""
    config = parts(model)[0].config
    size = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size


def profile(model, prompt: int) -> None:
    """Print the kernels of 20 steps at batch 1."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    decoder = decoder_of(model, 1, prompt + 64, graphs=None)
    decoder.prepare()
    decoder.prefill(prompts(1, prompt), [0])
    device = decoder.device.type
    with profiled(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as taken:
        for _ in range(20):
            decoder.step(1)
        now(decoder.device)
    print(taken.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=70))


if __name__ == "__main__":
    sys.exit(main())
