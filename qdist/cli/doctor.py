"""`qdist doctor`: say whether this machine is ready, and what to mend if not."""

import os
import time
from collections.abc import Mapping, Sequence

import click

from qdist.cli.views.text import say_styled
from qdist.core.errors import MachineError, SpecError
from qdist.core.machine.measured import CardRates, slowest
from qdist.core.nodes.pairs import Pair, slowest_of
from qdist.core.text import counted
from qdist.host.launch import measuring
from qdist.host.machine import links, nvml, probe
from qdist.host.machine.doctor import Check, diagnose, look
from qdist.host.nodes.launching import party_of
from qdist.host.nodes.measuring import measured_pairs
from qdist.host.nodes.speed import STREAMS
from qdist.host.terminal import say

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--gpus", is_flag=True, help="Measure the GPUs and their links, for the planner. Under a minute.")
@click.option("--hosts", metavar="FILE", help="Measure the network between the machines of FILE, for the planner.")
@click.pass_context
def doctor(context: click.Context, gpus: bool, hosts: str | None) -> None:
    """Check driver, GPUs, packages, memory and disk; exit 1 when a run cannot work."""
    if hosts is not None:
        if gpus:
            raise SpecError("--hosts measures the network, and --gpus the cards of this machine", try_="one at a time")
        _measure_network(hosts)
        return
    checks = diagnose(look())
    failed = tuple(check for check in checks if check.status == "fail")
    if gpus and not failed:
        checks = _measure()
    else:
        say_styled(report(failed if gpus else checks))
    context.exit(1 if any(check.status == "fail" for check in checks) else 0)


def _measure() -> tuple[Check, ...]:
    """Measure, print and keep the rates; return the findings."""
    driver, cluster = nvml.read(), probe.cluster()
    measuring.check_room(cluster)
    if driver is None:
        raise MachineError("the NVIDIA driver stopped answering", try_="nvidia-smi")
    chosen = probe.visible_cards(driver.cards, os.environ.get("CUDA_VISIBLE_DEVICES"))
    say(f"measuring {len(chosen)} x {chosen[0].name}")
    found = measuring.measure(len(chosen))
    checks = measuring.judge(found, cluster, links.read([card.uuid for card in chosen]))
    if found.cards:
        say("\n" + rates_table(found.cards) + "\n")
    say_styled(findings(checks))
    kept = slowest(found.cards, source=time.strftime("measured %Y-%m-%d"))
    say("\n" + verdict(checks, found.seconds))
    if kept is not None and not any(check.status == "fail" for check in checks):
        path = probe.keep_rates([card.name for card in chosen], driver.version, kept)
        say(f"plans use these rates from now on: {path}")
    return checks


def _measure_network(file: str) -> None:
    """Measure the network between hosts, and print what each pair found."""
    party = party_of(file)
    names = [host.name for host in party.hosts.host]
    say(f"measuring the network between {counted(len(names), 'host')}")
    pairs = measured_pairs(party)
    named = dict(zip(party.addresses, names, strict=True))
    say("\n" + network_table(pairs, named) + "\n")
    one, other = (named[address] for address in slowest_of(pairs).addresses)
    say(f"the slowest pair is {one} and {other}; plans of these hosts use its figures from now on, on each of them")


def network_table(pairs: Sequence[Pair], names: Mapping[str, str]) -> str:
    """Table with one row per pair of hosts. names: of the addresses."""
    rows: list[Sequence[str]] = [("hosts", "latency", "1 connection", "back", f"{STREAMS} connections", "back")]
    for pair in pairs:
        rates = (*pair.one_bytes_s, *pair.four_bytes_s)
        between = " - ".join(names[address] for address in pair.addresses)
        rows.append((between, f"{pair.latency_s * 1e3:.2f} ms", *(f"{rate * 8e-9:.2f} Gbit/s" for rate in rates)))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def rates_table(cards: Sequence[CardRates]) -> str:
    """Table with one row per GPU."""
    rows = [
        (
            "GPU",
            f"{_kind(cards[0].dtype)} products",
            "memory",
            "from host",
            "all-gather",
            "all-reduce",
            "copies",
            "launching",
            "full clock",
            "unpacking",
            "in a graph",
        )
    ]
    for card in cards:
        link, kernels = card.links, card.kernels
        rows.append((
            str(card.rank),
            f"{card.matmul_flops_s / 1e12:.0f} TFLOP/s",
            _speed(card.memory_bytes_s),
            _speed(card.host_bytes_s),
            _speed(link.gather_bytes_s if link else None),
            _speed(link.reduce_bytes_s if link else None),
            _speed(link.peer_bytes_s if link else None),
            f"{card.linear_s * 1e3:.2f} ms",
            f"{kernels.dense_flops_s / 1e12:.0f} TFLOP/s" if kernels else "-",
            _speed(kernels.unpack_bytes_s if kernels else None),
            f"{kernels.kernel_s * 1e6:.1f} us a kernel" if kernels else "-",
        ))  # fmt: skip
    shown = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    return _aligned([*zip(*shown, strict=True)])


def _kind(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)


def _speed(bytes_s: float | None) -> str:
    if bytes_s is None:
        return "-"
    return f"{bytes_s / 1e9:.0f} GB/s" if bytes_s >= 1e10 else f"{bytes_s / 1e9:.1f} GB/s"


def verdict(checks: Sequence[Check], seconds: float) -> str:
    """Whether these GPUs can be trained on, in a sentence."""
    failed = [check.name for check in checks if check.status == "fail"]
    warned = [check.name for check in checks if check.status == "warn"]
    took = f"measured in {seconds:.0f} s"
    if "bytes" in failed:
        return f"these GPUs alter what they send each other: train on one of them until that is mended ({took})"
    if failed:
        return f"not fit for training until mended: {', '.join(failed)} ({took})"
    return f"fit for training{', but look at: ' + ', '.join(warned) if warned else ''} ({took})"


def report(checks: tuple[Check, ...]) -> str:
    """One line per check, its remedy below it, and a line of totals."""
    return findings(checks) + "\n\n" + _sums(checks)


def findings(checks: Sequence[Check]) -> str:
    """One line per check, its remedy below it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{_status(check)}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<{width + 8}}try: {check.remedy}")
    return "\n".join(lines)


def _status(check: Check) -> str:
    return click.style(f"{check.status:<4}", fg=_COLOURS[check.status], bold=check.status == "fail")


def _sums(checks: tuple[Check, ...]) -> str:
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    if failed:
        return f"{failed} of {len(checks)} checks failed: runs will not work here until they are mended"
    return f"ready: {len(checks)} checks, {warned} with a warning" if warned else f"ready: {len(checks)} checks passed"
