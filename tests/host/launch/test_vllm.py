"""Is vLLM started with what serves a run, and is the command shown where there is no vLLM?"""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.errors import MachineError, ModelError, RunError
from qdist.core.requests import Export, Serve
from qdist.host.launch import vllm
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ServedTargets, targets_to_serve
from tests.plans import CPU, planned

SERVE = Serve(runs=("r",), engine="vllm", port=9, slots=8, context=2048)
HEAD = ["vllm", "serve", "/m", "--served-model-name", "base", "--host", "127.0.0.1", "--port", "9"]
BOUNDS = ["--max-model-len", "2048", "--max-num-seqs", "8"]


def make_run(path: Path, *, rank: int = 64, settings: dict[str, Any] | None = None) -> RunDir:
    """A finished run on paper."""
    (path / "adapter").mkdir(parents=True)
    (path / "plan.json").write_bytes(msgspec.json.encode(planned("llama-7b", CPU, settings)))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16}
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    return RunDir(path)


def test_a_model_alone_needs_no_more_than_its_bounds() -> None:
    assert vllm.vllm_command(SERVE, "/m", "base", {}, 0, []) == [*HEAD, *BOUNDS]


def test_the_dtype_is_handed_on() -> None:
    in_half = msgspec.structs.replace(SERVE, dtype="float16")
    assert vllm.vllm_command(in_half, "/m", "base", {}, 0, []) == [*HEAD, *BOUNDS, "--dtype", "float16"]


def test_adapters_are_named_and_the_rank_is_one_that_vllm_takes() -> None:
    words = vllm.vllm_command(
        SERVE, "/m", "base", {"a": Path("/a"), "b": Path("/b")}, 20, ["--quantization", "bitsandbytes"]
    )
    lora = ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "2", "--lora-modules", "a=/a", "b=/b"]
    assert words == [*HEAD, *BOUNDS, "--quantization", "bitsandbytes", *lora]
    with pytest.raises(RunError, match="have rank 600, and vLLM takes 512 at most"):
        vllm.vllm_command(SERVE, "/m", "base", {"a": Path("/a")}, 600, [])


def test_plain_lora_is_served_as_it_is_and_the_command_is_shown_where_vllm_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "my run")
    monkeypatch.setattr(vllm.shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="vLLM is not installed here"):
        vllm.serve(SERVE, targets_to_serve([str(run.path)]))
    assert f"--lora-modules 'my run={run.adapter}'" in capsys.readouterr().out


def test_qa_lora_is_exported_once_beside_the_run_and_vllm_gets_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "r")
    plan = run.plan()
    spec = msgspec.structs.replace(plan.spec, method="qa-lora")
    monkeypatch.setattr(RunDir, "plan", lambda _: msgspec.structs.replace(plan, spec=spec))
    exported, started = list[Export](), list[Any]()

    def export(request: Export) -> None:
        exported.append(request)
        make_run(Path(request.out))
        (Path(request.out) / "adapter" / "adapter_config.json").rename(Path(request.out) / "adapter_config.json")
        (Path(request.out) / "adapter_model.safetensors").write_bytes(b"")

    monkeypatch.setattr(vllm, "run_task", export)
    monkeypatch.setattr(vllm.shutil, "which", lambda name: "/bin/vllm")
    monkeypatch.setattr(vllm.os, "execvpe", lambda *given: started.append(given))
    monkeypatch.setenv("QDIST_API_KEY", "secret")
    for _ in range(2):
        vllm.serve(SERVE, ServedTargets({"r": str(run.path)}, "base"))
    out = tmp_path / "r-vllm"
    assert exported == [Export(to="lora", runs=(str(run.path),), out=str(out))]
    program, words, environment = started[0]
    assert (program, words[-1], environment["VLLM_API_KEY"]) == ("vllm", f"r={out}", "secret")
    assert "secret" not in words


def test_a_packing_that_vllm_has_no_kernels_for_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", settings={"bits": 8})
    with pytest.raises(ModelError, match="vLLM does not pack to 8 bits"):
        vllm.serve(SERVE, targets_to_serve([str(run.path)]))
