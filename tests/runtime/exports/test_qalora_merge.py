"""A merged QA-LoRA adapter: the base's bytes as they were, the adapter's words, and a model like any other."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdist.core.errors import ModelError, RunError, SpecError
from qdist.core.model.gptq import SHIFTED, Gptq, Override, Shape
from qdist.core.requests import Merge
from qdist.host.run.rundir import RunDir
from qdist.host.sources.model_folder import stated
from qdist.runtime.exports import merge as merging
from qdist.runtime.exports import qalora_merge
from qdist.runtime.exports.qalora_merge import BOUND, Difference, merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats import packed_folder
from qdist.runtime.infer.load import load
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq import check
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.tiny import adapted_run, dummy_job, logits_of, real_job, save_config, save_data

ASYMMETRIC = Gptq(shape=Shape(4, 32), sym=False, format="gptq_v2")
SYMMETRIC = Gptq(shape=Shape(4, 32))


def merged(*runs: RunDir, out: Path, weights: tuple[float, ...] = ()) -> Difference:
    return merge_offsets(Adapters(runs, weights), out)


def run_over(model: Path, run: Path, *, scale: float = 0.05, method: str = "qa-lora", **settings: Any) -> RunDir:
    data = run.parent / "d.jsonl"
    job = real_job(model, data if data.exists() else save_data(data), run, seq_len=64, method=method, **settings)
    return adapted_run(job, scale=scale)[0]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "gptq",
    [
        SYMMETRIC,
        ASYMMETRIC,
        Gptq(shape=Shape(2, 32)),
        Gptq(shape=Shape(3, 32), format="gptq_v2"),
        Gptq(shape=Shape(8, 64)),
    ],
    ids=str,
)
def test_a_merged_model_says_what_the_adapter_says(tmp_path: Path, gptq: Gptq) -> None:
    model = save_gptq(tmp_path / "gptq", gptq, tokenizer=padded())
    run = run_over(model, tmp_path / "run", bits=gptq.shape.bits)
    difference = merged(run, out=tmp_path / "merged")
    assert difference.relative < 5e-4
    assert difference.unchanged == len(load_file(model / "model.safetensors"))
    own = logits_of(load(tmp_path / "merged", dtype="float32")[0], high=250)
    adapter, base = (logits_of(load(of, dtype="float32")[0], high=250) for of in (run.path, model))
    assert relative(own, adapter) < 1e-3
    assert relative(own, adapter) < 5e-3 * relative(base, adapter)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox"])
def test_the_tensors_of_the_base_keep_every_bit(tmp_path: Path, family: str) -> None:
    model = save_gptq(tmp_path / "gptq", SYMMETRIC, family, tokenizer=padded())
    before = (model / "model.safetensors").read_bytes()
    merged(run_over(model, tmp_path / "run"), out=tmp_path / "merged")
    base, after = load_file(model / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in base.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after.pop(name).view(torch.uint8), tensor.view(torch.uint8)), name
    assert after.keys() == {name.replace(".qweight", ".weight_offset") for name in base if name.endswith(".qweight")}
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_merged_too(tmp_path: Path, tied: bool) -> None:
    """And are all that differs of a table."""
    model = save_gptq(tmp_path / "gptq", SYMMETRIC, tie_word_embeddings=tied, vocab_size=270)
    run = run_over(model, tmp_path / "run", new_tokens=["<call>", "<return>"])
    merged(run, out=tmp_path / "merged")
    source, own = run.plan().source, load(tmp_path / "merged", dtype="float32")
    assert own[0].config.vocab_size == source.vocab_rows
    assert own[1].convert_tokens_to_ids("<call>") in source.new_token_ids
    high = source.new_token_ids[-1] + 1
    theirs = logits_of(load(run.path)[0], high=high, seed=2)
    assert relative(logits_of(own[0], high=high, seed=2), theirs) < 1e-3
    old = [row for row in range(270) if row not in source.new_token_ids]
    tables = [
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (model, tmp_path / "merged")
    ]
    assert torch.equal(tables[0][old], tables[1][old])


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1, 0.3, 1.0])
def test_offsets_keep_a_thousandth_of_any_update(tmp_path: Path, share: float) -> None:
    """Random adapters whose update is `share` of the weights' scales, in the root of the mean square."""
    model = save_gptq(tmp_path / "gptq", SYMMETRIC)
    run = run_over(model, tmp_path / "run")
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    adapters, scales = Adapters([run]), load_file(model / "model.safetensors")
    for path in adapters.paths:
        update = adapters.of(path)
        assert update is not None
        wanted = share * float(scales[f"{path}.scales"].float().square().mean().sqrt())
        factor = wanted / float(update.pooled(32).square().mean().sqrt())
        tensors[f"base_model.model.{path}.lora_B.weight"] *= factor
    save_file(tensors, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert merged(run, out=tmp_path / "merged").relative < BOUND / 2


def test_layers_compute_the_same_forward_and_backward(tmp_path: Path) -> None:
    """Against unpacking and multiplying in float32; offsets are as large as weights."""
    model = save_gptq(tmp_path / "gptq", SYMMETRIC)
    merged(run_over(model, tmp_path / "run", scale=0.5), out=tmp_path / "merged")
    packed = [m for m in load(tmp_path / "merged", dtype="float32")[0].modules() if isinstance(m, PackedGptq)]
    for layer in packed[:7]:
        inputs = torch.randn(5, layer.in_features, requires_grad=True)
        wide = inputs.detach().clone().requires_grad_()
        outer = torch.randn(5, layer.out_features)
        layer(inputs).backward(outer)
        bias = 0 if layer.bias is None else layer.bias
        product = wide @ layer.unpacked(torch.device("cpu")).t() + bias
        product.backward(outer)
        assert relative(layer(inputs).detach(), product.detach()) < 1e-5
        assert relative(inputs.grad, wide.grad) < 1e-5


@pytest.mark.parametrize("method", ["qa-lora", "gptq-lora"])
def test_a_merged_model_is_trained_on_like_any_other(tmp_path: Path, method: str) -> None:
    model = save_gptq(tmp_path / "gptq", SYMMETRIC)
    merged(run_over(model, tmp_path / "run"), out=tmp_path / "merged")
    again = run_over(tmp_path / "merged", tmp_path / "again", method=method)
    plan = again.plan()
    assert plan.source.gptq is not None
    assert plan.source.gptq.offset is not None
    assert relative(logits_of(load(again.path)[0], high=250), logits_of(load(tmp_path / "run")[0], high=250)) > 0.01


def test_a_second_adapter_is_merged_onto_the_first(tmp_path: Path) -> None:
    """The first pools 64 inputs and the second 32; the base is named as it was at first."""
    model = save_gptq(tmp_path / "gptq", SYMMETRIC)
    merged(run_over(model, tmp_path / "run", **{"lora.pool_group_size": 64}), out=tmp_path / "one")
    again = run_over(tmp_path / "one", tmp_path / "again")
    difference = merged(again, out=tmp_path / "two")
    assert difference.relative < BOUND
    own = logits_of(load(tmp_path / "two", dtype="float32")[0], high=250)
    assert relative(own, logits_of(load(again.path)[0], high=250)) < 6e-3  # updates are several times the weights
    one, two = (stated(tmp_path / name) for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.offset is not None
    assert two.offset is not None
    assert one.offset.base == two.offset.base
    assert (one.offset.group_size, two.offset.group_size) == (64, 32)


def test_several_adapters_are_added_up_with_their_weights(tmp_path: Path) -> None:
    model = save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded())
    runs = run_over(model, tmp_path / "a"), run_over(model, tmp_path / "b", seed=1, **{"lora.r": 8, "lora.pool": "sum"})
    merged(*runs, out=tmp_path / "merged", weights=(0.7, -0.2))
    both, *single = Adapters(runs, (0.7, -0.2)), *(Adapters([run]) for run in runs)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    gptq = stated(tmp_path / "merged")
    assert gptq is not None
    assert gptq.offset is not None
    for path in both.paths:
        parts = [adapters.of(path).pooled(32) for adapters in single]  # type: ignore[union-attr]
        wanted = 0.7 * parts[0] - 0.2 * parts[1]
        assert torch.allclose(stored[f"{path}.weight_offset"].float() * gptq.offset.scale, wanted, rtol=1e-3, atol=1e-5)


def test_a_pad_does_not_keep_adapters_apart(tmp_path: Path) -> None:
    """A tokenizer without a pad gets one, and no row; tokens that were asked for are another matter."""
    model = save_gptq(tmp_path / "gptq", SYMMETRIC)
    runs = run_over(model, tmp_path / "a"), run_over(model, tmp_path / "b", seed=1)
    assert not runs[0].plan().source.new_token_ids
    merged(*runs, out=tmp_path / "merged", weights=(1.0, 0.0))
    own = logits_of(load(tmp_path / "merged", dtype="float32")[0], high=250)
    assert relative(own, logits_of(load(runs[0].path)[0], high=250)) < 1e-3
    wordy = run_over(model, tmp_path / "c", new_tokens=["<call>"])
    for other in (runs[0], wordy):
        with pytest.raises(RunError, match=r"different rows to the vocabulary|hold rows of new tokens"):
            merged(other, wordy, out=tmp_path / "other")


def test_runs_over_other_bases_are_not_added_up(tmp_path: Path) -> None:
    bases = [save_gptq(tmp_path / n, SYMMETRIC, tokenizer=padded(), seed=seed) for seed, n in enumerate(("a", "b"))]
    bases.append(shutil.copytree(bases[0], tmp_path / "copy of a"))
    one, other, copy = (run_over(base, tmp_path / f"{base.name}-run") for base in bases)
    with pytest.raises(RunError, match="was trained on"):
        Adapters([one, other], (1.0, 1.0))
    assert Adapters([one, copy], (1.0, 1.0)).paths
    with pytest.raises(RunError, match="2 runs and 1 weights"):
        Adapters([one, one], (1.0,))


def test_plain_lora_has_no_offsets(tmp_path: Path) -> None:
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run", method="gptq-lora")
    with pytest.raises(RunError, match="plain LoRA, which changes each weight by itself") as caught:
        merged(run, out=tmp_path / "merged")
    assert "--to 16bit" in str(caught.value.try_)
    assert not (tmp_path / "merged").exists()


def test_linears_in_16_bits_are_refused_or_left_alone(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` may leave some out; an adapter that does not change them is merged."""
    left = Gptq(shape=Shape(4, 32), overrides=(Override(r".*down_proj", None),))
    model = save_gptq(tmp_path / "gptq", left, tokenizer=padded())
    with pytest.raises(SpecError, match=r"2 linears in 16 bits, such as model\.layers\.0\.mlp\.down_proj") as caught:
        run_over(model, tmp_path / "refused")
    assert "lora.targets=gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj" in str(caught.value.try_)
    run = run_over(model, tmp_path / "run", **{"lora.targets": ("q_proj", "up_proj")})
    merged(run, out=tmp_path / "merged")
    own = logits_of(load(tmp_path / "merged", dtype="float32")[0], high=250)
    assert relative(own, logits_of(load(run.path)[0], high=250)) < 1e-3


def test_random_weights_are_merged_too(tmp_path: Path) -> None:
    settings = {"method": "qa-lora", "quant.group_size": 32}
    run, _ = adapted_run(dummy_job(save_config(tmp_path / "model"), tmp_path / "run", **settings))
    merged(run, out=tmp_path / "merged")
    own = logits_of(load(tmp_path / "merged", dtype="float32")[0])
    assert relative(own, logits_of(load(run.path)[0])) < 1e-3


def test_other_readers_refuse_what_they_would_read_without_its_offsets(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    merged(run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run"), out=tmp_path / "merged")
    with pytest.raises(ValueError, match="no `quant_method`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    said = json.loads((tmp_path / "merged" / "quantize_config.json").read_text())
    assert said["method"] == SHIFTED
    assert said["checkpoint_format"] == "gptq+offset"  # neither of GPTQModel's formats
    assert "quant_method" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_offset": None}, "weight_offset: Expected `object`"),
        ({"group_size": 48}, "128 inputs, which offsets of groups of 48 do not fit"),
        ({"group_size": 16}, "weight_offset has shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    merged(run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run"), out=tmp_path / "merged")
    (tmp_path / "merged" / "quantize_config.json").unlink()
    file = tmp_path / "merged" / "config.json"
    config = json.loads(file.read_text())
    stored = config["quantization_config"]
    stored["weight_offset"] = {**stored["weight_offset"], **change} if "group_size" in change else None
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        load(tmp_path / "merged")


def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"method": "qa-lora", "quant.group_size": 32}
    run, _ = adapted_run(dummy_job(save_config(tmp_path / "model", num_hidden_layers=3), tmp_path / "run", **settings))
    merged(run, out=tmp_path / "whole")
    write, count = packed_folder.write_tensors, iter(range(10))

    def killed(*arguments: Any, **more: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return write(*arguments, **more)

    monkeypatch.setattr(packed_folder, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        merged(run, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    written: list[str] = []

    def noted(folder: Path, name: str, entries: Any, **more: Any) -> Any:
        written.append(name)
        return write(folder, name, entries, **more)

    monkeypatch.setattr(packed_folder, "write_tensors", noted)
    merged(run, out=tmp_path / "merged")
    assert len(written) == 2
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_an_adapter_that_is_small_beside_the_first_is_merged_in_float32(tmp_path: Path) -> None:
    """Float16 would round the sum of both, and take a percent of the second."""
    model = save_gptq(tmp_path / "gptq", SYMMETRIC, tokenizer=padded())
    merged(run_over(model, tmp_path / "run"), out=tmp_path / "one")
    again = run_over(tmp_path / "one", tmp_path / "again")
    shrink(again, 1e-2)
    assert merged(again, out=tmp_path / "two").relative < 1e-4
    gptq = stated(tmp_path / "two")
    assert gptq is not None
    assert gptq.offset is not None
    assert (gptq.offset.dtype, gptq.offset.scale) == ("float32", 1.0)
    own = load(tmp_path / "two", dtype="float32")[0]
    assert relative(logits_of(own, high=250), logits_of(load(again.path)[0], high=250)) < 1e-5
    further = run_over(tmp_path / "two", tmp_path / "further")
    assert further.plan().source.gptq == check.checked(tmp_path / "two", blueprint(tmp_path / "two"), gptq)


def shrink(run: RunDir, factor: float) -> None:
    """Multiply a run's update."""
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    tensors = {name: value * (factor if "lora_B" in name else 1) for name, value in tensors.items()}
    save_file(tensors, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e38])
def test_an_update_that_is_no_number_leaves_nothing(tmp_path: Path, wrong: float) -> None:
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run")
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = wrong
    save_file(tensors, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj is infinite or no number"):
        merged(run, out=tmp_path / "merged", weights=(1e3,))
    assert sorted(tmp_path.iterdir()) == before


def test_rounding_that_takes_too_much_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(qalora_merge, "BOUND", 1e-12)
    monkeypatch.setattr(qalora_merge, "_squares", lambda values: float(values.double().square().sum()) + 1e-20)
    with pytest.raises(ModelError, match=r"takes \d+\.\d\d% of the adapter, and 0\.00% is the most") as caught:
        merged(run, out=tmp_path / "merged")
    assert "--to lora" in str(caught.value.try_)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**8])
def test_gradients_stay_within_float16(tmp_path: Path, loss_scale: float) -> None:
    """Stored offsets are as large as float16 allows; what they are multiplied by is not to leave it."""
    merged(run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run"), out=tmp_path / "merged")
    model = load(tmp_path / "merged", dtype="float32")[0]
    layer = next(module for module in model.modules() if isinstance(module, PackedGptq))
    gradient = torch.randn(5, layer.out_features)
    wanted = gradient @ layer.unpacked(torch.device("cpu"))
    layer.compute_dtype = torch.float16
    found = layer.input_gradient((loss_scale * gradient).half()).float() / loss_scale
    assert relative(found, wanted) < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_the_model_goes_on_computing_in_what_it_did(tmp_path: Path, dtype: str | None) -> None:
    model = save_gptq(tmp_path / "gptq", SYMMETRIC)
    config = json.loads((model / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (model / "config.json").write_text(json.dumps(config | ({"dtype": dtype} if dtype else {})))
    merged(run_over(model, tmp_path / "run"), out=tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == (dtype or "float16")


def test_an_emptied_cache_keeps_nobody_from_merging(tmp_path: Path) -> None:
    """The tokenizer lies with the adapter; without the tokens nothing is evaluated, and that is said."""
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run")
    plan = run.plan()
    assert plan.data is not None
    shutil.rmtree(plan.source.tokenizer)
    Path(plan.data.path).unlink()
    said = merging.merge_exactly(Merge(runs=(str(run.path),), out=str(tmp_path / "merged")))
    assert "not evaluated: the run's tokens are gone from the cache" in said
    assert load(tmp_path / "merged")[1].pad_token_id is not None


def test_small_offsets_keep_their_digits(tmp_path: Path) -> None:
    """An update of 1e-7 would be 1 or 2 of float16's smallest numbers."""
    run = run_over(save_gptq(tmp_path / "gptq", SYMMETRIC), tmp_path / "run")
    shrink(run, 1e-7)
    assert merged(run, out=tmp_path / "merged").relative < 5e-4
    gptq = stated(tmp_path / "merged")
    assert gptq is not None
    assert gptq.offset is not None
    assert math.log2(gptq.offset.scale).is_integer()
    assert gptq.offset.scale < 2.0**-30
