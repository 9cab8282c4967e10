"""Does an adapter fit the run that is to start from it? Over files whose headers are written here by hand."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.errors import QdistError, RunError
from qdist.core.model.adapters.qa_lora import alphas
from qdist.core.model.shapes import Experts, LayerRun, LayerShape, Linear
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import resolve
from qdist.host.launch import claim, prepare
from qdist.host.run.rundir import RunDir
from qdist.host.sources.adapters import find_adapter, require_fit, start_of
from tests.plans import CPU, planned

MODEL = "smollm2-135m"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL: dict[str, Any] = {"model": MODEL, "load_format": "dummy", "steps": 3, "seq_len": 64, "lora": {"r": 4}}


def shapes(targets: tuple[str, ...], *, r: int = 4, model: str = MODEL, pool: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter, as PEFT names them."""
    facts, found = planned(model, CPU).facts, {}
    for layer in range(facts.layer_count):
        for linear in facts.targeted(targets):
            path = f"base_model.model.model.layers.{layer}.self_attn.{linear.name}"
            found[f"{path}.lora_A.weight"] = (r, linear.inputs // pool)
            found[f"{path}.lora_B.weight"] = (linear.outputs, r)
    return found


def save(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    content = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / TENSORS).write_bytes(len(content).to_bytes(8, "little") + content)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": "x", **config}
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def plan_from(adapter: Path, settings: dict[str, Any] | None = None, **more: Any) -> Plan:
    return planned(MODEL, CPU, {"lora.r": 4, "adapter": str(adapter), **(settings or {})}, **more)


def refusal(plan: Plan) -> tuple[str, str]:
    with pytest.raises(QdistError) as caught:
        require_fit(plan)
    return caught.value.message.replace(plan.spec.adapter or "", "A"), caught.value.try_


def test_a_folder_of_pefts_that_fits_is_started_from(tmp_path: Path) -> None:
    folder = save(tmp_path / "peft", shapes(("q_proj", "v_proj")))
    start = start_of(plan_from(folder, {"lora.targets": ("q_proj", "v_proj")}))
    assert start is not None
    assert (start.path, len(start.digest)) == (str(folder), 64)
    assert start_of(planned(MODEL, CPU)) is None


@pytest.mark.parametrize(
    ("settings", "config", "message", "attempt"),
    [
        ({"lora.r": 8}, {}, "the adapter in A has lora.r=4, and this run lora.r=8", "--set lora.r=4"),
        ({"lora.r": 8, "lora.targets": ("q_proj",)}, {"lora_alpha": 8},
         "the adapter in A has lora.r=4, lora.alpha=8.0, lora.targets=q_proj,v_proj, and this run lora.r=8, "
         "lora.alpha=16.0, lora.targets=q_proj",
         "--set lora.r=4 --set lora.alpha=8.0 --set lora.targets=q_proj,v_proj"),
        ({}, {"use_qalora": True}, "the adapter in A has method=qa-lora, and this run method=qlora",
         "--method qa-lora"),
        ({}, {"use_dora": True, "bias": "all"}, "A has use_dora, bias=all, which no run trains",
         "merge it with PEFT, and --model DIR"),
        ({}, {"peft_type": "IA3"}, "A has peft_type=IA3, which no run trains", "merge it with PEFT, and --model DIR"),
    ],
)  # fmt: skip
def test_an_adapter_of_other_settings_is_refused_with_those_that_fit(
    settings: dict[str, Any], config: dict[str, Any], message: str, attempt: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "peft", shapes(("q_proj", "v_proj")), **config)
    plan = plan_from(folder, {"lora.targets": ("q_proj", "v_proj"), **settings})
    assert refusal(plan) == (message, attempt)


def test_an_adapter_over_another_shape_is_refused_with_the_first_linear_that_differs(tmp_path: Path) -> None:
    folder = save(tmp_path / "other", shapes(("q_proj",), model="qwen2.5-0.5b"))
    message, attempt = refusal(plan_from(folder, {"lora.targets": ("q_proj",)}))
    assert message == f"A is over another model than {MODEL}: A of q_proj in layer 0 is 4x896, and would be 4x576"
    assert attempt == "the model that it was trained on"
    half = {name: shape for name, shape in shapes(("q_proj",)).items() if ".layers.29." not in name}
    message, _ = refusal(plan_from(save(tmp_path / "half", half), {"lora.targets": ("q_proj",)}))
    assert message.endswith("A of q_proj in layer 29 is not there, and would be 4x576")


def test_rows_of_new_tokens_have_to_be_those_of_the_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "peft", shapes(("q_proj",)), trainable_token_indices={"embed_tokens": [7, 8]})

    def over(rows: tuple[int, ...]) -> Plan:
        plan = plan_from(folder, {"lora.targets": ("q_proj",)}, new_token_ids=rows, vocab_rows=49153)
        return msgspec.structs.replace(plan, source=msgspec.structs.replace(plan.source, kind="folder", path="there"))

    require_fit(over((7, 8)))
    assert refusal(over((7,)))[0] == "the adapter in A has the rows of tokens 7, 8, and this run 7"
    assert refusal(over(()))[0].endswith("and this run none")


