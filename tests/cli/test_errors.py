"""Does what is wrong look the same, and end with the same code, in whichever command it is found?"""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdist.cli import chat, convert, export, gather, generate, merge, quantize
from qdist.cli.main import COMMANDS, main
from qdist.core.errors import JobError, QdistError, SpecError

WRONG: tuple[tuple[str, str], ...] = (
    ("launch --model llama-7b --bits 5", "bits cannot be '5'"),
    ("launch --model llama-7b --gpus 0", "gpus cannot be '0'"),
    ("launch --model llama-7b --max-memory much", "'much' is not an amount of memory"),
    ("launch --model llama-7b --set lora.q=1", "unknown setting 'lora.q'"),
    ("launch --resume", "--resume goes with --run DIR alone"),
    ("launch gone", "no recipe 'gone'"),
    ("launch --model /gone/model --data demo", "no folder or file /gone/model"),
    ("plan --model llama-7b --gpus 0", "gpus cannot be '0'"),
    ("plan --model llama-7b --lr much", "optim.lr cannot be 'much'"),
    ("plan --model llama-7b --gpu-memory 1GiB", "llama-7b"),
    ("plan --model llama-7b --bits", "option '--bits' requires an argument"),
    ("quantize model", "missing option '--out'"),
    ("quantize model --out out --method nf5", "method cannot be 'nf5'"),
    ("quantize model --out out --method gptq --data demo --samples 0", "samples cannot be '0'"),
    ("quantize model --out out --method gptq --data demo --damping x", "damping cannot be 'x'"),
    ("quantize model --out out --dtype int8", "dtype cannot be 'int8'"),
    ("quantize /gone/model --out out", "no folder or file /gone/model"),
    ("convert gone.pth --from sparsebit --out out", "no file gone.pth"),
    ("convert gone.pth --from gptq --out out", "from cannot be 'gptq'"),
    ("convert gone.pth --out out", "missing option '--from'"),
    ("gather gone", "gone is not a run"),
    ("merge gone --out out", "gone is not a run"),
    ("merge gone --out out --weights 1,2", "weights are 2, runs are 1"),
    ("merge gone --out out --dtype int8", "dtype cannot be 'int8'"),
    ("merge --out out", "missing argument 'RUN..."),
    ("export gone --to lora --out out", "gone is not a run"),
    ("export gone --to gptq --out out --bits 5", "bits cannot be '5'"),
    ("export gone --to lora --out out --lossy", "--lossy is of --to zeros, not lora"),
    ("export gone --to onnx --out out", "to cannot be 'onnx'"),
    ("generate /gone/x --prompts gone.txt --out out", "no file gone.txt"),
    ("generate /gone/x --prompts gone.txt --out out --batch none", "batch cannot be 'none'"),
    (
        "generate /gone/x --prompts p.txt --out o --max-memory 20GiB",
        "--max-memory caps GPUs, and this machine has none",
    ),
    ("chat /gone/x", "no folder or file /gone/x"),
    ("chat /gone/x --max-memory much", "'much' is not an amount of memory"),
    ("chat /gone/x --max-memory 20GiB", "--max-memory caps GPUs"),
    ("chat /gone/x --max-new-tokens 0", "max_new_tokens cannot be '0'"),
    ("monitor gone", "gone is not a run"),
    ("monitor gone --rank -1", "invalid value for '--rank'"),
    ("stop gone", "gone is not a run"),
    ("runs gone", "gone"),
    ("metrics gone", "gone is not a run"),
    ("report gone", "gone is not a run"),
    ("doctor extra", "got unexpected extra argument"),
    *((f"{name} --zzz", "--zzz is not a flag") for name in COMMANDS),
)
"""A command that cannot be done, and how what it says begins."""
FORM = r"error: [^\n]+\n  try: [^\n]+\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("p.txt").write_text("hello\n")


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_what_cannot_be_is_two_lines_and_code_2(words: str, message: str) -> None:
    done = CliRunner().invoke(main, words.split(), prog_name="qdist")
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert re.fullmatch(FORM, done.stderr), done.stderr
    assert message in done.stderr
    assert not Path("out").exists()


def test_each_command_is_tried() -> None:
    assert {words.split()[0] for words, _ in WRONG} == set(COMMANDS)


@pytest.mark.parametrize(
    ("error", "code"), [(JobError("it failed", try_="again"), 1), (SpecError("no", try_="yes"), 2)]
)
def test_what_a_process_of_its_own_came_to_is_told_alike(
    error: QdistError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise error

    for module in (chat, convert, export, gather, generate, merge, quantize):
        monkeypatch.setattr(module, "run_task", fails)
    Path("llama.pth").touch()
    done = CliRunner().invoke(main, ["convert", "llama.pth", "--from", "sparsebit", "--out", "out"], prog_name="qdist")
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"error: {error}\n")


def test_what_only_torch_finds_out_is_told_alike() -> None:
    Path("llama.pth").write_text("no checkpoint")
    done = CliRunner().invoke(main, ["convert", "llama.pth", "--from", "sparsebit", "--out", "out"], prog_name="qdist")
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.fullmatch(FORM, done.stderr), done.stderr
