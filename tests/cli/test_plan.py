"""Does `qdist plan` say how a run would lie in memory, on any machine, without torch?"""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import COMMANDS, main
from qdist.cli.views.plan import plan_lines, wrapped
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import hypothetical
from qdist.core.model.aliases import config_of, lookup
from qdist.core.planning.plan import Plan
from qdist.core.planning.planner import USABLE_SHARE
from qdist.core.text import GIB
from qdist.host.machine import probe
from qdist.host.run import calibration
from tests.host.sources.test_gguf_header import LLAMA, header
from tests.plans import CPU, gpus, planned

BIG = ("--model", "llama-65b", "--bits", "4", "--gpus", "4", "--gpu-memory")
HEAVY = ("torch", "transformers", "numpy", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments], prog_name="qdist")


def labels(output: str) -> dict[str, str]:
    """The first line of each label; the rows below it have none."""
    return {line[:9].strip(): line[9:] for line in reversed(output.splitlines())}


def test_a_plan_is_a_few_lines() -> None:
    result = plan(*BIG, "48GiB", "--placement", "replicate", "--set", "liger=true")
    assert result.exit_code == 0, result.output
    lines = labels(result.stdout)
    assert set(lines) == {
        "model", "adapter", "ranks", "layout", "engine", "batch", "speed", "memory", "", "load", "note"
    }  # fmt: skip
    assert lines["model"].startswith("llama-65b: 65.3 B parameters, 4 bits nf4, double quantization, bfloat16")
    assert lines["ranks"] == "4 GPUs"
    assert lines["layout"] == "replicate: each GPU holds the whole backbone"
    assert lines["engine"] == "DeepSpeed ZeRO-2, adamw"
    assert lines["batch"].endswith("of up to 512 tokens, checkpointing 76 of 80 layers, Liger kernels")
    assert lines["memory"].endswith(" GiB a GPU")
    assert "context" in lines[""]


@pytest.mark.parametrize(("seq_len", "unit"), [("64", "ms"), ("8192", "s")])
def test_a_short_step_is_predicted_in_milliseconds(seq_len: str, unit: str) -> None:
    speed = labels(plan("--model", "smollm2-135m", "--gpu-name", "H100", "--seq-len", seq_len).stdout)["speed"]
    number, found, *rest = speed.partition(" predicted, ")[2].split()
    assert float(number) > 0
    assert (found, rest) == (unit, ["a", "step"])


def test_rows_that_only_the_engine_tells_apart_name_it() -> None:
    decided = planned("llama-65b", gpus(4, 48))
    first = decided.alternatives[0]
    twin = msgspec.structs.replace(first, engine="deepspeed", zero_stage=2)
    single = msgspec.structs.replace(first, engine="torch", zero_stage=0)
    rows = "\n".join(plan_lines(msgspec.structs.replace(decided, alternatives=(single, twin))))
    assert "replicate, 4 x 1, torch " in rows
    assert "replicate, 4 x 1, ZeRO-2 " in rows
    assert ", torch " not in "\n".join(plan_lines(decided))
    lone = planned("llama-65b", gpus(1, 24))
    named = [row for row in plan_lines(lone) if row.startswith("not ")]
    assert named[0].startswith("not      replicate, 1 x 1 ")


def test_a_shard_that_loses_to_a_shard_is_told_by_what_differs() -> None:
    decided = planned("llama-65b", gpus(4, 48))
    (other,) = (own for own in decided.alternatives if own.placement == "shard")
    assert decided.placement == "shard"
    assert other.reason == "2 % slower: micro-batches of 2 where 4 have room"


def test_a_plan_for_gpus_that_are_not_here_keeps_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    small = msgspec.structs.replace(CPU, memory_bytes=8 * GIB)
    monkeypatch.setattr(probe, "cluster", lambda: small)
    result = plan("--model", "llama-7b", "--gpus", "4")
    assert result.stderr.endswith("\n  try: --gpu-memory 8GiB, for GPUs that are not here (6.0 GiB a GPU, split)\n")
    assert plan("--model", "llama-7b", "--gpus", "4", "--gpu-memory", "8GiB").exit_code == 0


def test_moments_without_room_are_told_apart() -> None:
    lines = labels(plan("--model", "llama-65b", "--gpus", "1", "--gpu-memory", "48GiB").stdout)
    assert lines["engine"] == "torch, one rank, paged-adamw"
    assert lines["memory"].endswith("GiB a GPU, and 6.0 GiB of optimizer state where there is room")


