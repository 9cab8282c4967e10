"""Are the rendered files those in tests/golden/, and do their readers accept them?"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.errors import SpecError
from qdist.core.machine.cluster import Machine
from qdist.core.planning.plan import Plan, digest
from qdist.core.planning.render import accelerate_config, deepspeed_config, deepspeed_policy, launch_script
from qdist.host.templates import folder, policy
from tests.core.planning.test_nodes import nodes
from tests.plans import CPU, gpus, planned

GOLDEN = Path(__file__).parents[2] / "golden"
POLICIES = {
    "zero0": {"zero.stage": 0},
    "zero1": {"zero.stage": 1},
    "zero2": {"zero.stage": 2},
    "zero2_offload": {"zero.offload": "cpu"},
    "zero3": {"zero.stage": 3},
}
PLANS = {
    "cpu": planned("smollm2-135m", CPU, {"gpus": 2, "global_batch": 8, "seq_len": 64}),
    "gpu": planned("llama-65b", gpus(4, 48)),
    "one_gpu": planned("llama-7b", gpus(1, 24)),
}
OVER_NODES = {
    "nodes": planned("llama-7b", nodes(2, 2), {"placement": "shard", "micro_batch": 4}),
    "mixed_nodes": planned("llama-7b", nodes(3, 1), {"placement": "replicate", "zero.stage": 0}),
    "cpu_nodes": planned("smollm2-135m", nodes(1, 1, 1, gib=0), {"global_batch": 6, "seq_len": 64}),
}
PYTHON = "/opt/my venv/bin/python"


def for_policy(name: str) -> Plan:
    return planned("llama-7b", gpus(2, 24), {"optim.clip": 0.5, "micro_batch": 4, **POLICIES[name]})


def rendered() -> dict[str, str]:
    """Every golden file's name and what it must hold; the digest has a test of its own."""
    texts = {
        f"deepspeed_{name}.json": pretty(deepspeed_config(for_policy(name), policy(f"{name}.json")))
        for name in POLICIES
    }
    for name, plan in (PLANS | OVER_NODES).items():
        texts[f"accelerate_{name}.json"] = pretty(accelerate_config(plan))
        texts[f"launch_{name}.sh"] = launch_script(plan, python=PYTHON).replace(digest(plan), "DIGEST")
    return texts


def pretty(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


@pytest.mark.parametrize("name", list(rendered()))
def test_a_file_is_rendered_to_the_letter(name: str) -> None:
    assert rendered()[name] == (GOLDEN / name).read_text()


def test_every_golden_file_is_rendered_and_leaves_nothing_to_guess() -> None:
    kept = {path.name for path in GOLDEN.glob("*_*.*")} - {path.name for path in GOLDEN.glob("submit_*")}
    assert kept == set(rendered())
    assert [path.name for path in GOLDEN.iterdir() if re.search(r"\bauto\b", path.read_text())] == []


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_plan_calls_for_the_policy_of_its_stage_and_offload(name: str) -> None:
    assert deepspeed_policy(for_policy(name)) == f"{name}.json"


def test_every_shipped_policy_is_one_that_a_plan_calls_for() -> None:
    assert sorted(path.stem for path in folder("ds_configs").iterdir()) == sorted(POLICIES)


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_is_of_the_stage_and_offload_in_its_name(name: str) -> None:
    zero = policy(f"{name}.json")["zero_optimization"]
    assert f"zero{zero['stage']}{'_offload' if 'offload_optimizer' in zero else ''}" == name


@pytest.mark.parametrize("name", list(POLICIES))
def test_deepspeed_gets_the_plans_batches(name: str) -> None:
    plan = for_policy(name)
    config = deepspeed_config(plan, {})
    assert config["train_batch_size"] == plan.spec.batch
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 16


@pytest.mark.parametrize("given", [{"train_batch_size": "auto"}, {"zero_optimization": {"stage": "auto"}}])
def test_a_policy_with_auto_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"zero2\.json holds 'auto'"):
        deepspeed_config(for_policy("zero2"), given)


@pytest.mark.parametrize("name", list(PLANS))
def test_the_script_carries_the_plans_digest(name: str) -> None:
    assert f" --digest {digest(PLANS[name])}\n" in launch_script(PLANS[name], python=PYTHON)
    assert f" --digest {digest(PLANS[name])} --evaluate\n" in launch_script(PLANS[name], python=PYTHON, evaluates=True)


@pytest.mark.parametrize("name", list(PLANS))
def test_the_script_is_shell_and_starts_the_ranks_beside_it(name: str, tmp_path: Path) -> None:
    """From a relative path, with a CDPATH in which `cd` would find another folder, and print it."""
    (tmp_path / "else/a run").mkdir(parents=True)
    (tmp_path / "a run").mkdir()
    script = launch_script(PLANS[name], python="/bin/echo").replace("exec /bin/echo", "exec printf '%s|'")
    (tmp_path / "a run/launch.sh").write_text(script)
    done = subprocess.run(
        ["sh", "a run/launch.sh"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "CDPATH": str(tmp_path / "else")},
    )  # fmt: skip
    words = done.stdout.split("|")[:-1]
    ranks, run = str(PLANS[name].world_size), str(tmp_path / "a run")
    assert words == ["-P", "-m", "qdist.host.launch.agent", ranks, run, "--digest", digest(PLANS[name])]


@pytest.mark.parametrize("name", list(OVER_NODES))
def test_the_script_of_several_nodes_says_how_they_are_started(name: str, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    (run / "launch.sh").write_text(launch_script(OVER_NODES[name], python=PYTHON))
    done = subprocess.run(["sh", run / "launch.sh"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    count = len(OVER_NODES[name].nodes)
    assert f'qdist launch --resume --run "{run}" --nnodes {count} --node-rank R --rendezvous' in done.stderr


def test_a_nodes_name_cannot_add_a_line_to_the_script() -> None:
    own = OVER_NODES["nodes"]
    named = msgspec.structs.replace(own, nodes=(Machine(name="a\ntouch oops", gpus=2), own.nodes[1]))
    assert "# node 0, a touch oops: ranks 0 to 1 on GPUs 0 to 1\n" in launch_script(named, python=PYTHON)


def test_accelerate_accepts_the_file_of_several_nodes() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for name, plan in OVER_NODES.items():
        config = load_config_from_file(str(GOLDEN / f"accelerate_{name}.json"))
        assert (config.num_machines, config.num_processes) == (len(plan.nodes), plan.world_size)
        assert (config.rdzv_backend, config.main_process_ip) == ("c10d", None)


def test_a_models_name_cannot_add_a_line_to_the_script() -> None:
    spec = msgspec.structs.replace(PLANS["cpu"].spec, model="m\ntouch oops")
    plan = msgspec.structs.replace(PLANS["cpu"], spec=spec)
    script = launch_script(plan, python=PYTHON)
    assert [line for line in script.splitlines() if line.startswith("touch")] == []


@pytest.mark.parametrize("name", list(PLANS))
def test_accelerate_accepts_its_file(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(GOLDEN / f"accelerate_{name}.json"))
    plan = PLANS[name]
    assert (config.num_processes, config.use_cpu) == (plan.world_size, plan.device == "cpu")
    assert config.distributed_type == ("DEEPSPEED" if plan.engine == "deepspeed" else "NO")
