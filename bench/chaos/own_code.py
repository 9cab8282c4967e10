"""Is code of the working directory, or of a model's, tokenizer's or adapter's folder, ever run?

    python -m bench.chaos.own_code

Twelve commands are started in a folder that holds 200 modules named like those that qdist and its libraries import, or
try to: each leaves a mark when it is imported. Then the same commands over a model, tokenizer and adapter folder that
bring code of their own along (auto_map), with `y` waiting on the standard input.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.chaos.ground import Ground, finished, has_traceback, over_a_run, table

LONGEST_S = 300
OPTIONAL = (
    "sitecustomize", "usercustomize", "tensorflow", "flax", "jax", "apex", "mpi4py", "flash_attn", "xformers", "triton",
    "torchvision", "torchaudio", "PIL", "scipy", "sklearn", "pandas", "cupy", "numba", "onnx", "librosa", "cv2",
    "soundfile", "timm", "auto_gptq", "optimum", "awq", "hqq", "torchao", "liger_kernel", "wandb", "mlflow", "trackio",
    "tensorboard", "comet_ml", "clearml", "neptune", "readline", "gnureadline", "pdb", "nvidia", "pynvml",
    "configuration", "modeling", "model", "data", "main", "utils", "config", "test", "tests", "launch", "bench",
    "setup", "conftest",
)  # fmt: skip
MARKS = "from pathlib import Path\nwith open({mark!r}, 'a') as file:\n    file.write({name!r} + '\\n')\n"
IMPORTS = """
import sys, qdist.cli.main, qdist.runtime.train.prepare, qdist.runtime.train.worker, qdist.runtime.exports.merge
import torch, transformers, peft, accelerate, bitsandbytes, deepspeed, datasets, safetensors
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def main() -> None:
    """Both tables."""
    ground = Ground(Path(tempfile.mkdtemp(prefix="qdist-code-")))
    run = finished(ground)
    rows, bad = [], False
    names = shadows(ground.folder / "shadows", ground.folder / "mark")
    own = with_own_code(ground, run)
    for where, commands, cwd in (
        (f"{len(names)} modules in the working directory", commands_over(ground, run, ground.model, "a"), "shadows"),
        ("code of model, tokenizer and adapter", commands_over(ground, *own, "b"), "."),
    ):
        for name, command in commands.items():
            mark = ground.folder / "mark"
            mark.unlink(missing_ok=True)
            done = subprocess.run(command, cwd=ground.folder / cwd, env=ground.environment(), input="y\n" * 50,
                                  capture_output=True, text=True, timeout=LONGEST_S, check=False)  # fmt: skip
            ran = sorted(set(mark.read_text().split())) if mark.exists() else []
            asked = "[y/N]" in done.stdout + done.stderr
            bad |= bool(ran) or asked or has_traceback(done)
            said = (done.stderr.strip().splitlines() or ["-"])[-1][:70] if done.returncode else "-"
            rows.append((where, name, done.returncode, len(ran), " ".join(ran[:3]) or "-", asked, said))
            print(*rows[-1], sep="  ", flush=True)
    print(table(("where", "command", "exit", "executed", "which", "asked", "last line"), rows))
    shutil.rmtree(ground.folder, ignore_errors=True)
    raise SystemExit(bad)


def commands_over(ground: Ground, run: Path, model: Path, out: str) -> dict[str, list[str]]:
    """The twelve, started as the console script is: without the working directory on Python's path."""
    commands = over_a_run(run, model, ground.data, ground.folder / out)
    return {name: [command[0], "-P", *command[1:]] for name, command in commands.items()}


def shadows(folder: Path, mark: Path) -> list[str]:
    """200 modules, each named like one that is imported; every other a package."""
    folder.mkdir()
    found = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout.split()
    builtin = {*sys.builtin_module_names, "__main__"}
    third = [name for name in found if name not in sys.stdlib_module_names and name.isidentifier()]
    standard = [name for name in found if name in sys.stdlib_module_names and name not in builtin]
    names = [*dict.fromkeys((*OPTIONAL, *third, *standard))][:200]
    for number, name in enumerate(names):
        text = MARKS.format(mark=str(mark), name=name)
        if number % 2:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(text)
        else:
            (folder / f"{name}.py").write_text(text)
    return names


def with_own_code(ground: Ground, run: Path) -> tuple[Path, Path]:
    """A copy of a run, and of its model, in whose configurations code beside them is named."""
    model, copied, code = ground.folder / "own", ground.folder / "ownrun", {"AutoTokenizer": ["own.Tokenizer", None]}
    shutil.copytree(ground.model, model)
    shutil.copytree(run, copied)
    code |= {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}
    for folder in (model, copied / "adapter"):
        (folder / "own.py").write_text(MARKS.format(mark=str(ground.folder / "mark"), name="own"))
        for file in ("config.json", "tokenizer_config.json", "adapter_config.json"):
            if (folder / file).exists():
                path = folder / file
                path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    return copied, model


if __name__ == "__main__":
    main()