def test_a_plan_says_how_the_bytes_lie_and_why_the_other_layouts_lost() -> None:
    result = plan(*BIG, "24GiB", "--set", "liger=true", "--gpu-name", "NVIDIA H200")
    lines = labels(result.stdout)
    assert lines["layout"] == "shard: the 4 GPUs; each GPU holds 1/4 of every layer and gathers it for use"
    assert lines["speed"].endswith(" a step")
    assert lines["not"].startswith("replicate, 4 x 1 ")
    assert lines["not"].endswith("17.1 GiB more than 95 % of 24.0 GiB")
    assert "stages wait for each other" in result.stdout
    assert "table: H200" in result.stdout


def test_each_stage_of_a_split_shows_its_own_memory() -> None:
    result = plan(*BIG, "24GiB", "--placement", "split", "--set", "liger=true")
    assert "layers (0-19, 20-39, 40-59, 60-79)" in labels(result.stdout)["layout"]
    assert all(f" GiB on GPU {gpu}" in result.stdout for gpu in range(4))


def test_a_card_can_be_named_instead_of_its_memory() -> None:
    result = plan("--model", "llama-7b", "--gpu-name", "rtx 3090", "--json")
    decided = msgspec.json.decode(result.stdout, type=Plan)
    assert decided.ranks[0].expected[0].required <= USABLE_SHARE * 24 * GIB
    assert plan("--model", "llama-7b", "--gpu-name", "abacus").exit_code == 2


def test_a_machine_of_different_cards_is_planned_with_caps_and_a_device_map_for_transformers() -> None:
    two = ("--model", "llama-65b", "--gpu-name", "RTX 3090 + RTX 4090", "--max-memory", "1=23GiB")
    lines = labels(plan(*two).stdout)
    assert lines["ranks"] == "2 GPUs"
    assert lines["layout"].startswith("split: the 2 GPUs")
    assert "table: RTX 3090" in plan(*two).stdout
    modules = json.loads(plan(*two, "--device-map").stdout)
    assert (modules["model.embed_tokens"], modules["model.layers.79"], modules["lm_head"]) == (0, 1, 1)
    shard = plan(*BIG, "24GiB", "--placement", "shard", "--device-map")
    assert (shard.exit_code, shard.stderr.splitlines()[1]) == (2, "  try: --placement split")


def test_the_host_memory_of_a_described_machine_is_said_where_layers_wait_in_it() -> None:
    one = ("--model", "llama-65b", "--gpus", "1", "--gpu-memory", "24GiB", "--set", "liger=true")
    assumed = plan(*one).stdout
    assert "61 of 80 layers are offloaded to host memory, since nothing else fits: 23.7 GiB of it" in assumed
    assert "note     the machine is taken to have 64.0 GiB of host memory: --host-memory" in assumed
    assert "is taken to have" not in plan(*one, "--host-memory", "80GiB").stdout
    poor = plan(*one, "--host-memory", "16GiB")
    assert poor.exit_code == 2
    assert "47 layers could be offloaded to host memory, but they are 18.3 GiB and 95 % of it 15.2 GiB" in poor.stderr


def test_what_runs_here_taught_corrects_the_plan_of_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cluster", lambda: hypothetical(1, 24 * GIB, name="NVIDIA RTX 4090"))
    monkeypatch.setattr(calibration, "correction_for", lambda *_, **__: Correction(speed=0.5, runs=2))
    here, there = plan("--model", "llama-7b"), plan("--model", "llama-7b", "--gpu-name", "RTX 4090")
    assert "note     speed corrected by 2 earlier runs on this kind of card\n" in here.stdout
    assert "corrected" not in there.stdout


def test_a_plan_as_json_is_the_plan() -> None:
    result = plan(*BIG, "48GiB", "--json")
    decided = msgspec.json.decode(result.stdout, type=Plan)
    assert (decided.spec.model, decided.world_size, decided.device) == ("llama-65b", 4, "cuda")
    assert decided.ranks[3].expected[0].total <= USABLE_SHARE * 48 * GIB


