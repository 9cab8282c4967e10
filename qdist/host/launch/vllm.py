"""How is a run served by vLLM? With its adapter in a form that vLLM reads, and a command that is printed."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from qdist.core.errors import MachineError, ModelError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.requests import Export, Serve
from qdist.core.text import command, quoted
from qdist.host.files import folder_to_write
from qdist.host.run.rundir import RunDir
from qdist.host.sources.adapters import adapter_rank
from qdist.host.sources.targets import ADAPTER, ServedTargets
from qdist.host.tasks import run_task
from qdist.host.terminal import say

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` that vLLM takes."""
PROGRAM = "vllm"


def serve(request: Serve, targets: ServedTargets) -> NoReturn:
    """Export what vLLM does not read as it is, print the command, and become vLLM.

    Raises ModelError for packings that vLLM has no kernels for, MachineError where vLLM is not installed.
    """
    runs = {name: RunDir(path) for name, path in targets.paths.items() if name}
    plans = {name: run.plan() for name, run in runs.items()}
    flags = _packing_flags(next(iter(plans.values()))) if plans else []
    adapters = {name: _readable_adapter(run, plans[name], _out(request, run, name)) for name, run in runs.items()}
    ranks = [adapter_rank(folder) for folder in adapters.values()]
    source = next(iter(plans.values())).source.path if plans else targets.paths[""]
    words = vllm_command(request, source, targets.base, adapters, max(ranks, default=0), flags)
    say(quoted(*words))
    if shutil.which(PROGRAM) is None:
        raise MachineError(
            "vLLM is not installed here; the command above is the one that serves these adapters",
            try_="pip install vllm, in an environment of its own",
        )
    key = os.environ.get("QDIST_API_KEY")
    os.execvpe(PROGRAM, words, {**os.environ, **({"VLLM_API_KEY": key} if key else {})})


def vllm_command(
    request: Serve, source: str, base: str, adapters: Mapping[str, Path], rank: int, packing: list[str]
) -> list[str]:
    """The words of vLLM's command. source: the base's folder or hub id. rank: the largest of the adapters'."""
    words = [
        PROGRAM, "serve", source, "--served-model-name", base, "--host", request.host, "--port", str(request.port),
        "--max-model-len", str(request.context), "--max-num-seqs", str(request.slots), *packing,
    ]  # fmt: skip
    if request.trust_remote_code:
        words.append("--trust-remote-code")
    if request.dtype != "auto":
        words += ["--dtype", request.dtype]
    if adapters:
        allowed = next((each for each in _RANKS if each >= rank), None)
        if allowed is None:
            raise RunError(
                f"the adapters have rank {rank}, and vLLM takes {_RANKS[-1]} at most",
                try_=command("merge", "RUN", "--out", "merged"),
            )
        words += ["--enable-lora", "--max-lora-rank", str(allowed), "--max-loras", str(len(adapters))]
        words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return words


def _packing_flags(plan: Plan) -> list[str]:
    """How vLLM is to pack the base. Raises ModelError for what it cannot."""
    spec = plan.spec
    if plan.source.gptq is not None or spec.bits == 16:
        return []
    if spec.bits == 4:
        return ["--quantization", "bitsandbytes"]
    raise ModelError(
        f"vLLM does not pack to {spec.bits} bits as this run was trained", try_="qdist serve without --engine vllm"
    )


def _readable_adapter(run: RunDir, plan: Plan, out: Path) -> Path:
    """The folder of a run's adapter in a form that vLLM reads, written now if it has to be."""
    experts = bool(plan.facts.targeted_parameters(plan.spec.lora.targets))
    if not experts and plan.spec.method != "qa-lora":
        return run.adapter
    if not _is_newer(out, run.adapter):
        folder_to_write(str(out))
        run_task(Export(to="vllm" if experts else "lora", runs=(str(run.path),), out=str(out)))
    return out


def _is_newer(out: Path, adapter: Path) -> bool:
    """Whether an export is there already that was written after the adapter."""
    written, trained = out / ADAPTER, adapter / ADAPTER
    return written.is_file() and trained.is_file() and written.stat().st_mtime_ns >= trained.stat().st_mtime_ns


def _out(request: Serve, run: RunDir, name: str) -> Path:
    if request.out is None:
        return run.path.resolve().with_name(f"{run.path.resolve().name}-vllm")
    return Path(request.out) / name
