"""Benchmarks this machine's GPUs, one process per card, and judges the results."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Cluster, Rates
from qdist.core.machine.measured import CardRates
from qdist.core.requests import Answer, MeasureRates
from qdist.core.text import GIB, MIB, format_bytes
from qdist.host import children
from qdist.host.files import cache_dir, cache_path, locked
from qdist.host.machine import links, probe
from qdist.host.machine.doctor import Check
from qdist.host.opening import read_typed
from qdist.host.tasks import handed_over

_ROOM_BYTES, _ROOM_PER_PEER_BYTES = 4 * GIB, 768 * MIB
"""Bytes for buffers and a CUDA context; and per peer, for what it gathers and the context it needs to copy."""
_ROUND_TRIP_ERROR, _ROUND_TRIP_DIFFERS = 0.16, 1e-3
_MUCH_SLOWER, _FAR_BELOW_TABLE = 0.85, 0.6
_SLOW_NVLINK_BYTES_S, _SLOW_DISK_BYTES_S = 20e9, 200e6


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of the whole machine."""

    cards: tuple[CardRates, ...]
    problem: str
    """Why a card or the links could not be fully measured; empty if they were."""
    disk_bytes_s: float | None
    """Read rate of the cache folder in bytes/s; None if it has no room for a test file."""
    seconds: float


def check_room(cluster: Cluster) -> None:
    """Raise MachineError if there is no GPU, or one has too little free memory to be measured."""
    if not cluster.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""
        raise MachineError(f"there is no GPU to measure{why}", try_="qdist doctor, which says why")
    room = _ROOM_BYTES + (len(cluster.gpus) - 1) * _ROOM_PER_PEER_BYTES
    for gpu in cluster.gpus:
        if gpu.free_bytes < room:
            raise MachineError(
                f"GPU {gpu.index} has {format_bytes(gpu.free_bytes)} free, and measuring takes {format_bytes(room)}",
                try_="end the program that holds it (nvidia-smi), or leave it out with CUDA_VISIBLE_DEVICES",
            )


def measure(ranks: int, *, device: Literal["cuda", "cpu"] = "cuda", timeout_s: float = 200.0) -> Measured:
    """Benchmark disk and cards. Ranks that fail or hang are a finding; earlier measurements are kept.

    The environment is passed on as it is, NCCL's settings included: what is measured is what a run would get.
    """
    began, folder = time.monotonic(), cache_dir() / ".measuring"
    with locked(folder.with_name(".measuring.lock")):  # two at a time would measure each other
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        disk = disk_rate(folder)
        problem = _run_ranks(folder, ranks, device, timeout_s)
        cards = read_cards(folder)
        shutil.rmtree(folder)
    return Measured(cards=cards, problem=problem, disk_bytes_s=disk, seconds=time.monotonic() - began)


def read_cards(folder: Path) -> tuple[CardRates, ...]:
    """The rates that the ranks wrote, in rank order."""
    found = [read_typed(path, CardRates, MachineError) for path in folder.glob("rank*.json")]
    return tuple(sorted(found, key=lambda card: card.rank))