def test_what_does_not_fit_ends_with_code_2_and_the_missing_bytes() -> None:
    result = plan(*BIG, "24GiB", "--set", "placement=replicate")
    assert (result.exit_code, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: llama-65b at 4 bits needs 40.0 GiB on every GPU, 17.2 GiB more than 95 % of 24.0")
    assert second.startswith("  try: --placement shard (")
    assert plan(*BIG, "24GiB", "--set", "placement=shard").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no model was named\n  try: --model smollm2-135m\n"),
        ((*BIG, "48"), "error: '48' without a unit is 48 bytes\n  try: --gpu-memory 48GiB\n"),
        ((*BIG, "48 GX"), "error: '48 GX' is not an amount of memory such as 24GiB or 24GB\n"
         "  try: --gpu-memory 48GiB\n"),
        ((*BIG, "48GiB", "--set", "seqlen=3"), "error: unknown setting 'seqlen'\n  try: --set seq_len=512\n"),
        ((*BIG, "48GiB", "--bits", "3"),
         "error: qlora has backbones of 4, 8 or 16 bits, not 3\n  try: --method gptq-lora\n"),
        ((*BIG, "48GiB", "--gpus", "3"), "error: global_batch=16 cannot be spread over 3 ranks\n"
         "  try: --set global_batch=18\n"),
    ],
)  # fmt: skip
def test_a_wrong_setting_ends_with_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = plan(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)


@pytest.mark.parametrize("recipe", ["guanaco-7b", "demo"])
def test_a_recipe_can_be_planned(recipe: str) -> None:
    assert plan(recipe, "--gpus", "1", "--gpu-memory", "48GiB").exit_code == 0


def test_a_recipe_that_trains_for_epochs_can_be_planned(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("model = 'llama-7b'\nepochs = 3\n")
    result = plan(str(tmp_path / "mine.toml"), "--gpus", "1", "--gpu-memory", "48GiB")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_in_the_table_is_there(name: str) -> None:
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom qdist.cli.main import main\n"
        f"main(['plan', *{BIG!r}, '48GiB'], prog_name='qdist', standalone_mode=False)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_lines_break_between_words_and_go_on_below_them() -> None:
    lines = plan_lines(planned("llama-65b", gpus(4, 24), {"gpus": 4}))
    narrow = wrapped(lines, 80)
    rows = [line for line in narrow if "%" not in line]
    assert max(map(len, rows)) <= 80
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(lines).split())
    (first,) = [position for position, line in enumerate(narrow) if line.startswith("batch")]
    assert narrow[first + 1].startswith(" " * 9)


QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def checkpoint(
    folder: Path, stated: object = QUANTIZED, beside: object = QUANTIZED, files: tuple[str, ...] = FILES
) -> tuple[str, ...]:
    """Arguments that plan with a folder as a GPTQ checkpoint's, its tensors left out."""
    folder.mkdir()
    config = dict(lookup("llama-7b").config) | ({"quantization_config": stated} if stated else {})
    (folder / "config.json").write_text(json.dumps(config))
    if beside:
        (folder / "quantize_config.json").write_text(json.dumps(beside))
    index = {"weight_map": {str(number): name for number, name in enumerate(FILES)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in files:
        (folder / name).touch()
    return "--model", str(folder), "--gpus", "1", "--gpu-memory", "24GiB"


@pytest.mark.parametrize("method", ["gptq-lora", "qa-lora"])
def test_a_gptq_checkpoint_is_planned_as_its_files_say_and_an_alias_without_any(tmp_path: Path, method: str) -> None:
    for arguments in (
        checkpoint(tmp_path / "whole"),
        checkpoint(tmp_path / "old", stated=None),
        ("--model", "llama-7b", "--gpus", "1", "--gpu-memory", "24GiB"),
    ):
        result = plan(*arguments, "--method", method)
        assert result.exit_code == 0, result.output
        assert "GPTQ 4 bits, groups of 128" in result.stdout


@pytest.mark.parametrize("method", ["gptq-lora", "qa-lora"])
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"stated": None, "beside": None},
         "error: FOLDER is not a GPTQ checkpoint\n  try: qdist quantize FOLDER --method gptq --data DATA --out DIR, "
         "or --method qlora\n"),
        ({"stated": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "beside": None},
         "error: FOLDER is quantized with bitsandbytes and is not a GPTQ checkpoint\n  try: the 16-bit model that it "
         "was made from: qdist quantize MODEL --method gptq --data DATA --out DIR\n"),
        ({"beside": QUANTIZED | {"group_size": 64}},
         "error: FOLDER: config.json says GPTQ 4 bits, groups of 128 in the format gptq, and quantize_config.json "
         "GPTQ 4 bits, groups of 64 in gptq\n  try: the checkpoint's own pair of files\n"),
        ({"stated": None, "beside": QUANTIZED | {"bits": 8}},
         "error: FOLDER has 8 bits; this run wants 4\n  try: --bits 8\n"),
        ({"files": FILES[:1]},
         "error: FOLDER lacks 1 of the 2 files that model.safetensors.index.json names: "
         "model-00002-of-00002.safetensors\n  try: download the checkpoint again, or qdist quantize the model that it "
         "was made from\n"),
    ],
    ids=["16 bits", "bitsandbytes", "contradiction", "bits", "a file gone"],
)  # fmt: skip
def test_what_launch_refuses_is_not_planned(tmp_path: Path, spoilt: dict[str, Any], message: str, method: str) -> None:
    arguments = (*checkpoint(tmp_path / "base", **spoilt), "--method", method)
    result = plan(*arguments)
    assert (result.stdout, result.stderr) == ("", message.replace("FOLDER", str(tmp_path / "base")))
    assert result.exit_code
    launched = CliRunner().invoke(
        main, ["launch", *arguments[:4], "--method", method, "--data", "demo", "--dry-run"], prog_name="qdist"
    )
    assert launched.stderr == result.stderr


