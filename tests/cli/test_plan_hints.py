"""Does every hint of `qdist plan`, followed to the letter, lead to a plan?"""

import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.random_plans import NO_GPU, Draw, followed, run, trials

MACHINE = "--gpu-memory 24GiB "


@pytest.mark.parametrize(
    ("command", "message", "hint"),
    [
        (MACHINE + "--model llama-7b --gpus 4 --set micro_batch=3",
         "global_batch=16 is not a multiple of micro_batch=3", "--set micro_batch=2"),
        (MACHINE + "--model llama-7b --gpus 3 --set micro_batch=5 --set global_batch=20",
         "global_batch=20 cannot be spread over 3 ranks", "--set global_batch=30"),
        (MACHINE + "--model smollm2-135m --gpus 32 --set split.schedule=1f1b",
         "32 stages need at least as many layers, and smollm2-135m has 30 layers",
         "--gpus-per-group 16 --set global_batch=32"),
        (MACHINE + "--model llama-7b --bits 3 --set quant.double=false --set epochs=2 --set steps=3",
         "qlora has backbones of 4, 8 or 16 bits, not 3", "--bits 4 --set epochs=auto"),
        (MACHINE + "--model llama-7b --gpus 4 --set zero.offload=cpu --set zero.stage=3 --placement split",
         "zero.offload=cpu comes with ZeRO stage 2, not 3", "--set zero.stage=2 --placement shard"),
        (MACHINE + "--model llama-7b --set train.verify_steps=5",
         "train.verify_steps=5 compares the bytes of a sharded backbone", "--set train.verify_steps=0"),
        (MACHINE + "--model llama-7b --set learning_rate=1e-4 --set lora_r=8 --set micro_batch=3",
         "unknown setting 'learning_rate', unknown setting 'lora_r'",
         "--set optim.lr=1e-4 --set lora.r=8 --set micro_batch=2"),
        (MACHINE + "--model smollm2-135m --method qa-lora",
         "q_proj of smollm2-135m has 576 inputs, which groups of 128 do not divide", "--set quant.group_size=64"),
        (MACHINE + "--model smollm2-135m --set lora.targets=qproj,v_proj,x", "smollm2-135m has no linear 'qproj' among "
         "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj", "--set lora.targets=q_proj,v_proj"),
        (MACHINE + "--gpus 1000000000000 --model llama-7b", "a machine to plan for has at most 256 GPUs, not "
         "1,000,000,000,000", "--gpus 8"),
        (MACHINE + "--gpus 8 --model llama-7b --set global_batch=9223372036854775807",
         "global_batch=9223372036854775807 cannot be spread over 8 ranks", "--gpus 7"),
        ("--model llama-7b --gpu-memory ''", "'' is not an amount of memory such as 24GiB or 24GB",
         "--gpu-memory 24GiB"),
        ("--model llama-7b --gpu-name 'GeForce 4090'", "no card is known as 'GeForce 4090'", "--gpu-name 'RTX 4090'"),
        ("--model llama-7b --gpus 1000000000000", "a machine has at most 256 ranks, not 1,000,000,000,000",
         "--gpus 1"),
        ("--model llama-7b --gpu-name H100 --set graphs=true --set split.offload_layers=4",
         "graphs=true, but offloaded layers are copied within a pass", "--set graphs=auto"),
        ("--model llama-7b --gpu-name 'RTX 3090' --set compute=fp8", "compute=fp8 needs matrix units for fp8, which "
         "the RTX 3090 does not have: cards from compute capability 8.9 on do, such as RTX 4090, L40S and H100",
         "--set compute=auto"),
        ("--model smollm2-135m --max-memory 12GiB", "--max-memory caps GPUs, and this machine has none",
         "--max-memory auto"),
    ],
)  # fmt: skip
def test_a_hint_settles_all_that_is_wrong(command: str, message: str, hint: str) -> None:
    drawn = Draw(tuple(shlex.split(command)), NO_GPU)
    refused = run(drawn)
    assert (refused.error, refused.try_) == (message, hint)
    words = followed(drawn.words, refused)
    assert words
    assert not run(Draw(words, NO_GPU)).kind


def test_hints_of_random_commands_lead_to_plans() -> None:
    """bench/random_plans.py does the same with 2,000."""
    with ThreadPoolExecutor(1) as pool:
        rows = trials("a test", 60, pool)
    assert [row for row in rows if row.first.crashed or row.second.crashed] == []
    became = [row.became for row in rows if row.first.kind]
    assert len(became) > 20
    assert set(became) <= {"plan", "another kind"}
    assert became.count("plan") >= 0.95 * len(became)