@pytest.mark.parametrize(
    ("trained", "asked", "attempt"),
    [
        ({"pool": "mean"}, {"pool": "mean"}, ""),
        ({}, {}, ""),
        ({"pool": "sum"}, {"pool": "peft"}, "--set lora.pool=sum"),
        ({}, {"pool": "mean"}, "--set lora.pool=peft"),
        ({"pool_group_size": 64}, {}, "--set lora.pool_group_size=64"),
    ],
)
def test_an_adapter_of_qa_lora_keeps_its_convention(
    trained: dict[str, Any], asked: dict[str, Any], attempt: str, tmp_path: Path
) -> None:
    def plan(lora: dict[str, Any]) -> Plan:
        settings = {"method": "qa-lora", "quant": {"group_size": 32}, "run": str(tmp_path / "run"), "gpus": 1}
        return prepare.prepare(resolve(SMALL, settings, {"lora": {"targets": ["q_proj"], **lora}})).plan

    was = plan(trained)
    pattern = alphas(was.spec, was.facts.targeted(("q_proj",)), was.pool) if "pool" in trained else {}
    tensors = shapes(("q_proj",), pool=was.pool)
    folder = save(tmp_path / "peft", tensors, use_qalora=True, qalora_group_size=was.pool, alpha_pattern=pattern)
    now = plan(asked)
    now = msgspec.structs.replace(now, spec=msgspec.structs.replace(now.spec, adapter=str(folder)))
    if attempt:
        assert refusal(now)[1] == attempt
    else:
        require_fit(now)


@pytest.mark.parametrize("name", ["nowhere", "empty", "qlora", "pickled"])
def test_what_is_no_adapter_is_refused_before_anything_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("pickled").mkdir()
    Path("pickled", CONFIG).write_text("{}")
    message, attempt = {
        "qlora": ("qlora is a method, not an adapter to start from", "--set adapter=auto --method qlora"),
        "pickled": (f"pickled has no {TENSORS}", "PEFT's save_pretrained, which writes it"),
    }.get(name, (f"{name} is neither a run nor a folder with {CONFIG}", "such a folder, or a run"))
    with pytest.raises(RunError) as caught:
        prepare.prepare(resolve({"model": "no such model", "run": "run", "adapter": name}))
    assert (caught.value.message, caught.value.try_) == (message, attempt)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with an adapter, over random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = claim.write(prepare.prepare(resolve({**SMALL, "run": "first"})))
    targets = tuple(linear.name for linear in run.plan().facts.linears)
    save(run.adapter, shapes(targets))
    return run


def test_a_run_and_the_adapter_in_it_are_the_same_start(trained: RunDir) -> None:
    assert find_adapter("first") == find_adapter("first/adapter") == trained.adapter.resolve()


def test_the_plan_records_the_adapter_and_a_resume_sees_another(trained: RunDir) -> None:
    job = prepare.prepare(resolve({**SMALL, "run": "second", "adapter": "first"}))
    assert job.plan.start is not None
    assert job.plan.start.path == str(trained.adapter.resolve())
    assert job.notes == (f"the adapter begins as that in {trained.adapter.resolve()}",)
    run = claim.write(job)
    assert prepare.prepare_resume(run, {}).plan.start == job.plan.start
    (trained.adapter / TENSORS).write_bytes((trained.adapter / TENSORS).read_bytes() + b"x")
    with pytest.raises(RunError, match=r"is not the adapter that second was to start from: its digest is \w{12}, and"):
        prepare.prepare_resume(run, {})
    (trained.adapter / TENSORS).unlink()
    with pytest.raises(RunError, match="and second starts from it: there is no checkpoint yet"):
        prepare.prepare_resume(run, {})
    run.checkpoint(1).mkdir()
    (run.checkpoint(1) / "DONE").touch()
    rest = prepare.prepare_resume(run, {})
    assert (rest.plan.start, rest.notes) == (job.plan.start, ())


