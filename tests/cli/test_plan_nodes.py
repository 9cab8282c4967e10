"""Does `qdist plan` lay a run out on nodes that one does not have, and say what the network costs?"""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main

MODEL = ("--model", "llama-65b", "--set", "liger=true")
A100S = ("--gpus", "8", "--gpu-name", "A100", "--batch-size", "64")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *MODEL, *arguments], prog_name="qdist")


def labels(output: str) -> dict[str, str]:
    """The first line of each label."""
    return {line[:9].strip(): line[9:] for line in reversed(output.splitlines())}


def test_nodes_and_their_network_are_shown() -> None:
    lines = labels(plan("--nodes", "4", *A100S, "--network", "25Gbit").stdout)
    assert lines["ranks"] == "4 nodes x 8 GPUs"
    said = r"25 Gbit/s, 0\.1 ms \(given\): a node sends \d\.\d GiB a step, which adds \d\.\d s, \d\d % of it"
    assert re.fullmatch(said, lines["network"])


def test_layouts_that_span_nodes_are_listed_with_the_reason() -> None:
    (row,) = (line for line in plan("--nodes", "2", *A100S).stdout.splitlines() if "shard, 1 x 16" in line)
    assert row.endswith("--placement shard --gpus-per-group 16 asks for it")
    assert "groups of 16 span nodes, and others fit;" in row


def test_a_file_describes_nodes_that_differ(tmp_path: Path) -> None:
    file = tmp_path / "nodes.toml"
    file.write_text(
        '[[node]]\nname = "big"\ngpus = 8\n[[node]]\ncount = 2\ngpus = 4\ngpu_name = "RTX 4090"\n', encoding="utf-8"
    )
    given = ("--nodes", str(file), "--gpu-name", "H100", "--batch-size", "32", "--network", "10Gbit,1ms")
    assert labels(plan(*given).stdout)["ranks"] == "3 nodes of 8, 4 and 4 GPUs"
    read = json.loads(plan(*given, "--json").stdout)
    assert [node["name"] for node in read["nodes"]] == ["big", "node1", "node2"]
    assert read["network"] == {"bytes_s": 1.25e9, "latency_s": 0.001, "source": "given"}
    assert read["network_bytes"] > 0


def test_memory_is_told_by_rank_where_gpus_have_the_same_numbers_on_each_node() -> None:
    two = ("--nodes", "2", "--gpus", "1", "--gpu-name", "A100", "--placement", "split")
    assert labels(plan(*two).stdout)["memory"].endswith("GiB on rank 0")


def test_auto_takes_the_batch_that_makes_the_network_cheap() -> None:
    lines = labels(plan("--nodes", "2", *A100S[:4], "--set", "global_batch=auto").stdout)
    assert int(lines["batch"].split()[0]) > 16


@pytest.mark.parametrize(
    ("arguments", "message", "try_"),
    [
        (("--network", "10Gbit", *A100S), "--network is between nodes, and the plan is for one machine", "--nodes 2"),
        (("--nodes", "3", *A100S), "global_batch=64 cannot be spread over 24 ranks", "--set global_batch=72"),
        (("--nodes", "2", "--network", "25", *A100S), "'25' is not the rate of a network", "--network 25Gbit"),
        (("--nodes", "2", "--network", "25Gbit,1", *A100S), "'1' is not the latency", "--network 25Gbit,0.1ms"),
        (("--nodes", "none.toml", *A100S), "--nodes none.toml is neither a number nor a readable", "--nodes 2"),
        (("--nodes", "2", "--for", "inference", *A100S[:4]), "--nodes is of plans for training", "leave it out"),
        (("--nodes", "1000", *A100S), "a plan is for 1 to 512 nodes, not 1,000", "--nodes 512 --set global_batch=4096"),
    ],
)
def test_mistakes_are_named_with_a_way_out(arguments: tuple[str, ...], message: str, try_: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert f"try: {try_}" in result.stderr
