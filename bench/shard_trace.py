"""Where does a step of a sharded backbone go? Kernels, gathers and idle time of each of two GPUs, beside one GPU alone.

    torchrun --nproc-per-node 2 bench/shard_trace.py [--layers 12] [--rows 4] [--placement replicate] [--graphs]

A few layers of llama-65b with random weights, all recomputed, of which each GPU holds a half. The last lines are a
table of milliseconds a layer and step. --graphs: the micro-batch is a CUDA graph, gathers included, and its loss is
compared with that of a micro-batch that is launched kernel by kernel.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import qdist
from qdist.core.model.aliases import lookup
from qdist.runtime.data.batches import pick
from qdist.runtime.engine.graphs import Replayed


def main() -> None:
    """Time the passes with events, then trace one pass."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--placement", default="shard")
    parser.add_argument("--graphs", action="store_true")
    arguments = parser.parse_args()
    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    parts = build(arguments, rank, device)
    batch = batch_of(arguments.rows)
    run = partial(passes, parts.forward)
    eager = float(run(batch))
    if arguments.graphs:
        run = replayed(run, batch, device)
        print(f"rank {rank}: losses {eager!r} launched one by one and {float(run(batch))!r} replayed", flush=True)
    times = [timed(run, batch) for _ in range(8)]
    step = median(times[3:]) / arguments.layers
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run(batch)
        torch.cuda.synchronize()
    report(trace, step, arguments, rank)
    dist.destroy_process_group()


def build(arguments, rank, device):
    """This rank's part of the model, ready to train."""
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.setup import assemble, load_part

    folder = Path(tempfile.mkdtemp(prefix="qdist-trace-"))
    config = {**lookup("llama-65b").config, "num_hidden_layers": arguments.layers}
    (folder / "config.json").write_text(json.dumps(config))
    plan = qdist.plan(
        model=str(folder), load_format="dummy", gpus=2, placement=arguments.placement, steps=4, seq_len=512,
        micro_batch=arguments.rows, global_batch=2 * arguments.rows,
        **{"train.checkpointing": True, "train.held_out": 0.0, "zero.stage": 0},
    )  # fmt: skip
    place = placement_of(plan, rank, (device,))
    return assemble(place, None, load_part(place).backbone, pad_id=0)


def batch_of(rows):
    """Random tokens, of which all but the first of a row have a loss."""
    ids = torch.randint(0, 32000, (rows, 512))
    return {"input_ids": ids, "labels": ids, **pick(ids)}


def passes(forward, batch):
    """Forward and backward; returns the loss."""
    loss = forward.loss(batch)
    (loss * 1e-4).backward()
    return loss.detach()


def replayed(run, batch, device):
    """The passes as a graph that was captured."""
    graphs = Replayed(run, device)
    graphs.start()
    for _ in range(2):  # the second is captured
        graphs(batch)
    assert not graphs.refused, graphs.refused
    return graphs


def timed(run, batch):
    """Milliseconds of both passes."""
    dist.barrier()
    torch.cuda.synchronize()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    run(batch)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended)


def report(trace, step, arguments, rank):
    """Milliseconds a layer by kind of kernel; gathers beside and without a product at the same time."""
    kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, kind_of(event.name)) for event in kernels)
    total: dict[str, float] = {}
    for start, end, kind in spans:
        total[kind] = total.get(kind, 0.0) + end - start
    alone = uncovered([span for span in spans if span[2] == "gather"], [s for s in spans if s[2] != "gather"])
    busy = covered(spans)
    wall = spans[-1][1] - spans[0][0]
    each = 1e3 * arguments.layers
    for turn in range(2):
        dist.barrier()
        if turn == rank:
            print(
                f"rank {rank} {arguments.placement} {arguments.rows}x512: {step:.2f} ms a layer; of the trace "
                f"{wall / each:.2f}, busy {busy / each:.2f}, gathers with nothing beside them {alone / each:.2f}"
            )
            for kind, value in sorted(total.items(), key=lambda item: -item[1]):
                print(
                    f"    {kind:12} {value / each:7.3f} ms, {sum(s[2] == kind for s in spans) / arguments.layers:.0f}"
                )
            largest: dict[str, list[float]] = {}
            for event in kernels:
                if kind_of(event.name) in ("copy", "other"):
                    largest.setdefault(event.name[:100], []).append(event.time_range.elapsed_us())
            for name, values in sorted(largest.items(), key=lambda item: -sum(item[1]))[:8]:
                print(f"        {sum(values) / each:7.3f} ms {len(values):5} x {name}", flush=True)


def kind_of(name):
    """What a kernel does."""
    words = {
        "gather": ("AllGather", "all_gather", "AllReduce"), "product": ("nvjet", "gemm", "cutlass", "splitK"),
        "unpack": ("unpack",), "attention": ("sdpa", "flash", "cudnn"),
        "copy": ("copy", "Memcpy", "split_with_sizes", "cat", "Memset"),
    }  # fmt: skip
    return next((kind for kind, parts in words.items() if any(part in name for part in parts)), "other")


def covered(spans):
    """Microseconds in which any of the spans runs."""
    total, reached = 0.0, float("-inf")
    for start, end, *_ in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def uncovered(spans, others):
    """Microseconds of `spans` in which none of the others runs."""
    return covered([*spans, *others]) - covered(others)


if __name__ == "__main__":
    main()