def _run_ranks(folder: Path, ranks: int, device: Literal["cuda", "cpu"], timeout_s: float) -> str:
    """Start all ranks and wait for them; what went wrong in one sentence, or empty."""
    processes, answers = [], []
    with ExitStack() as stack:
        for rank in range(ranks):
            request = MeasureRates(out=str(folder), rank=rank, ranks=ranks, device=device)
            task = stack.enter_context(handed_over(request))
            process = subprocess.Popen(
                task.command,
                env=children.environment(),
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(open(folder / f"rank{rank}.log", "wb")),
                stderr=subprocess.STDOUT,
                preexec_fn=children.ending_with_this(),
                pass_fds=task.descriptors,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
            answers.append(task.answer)
        return _wait(processes, answers, folder, timeout_s)


def _wait(
    processes: Sequence["subprocess.Popen[bytes]"],
    answers: Sequence[Callable[[], Answer | None]],
    folder: Path,
    timeout_s: float,
) -> str:
    """Wait until all ranks have succeeded or one has failed: the others would wait for it in a collective."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                answer = answers[rank]()
                said = answer.message if answer else _last_words(folder / f"rank{rank}.log")
                return f"rank {rank} ended with exit code {code}: {said}"
        if all(code == 0 for code in codes):
            return ""
        time.sleep(0.05)
    silent = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
    return f"rank {' '.join(silent)} did not come to an end within {timeout_s:.0f} s"


def _last_words(log: Path) -> str:
    """The last line that names an error, or else the last line."""
    said = re.sub(r"^\[rank\d+\]:", "", log.read_text(errors="replace"), flags=re.MULTILINE)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or ["it said nothing"])[-1][:400]


def disk_rate(folder: Path, *, size: int = 256 * MIB) -> float | None:
    """Rate in bytes/s of reading an uncached file; None if the folder has less than four times the room for it."""
    usage = os.statvfs(folder)
    if usage.f_bavail * usage.f_frsize < 4 * size:
        return None
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.urandom(MIB)
        for _ in range(size // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = memoryview(bytearray(4 * MIB))
        began = time.perf_counter()
        while file.raw.readinto(buffer):
            pass
        return size / (time.perf_counter() - began)


def judge(
    found: Measured,
    cluster: Cluster,
    wiring: links.Wiring | None,
    *,
    tabled: Callable[[Sequence[str]], Rates | None] = probe.tabled_rates,
) -> tuple[Check, ...]:
    """The findings, in the order in which a person would check them."""
    expected = tabled([gpu.name for gpu in cluster.gpus])
    return (
        *([Check("wiring", "ok", links.describe(wiring))] if wiring else []),
        *_finished(found, len(cluster.gpus)),
        *_speed(found.cards, expected),
        *_shared(cluster),
        *_four_bit(found.cards),
        *_bytes(found.cards),
        *_link_speed(found.cards, wiring),
        *_disk(found.disk_bytes_s),
    )


def _finished(found: Measured, ranks: int) -> Iterator[Check]:
    if not found.problem:
        return
    done = sum(card.host_bytes_s is not None for card in found.cards)
    what = "links" if len(found.cards) == ranks else "measuring"
    remedy = "NCCL_DEBUG=INFO qdist doctor --gpus, and CUDA_VISIBLE_DEVICES to leave a GPU out"
    yield Check(what, "fail", f"{found.problem} ({done} of {ranks} GPUs measured to the end)", remedy)


def _speed(cards: Sequence[CardRates], expected: Rates | None) -> Iterator[Check]:
    if not cards:
        return
    slow = min(cards, key=lambda card: card.matmul_flops_s)
    share = slow.matmul_flops_s / max(card.matmul_flops_s for card in cards)
    look = "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
    if share < _MUCH_SLOWER:
        detail = f"GPU {slow.rank} multiplies at {share:.0%} of the fastest, and the others will wait for it"
        yield Check("speed", "warn", detail, look)
    elif expected and slow.matmul_flops_s < _FAR_BELOW_TABLE * expected.matmul_flops_s:
        part = slow.matmul_flops_s / expected.matmul_flops_s
        yield Check("speed", "warn", f"{part:.0%} of what a {slow.name} usually gives", look)
    else:
        compared = f", {slow.matmul_flops_s / expected.matmul_flops_s:.0%} of the table's" if expected else ""
        yield Check("speed", "ok", f"the slowest GPU is {slow.rank}, at {share:.0%} of the fastest{compared}")


def _shared(cluster: Cluster) -> Iterator[Check]:
    busy = [str(gpu.index) for gpu in cluster.gpus if gpu.free_bytes < 0.8 * gpu.total_bytes]
    if busy:
        detail = f"another process holds memory of GPU {' '.join(busy)}: if it computes, the rates are too low"
        yield Check("sharing", "warn", detail, "measure again once it has ended")


def _four_bit(cards: Sequence[CardRates]) -> Iterator[Check]:
    if not cards:
        return
    worst = max(cards, key=lambda card: card.round_trip_error)
    other = max(cards, key=lambda card: card.round_trip_differs)
    if worst.round_trip_error > _ROUND_TRIP_ERROR:
        detail = f"GPU {worst.rank} quantizes with an error of {worst.round_trip_error:.3f}; NF4's own is 0.152"
        yield Check("4 bits", "fail", detail, "pip install -U bitsandbytes")
    elif other.round_trip_differs > _ROUND_TRIP_DIFFERS:
        detail = f"GPU {other.rank} unpacks NF4 differently from the CPU, by {other.round_trip_differs:.1e}"
        yield Check("4 bits", "fail", detail, "pip install -U bitsandbytes")
    else:
        yield Check("4 bits", "ok", "every GPU packs and unpacks NF4 as the CPU does")


def _bytes(cards: Sequence[CardRates]) -> Iterator[Check]:
    linked = [(card.rank, card.links) for card in cards if card.links is not None]
    if not linked:
        return
    wrong = [
        f"GPU {rank} got {link.wrong_gathered_bytes:,} of {link.checked_bytes:,} bytes wrong in an all-gather"
        for rank, link in linked if link.wrong_gathered_bytes
    ] + [
        f"GPU {rank} got {link.wrong_reduced_values:,} wrong sums in an all-reduce"
        for rank, link in linked if link.wrong_reduced_values
    ] + [
        f"{count:,} bytes changed on the way from GPU {rank} to GPU {peer}"
        for rank, link in linked for peer, count in link.wrong_peer_bytes
    ]  # fmt: skip
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        remedy = "NCCL_P2P_DISABLE=1; for good, switch PCIe ACS off in the BIOS (NCCL's troubleshooting page)"
        yield Check("bytes", "fail", "; ".join(wrong[:3]) + more, remedy)
    else:
        size = format_bytes(linked[0][1].checked_bytes)
        yield Check("bytes", "ok", f"exact: {size} of random bytes gathered by each GPU, and every pair's copies")


def _link_speed(cards: Sequence[CardRates], wiring: links.Wiring | None) -> Iterator[Check]:
    gathers = [card.links.gather_bytes_s for card in cards if card.links is not None]
    if gathers and wiring and wiring.nvlink and min(gathers) < _SLOW_NVLINK_BYTES_S:
        detail = f"the GPUs have NVLink, but gather at {min(gathers) / 1e9:.1f} GB/s only"
        yield Check("NVLink", "warn", detail, "NCCL_DEBUG=INFO qdist doctor --gpus shows the way that NCCL takes")


def _disk(disk_bytes_s: float | None) -> Iterator[Check]:
    if disk_bytes_s is None:
        yield Check("disk", "warn", "no room to measure it in the cache folder", "QDIST_CACHE=/a/larger/disk")
        return
    detail = f"reads {disk_bytes_s / 1e9:.1f} GB/s in {cache_path()}"
    slow = disk_bytes_s < _SLOW_DISK_BYTES_S
    yield Check("disk", "warn" if slow else "ok", detail, "QDIST_CACHE=/a/faster/disk" if slow else "")