@pytest.mark.parametrize(
    ("was", "message", "attempt"),
    [
        ({"method": "gptq-lora"}, "first was trained by gptq-lora, and this run is qlora", "--method gptq-lora"),
        ({"load_format": "auto"}, "first was trained on real weights, and this run is not", "--set load_format=auto"),
    ],
)
def test_a_run_of_another_kind_is_refused(was: dict[str, Any], message: str, attempt: str, trained: RunDir) -> None:
    plan = trained.plan()
    other = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, **was))
    (trained.path / "plan.json").write_bytes(msgspec.json.encode(other))
    with pytest.raises(RunError) as caught:
        prepare.prepare(resolve({**SMALL, "run": "second", "adapter": "first"}))
    assert (caught.value.message, caught.value.try_) == (message, attempt)


def test_a_run_over_other_weights_is_refused_by_their_fingerprints(trained: RunDir) -> None:
    plan = trained.plan()

    def over(model: str, original: str) -> Plan:
        spec = msgspec.structs.replace(plan.spec, adapter="first", model=model)
        return msgspec.structs.replace(plan, spec=spec, source=msgspec.structs.replace(plan.source, original=original))

    (trained.path / "plan.json").write_bytes(msgspec.json.encode(over("base-a", "a" * 64)))
    require_fit(over("base-b", "a" * 64))
    with pytest.raises(RunError) as caught:
        require_fit(over("base-b", "b" * 64))
    assert caught.value.message == (
        "first was trained on base-a, and this run is over base-b: the fingerprint of its tensors is bbbbbbbbbbbb, and "
        "was aaaaaaaaaaaa"
    )
    assert caught.value.try_ == "--model base-a"


def plan_with_experts(plan: Plan, targets: tuple[str, ...]) -> Plan:
    """A plan whose model has one layer of attention and eight experts."""
    matrices = (Linear("gate_up_proj", 64, 192, False, "mlp_in"), Linear("down_proj", 96, 64, False, "mlp_out"))
    shape = LayerShape(
        hidden=64, linears=(Linear("q_proj", 64, 64, False, "attention_in"),), intermediate=96, heads=4, kv_heads=4,
        head_dim=16, experts=Experts(path="mlp.experts", count=8, active=2, matrices=matrices),
    )  # fmt: skip
    facts = msgspec.structs.replace(plan.facts, layers=(LayerRun(shape, 1),))
    lora = msgspec.structs.replace(plan.spec.lora, targets=targets)
    return msgspec.structs.replace(plan, facts=facts, spec=msgspec.structs.replace(plan.spec, lora=lora))


def expert_shapes(*, r: int = 4) -> dict[str, tuple[int, ...]]:
    path = "base_model.model.model.layers.0.mlp.experts"
    return {
        f"{path}.base_layer.lora_A.weight": (8 * r, 64),
        f"{path}.base_layer.lora_B.weight": (192, 8 * r),
        f"{path}.lora_A.weight": (8 * r, 96),
        f"{path}.lora_B.weight": (64, 8 * r),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (r, 64),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (64, r),
    }


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_an_adapter_of_experts_fits_the_run_that_adapts_them(tmp_path: Path) -> None:
    folder = save(tmp_path / "peft", expert_shapes(), target_parameters=PARAMETERS)
    require_fit(plan_with_experts(plan_from(folder), ("q_proj", "experts")))
    message, attempt = refusal(plan_with_experts(plan_from(folder), ("q_proj",)))
    assert message.startswith("the adapter in A has lora.targets=q_proj,experts, and this run lora.targets=q_proj")
    assert attempt == "--set lora.targets=q_proj,experts"


def test_an_adapter_of_some_parameters_of_experts_is_told_from_one_of_all(tmp_path: Path) -> None:
    path = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{path}.lora_A.weight": (32, 96), f"{path}.lora_B.weight": (64, 32)}
    folder = save(tmp_path / "peft", tensors, target_parameters=PARAMETERS[1:])
    require_fit(plan_with_experts(plan_from(folder), ("experts.down_proj",)))
    assert refusal(plan_with_experts(plan_from(folder), ("experts",)))[1] == "--set lora.targets=experts.down_proj"


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    tensors = expert_shapes()
    tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] = (16, 96)
    folder = save(tmp_path / "peft", tensors, target_parameters=PARAMETERS)
    message, _ = refusal(plan_with_experts(plan_from(folder), ("q_proj", "experts")))
    assert "A of experts in layer 0 is 16x96, and would be 32x96" in message