def test_random_weights_of_a_folders_shape_can_be_planned(tmp_path: Path) -> None:
    arguments = checkpoint(tmp_path / "plain", stated=None, beside=None)
    result = plan(*arguments, "--method", "gptq-lora", "--set", "load_format=dummy")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[4]", "config.json is not a JSON object: it holds a list"),
        ("config.json", b'{"a": "\xff"}', "config.json is not text: byte 0xff at position 7"),
        ("model.safetensors.index.json", b"{}", "model.safetensors.index.json has no weight_map"),
    ],
)
def test_a_small_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    stated: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    config = {**config_of("smollm2-135m"), "quantization_config": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / name).write_bytes(content)
    flags = ["plan", "--method", "gptq-lora", "--gpus", "1", "--gpu-memory", "24GiB", "--model", str(tmp_path)]
    done = CliRunner().invoke(main, flags)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_quantization_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_of("smollm2-135m"), "quantization_config": "gptq"}))
    flags = ["plan", "--method", "gptq-lora", "--gpus", "1", "--gpu-memory", "24GiB", "--model", str(tmp_path)]
    done = CliRunner().invoke(main, flags)
    assert done.exit_code == 2
    assert "quantization_config is not an object in config.json" in done.output


ONE = ("--gpus", "1", "--gpu-memory", "24GiB")


def test_a_hub_id_is_planned_by_its_alias_shape_which_a_note_says() -> None:
    shown, own = plan("--model", "Qwen/Qwen2.5-7B-Instruct", *ONE), plan("--model", "qwen2.5-7b", *ONE)
    assert (shown.exit_code, own.exit_code) == (0, 0), shown.output
    note = "Qwen/Qwen2.5-7B-Instruct is not here: by its name it has the shape of qwen2.5-7b"
    assert note in " ".join(shown.stdout.split())
    assert "is not here" not in own.stdout
    assert labels(shown.stdout)["memory"] == labels(own.stdout)["memory"]


def test_a_gguf_file_is_planned_from_its_header(tmp_path: Path) -> None:
    file = tmp_path / "tiny.GGUF"
    file.write_bytes(header(LLAMA, ("token_embd.weight",)))
    shown = plan("--model", str(file), *ONE, "--set", "seq_len=128")
    assert shown.exit_code == 0, shown.output
    assert "tiny.GGUF: 74,240 parameters" in " ".join(shown.stdout.split())


def test_baichuan_is_planned_and_not_launched() -> None:
    assert plan("--model", "baichuan-7b", *ONE).exit_code == 0
    launched = CliRunner().invoke(main, ["launch", "--model", "baichuan-7b", "--data", "demo"], prog_name="qdist")
    assert launched.exit_code == 2
    assert launched.stderr.startswith("error: transformers has no class for baichuan-7b: Python files out of its own ")
