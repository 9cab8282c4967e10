"""A model quantized by GPTQ: whole or absent, the same after a kill, and close to what it was."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qdist.core.errors import DataError, JobError, ModelError, PlanError, QdistError, RunError, SpecError
from qdist.core.model.gptq import Gptq, Shape, from_config
from qdist.core.requests import GptqSettings, MakeGptq
from qdist.host.files import locked
from qdist.runtime.formats import work_folder
from qdist.runtime.formats.gptq_folder import Quantized
from qdist.runtime.formats.packed_folder import opened, tensor_files
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq import calibrate
from qdist.runtime.quantize.gptq import calibrate as calibrating
from qdist.runtime.quantize.gptq import make as making
from qdist.runtime.quantize.gptq.calibrate import Calibration, LaneSums, batches, pieces
from qdist.runtime.quantize.gptq.check import checked
from qdist.runtime.quantize.gptq.decoder import Decoder
from qdist.runtime.quantize.gptq.job import GptqJob
from qdist.runtime.quantize.gptq.make import make, run
from qdist.runtime.quantize.gptq.solve import relative_error, unpacked
from qdist.runtime.quantize.tensors import tensors_of
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.tiny import logits_of, save_config, save_data, save_model

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(7)
    letters = torch.randint(32, 127, (6000,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text("".join(map(chr, letters)))
    return str(tmp_path / "text.txt")


def wanted(data: str, **changes: Any) -> GptqSettings:
    return GptqSettings(**{"data": data, "samples": 8, "seq_len": 64, "group_size": 32, **changes})


def loaded(folder: Path, source: Path) -> tuple[Any, Gptq, dict[str, Quantized]]:
    """The source's model with the checkpoint's weights, dequantized; what the checkpoint says; its linears."""
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == config
    gptq, files = from_config(config, name=str(folder)), tensor_files(folder)
    model = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    values, linears = dict[str, torch.Tensor](), dict[str, Quantized]()
    for name, file in files.items():
        with opened(folder / file) as handle:
            if name.endswith(".qweight"):
                path = name.removesuffix(".qweight")
                linears[path] = Quantized(*(handle.get_tensor(f"{path}.{leaf}") for leaf in Quantized._fields[:4]))
                shape = gptq.of(path)
                assert shape is not None
                values[f"{path}.weight"] = unpacked(linears[path], shape.bits, offset=gptq.zero_offset)
            elif not name.endswith((".qzeros", ".scales", ".g_idx")):
                values[name] = handle.get_tensor(name)
    names = set(model.state_dict())
    missing = names - set(values) - set(model.all_tied_weights_keys)
    assert (missing, set(values) - names) == (set(), set())
    model.load_state_dict(values, strict=False)
    return model, gptq, linears


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("bloom", {}), ("opt", {}), ("gpt_neox", {})],
    ids=["llama tied", "qwen2", "bloom", "opt", "gpt_neox"],
)
def test_every_family_is_close_to_what_it_was(tmp_path: Path, text: str, family: str, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    source, out = save_model(tmp_path / "model", family, **changes), tmp_path / "out"
    make(str(source), out, wanted(text, bits=(8,)))
    before = logits_of(AutoModelForCausalLM.from_pretrained(source).eval())
    quantized, gptq, linears = loaded(out, source)
    after = logits_of(quantized)
    assert float((after - before).norm() / before.norm()) < 0.05
    assert gptq == Gptq(shape=Shape(8, 32))
    assert checked(out, blueprint(source), gptq) == gptq
    assert len(linears) == len(blueprint(source).linears)
    names = sorted(path.name for path in out.iterdir())
    assert [name for name in names if name.startswith(".")] == []
    assert {"tokenizer.json", "generation_config.json", "model-00003-of-00003.safetensors"} <= set(names)


@pytest.mark.parametrize(
    "changes",
    [{"bits": (3,), "group_size": 64}, {"sym": False, "format": "gptq_v2"}, {"sym": False}, {"desc_act": True}],
    ids=["3 bits", "no-sym", "no-sym v1", "desc_act"],
)
def test_outputs_err_less_than_those_of_rounded_weights(
    tmp_path: Path, model: Path, text: str, changes: dict[str, Any]
) -> None:
    """Of the first linear: its inputs are the same before and after."""
    settings = wanted(text, **changes)
    make(str(model), tmp_path / "out", settings)
    _, gptq, linears = loaded(tmp_path / "out", model)
    assert gptq == settings.gptq(settings.bits[0])
    shape = blueprint(model)
    assert checked(tmp_path / "out", shape, gptq) == gptq
    decoder = Decoder(shape, tensors_of(model, shape))
    calibration = started(decoder, text, (CPU,))
    calibration.enter(layer_of(decoder, 0))
    path = "model.layers.0.self_attn.q_proj"
    hessian = calibration.hessian("self_attn.q_proj")
    weight = tensors_of(model, shape).read(f"{path}.weight")
    ours = relative_error(weight, unpacked(linears[path], gptq.shape.bits, offset=gptq.zero_offset), hessian)
    groups = weight.reshape(weight.shape[0], -1, settings.group_size)
    step = 2 * groups.abs().amax(-1, keepdim=True) / (2**gptq.shape.bits - 1)
    nearest = (groups / step).round().clamp(-(2 ** (gptq.shape.bits - 1)), 2 ** (gptq.shape.bits - 1) - 1) * step
    assert ours < 0.8 * relative_error(weight, nearest.reshape(weight.shape), hessian)


def layer_of(decoder: Decoder, position: int) -> Any:
    return decoder.layer(position, decoder.read(position, pin=False), torch.float32, CPU)


def started(decoder: Decoder, text: str, devices: tuple[torch.device, ...]) -> Calibration:
    samples = pieces(wanted(text, samples=8), tiny_tokenizer(bos=False), seq_len=64)
    return Calibration(decoder.start(batches(samples), torch.float32), devices)


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_any_number_of_devices_sees_what_one_sees_to_the_bit(
    model: Path, text: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = 4 if count < 8 else 8
    monkeypatch.setattr(calibrating, "LANES", lanes)
    shape = blueprint(model)
    decoder = Decoder(shape, tensors_of(model, shape))
    alone, shared = (started(decoder, text, devices) for devices in ((CPU,), (CPU,) * count))
    assert sorted(index for worker in range(count) for index in shared._of(worker)) == list(range(min(8, lanes)))
    for position in range(2):
        for calibration in (alone, shared):
            calibration.enter(layer_of(decoder, position))
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            assert torch.equal(alone.hessian(path), shared.hessian(path))
            for calibration in (alone, shared):
                calibration.replace(path, calibration.weight(path, 0) / 2)
        alone.leave()
        shared.leave()
    assert all(torch.equal(a, b) for a, b in zip(alone._hidden, shared._hidden, strict=True))


@pytest.mark.parametrize("count", [1, 5, 7, 8])
def test_lanes_are_added_by_twos_wherever_they_were_summed(count: int) -> None:
    """In float32 the order shows."""
    lanes = list(10 ** torch.randn(count, 50, generator=torch.Generator().manual_seed(0)))

    def summed(borders: list[int]) -> LaneSums:
        devices = [LaneSums() for _ in borders[1:]]
        for device, begin, end in zip(devices, borders, borders[1:], strict=False):
            for lane in range(begin, end):
                device.append(lane, lanes[lane].clone())
        for other in devices[1:]:
            devices[0].extend(other)
        return devices[0]

    alone = summed([0, count]).total()
    assert torch.allclose(alone, torch.stack(lanes).sum(0))
    for first, second in product(range(1, count + 1), repeat=2):
        if first <= second:
            assert torch.equal(summed([0, first, second, count]).total(), alone)
    assert len(summed([0, count])._sums) == count.bit_count()


@pytest.mark.parametrize("columns", [48, 64, 2048])
def test_a_hessian_is_that_of_all_inputs_of_a_linear(
    model: Path, text: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_COLUMNS", columns)
    shape = blueprint(model)
    decoder = Decoder(shape, tensors_of(model, shape))
    calibration = started(decoder, text, (CPU, CPU, CPU))
    layer: Any = layer_of(decoder, 0)
    seen = list[torch.Tensor]()
    calibration.enter(layer)
    hidden = [sample.clone() for sample in calibration._hidden]
    found = calibration.hessian("mlp.down_proj")
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    for sample in hidden:
        layer(sample, **calibration._given[0][len(sample)])
    rows = torch.cat(seen).double()
    assert len(found) == 128
    assert torch.allclose(found.double(), 2 / len(rows) * rows.t() @ rows, rtol=1e-4, atol=1e-6)


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("columns", [48, 2048])
def test_products_of_16_bits_are_summed_in_32(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a product that only GPUs have."""

    def product(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert (left.dtype, right.dtype) == (torch.bfloat16, torch.bfloat16)
        return left.as_subclass(torch.Tensor).to(out_dtype) @ right.as_subclass(torch.Tensor).to(out_dtype)

    monkeypatch.setattr(calibrate, "_COLUMNS", columns)
    rows = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.ones(128, 128)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", product)
        calibrate.add_products(total, rows.as_subclass(OnGpu), 0.25)
    calibrate.mirror(total)
    assert torch.allclose(total, 1 + 0.25 * rows.float().t() @ rows.float(), rtol=1e-4, atol=1e-4)


def test_linears_that_read_the_same_inputs_are_solved_on_different_devices(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, int]] = []
    weight = Calibration.weight

    def noted(calibration: Calibration, path: str, worker: int) -> torch.Tensor:
        taken.append((path.rpartition(".")[2], worker))
        return weight(calibration, path, worker)

    monkeypatch.setattr(Calibration, "weight", noted)
    make(str(model), tmp_path / "out", wanted(text), devices=(CPU, CPU))
    layer = {"q_proj": 0, "k_proj": 1, "v_proj": 0, "o_proj": 0, "gate_proj": 0, "up_proj": 1, "down_proj": 0}
    assert sorted(taken) == sorted(2 * list(layer.items()))


def test_the_next_layer_is_read_ahead_to_the_last_that_is_missing(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never more of them than one."""
    read, entered = list[int](), list[int]()
    really, layer = Decoder.read, Decoder.layer

    def noted(decoder: Decoder, position: int, *, pin: bool) -> dict[str, torch.Tensor]:
        read.append(position)
        values = really(decoder, position, pin=pin)
        assert sorted(values) == sorted(decoder.names(position))
        return values

    def enter(decoder: Decoder, position: int, *given: Any) -> Any:
        assert max(read) == position
        entered.append(position)
        return layer(decoder, position, *given)

    monkeypatch.setattr(Decoder, "read", noted)
    monkeypatch.setattr(Decoder, "layer", enter)
    make(str(model), tmp_path / "out", wanted(text))
    assert (read, entered) == ([0, 1], [0, 1])


def test_weights_at_work_hold_every_linear_as_it_is_stored() -> None:
    stored = {"a": torch.bfloat16, "b": torch.bfloat16, "c": torch.float16, "d": torch.float32}
    for linears, dtype in (("ab", torch.bfloat16), ("c", torch.float16), ("ac", torch.float32), ("abd", torch.float32)):
        decoder: Any = SimpleNamespace(shape=SimpleNamespace(linears=frozenset(linears)))
        tensors: Any = SimpleNamespace(dtype=stored.__getitem__)
        job = GptqJob("m", Path(), wanted("text"), decoder, tensors, torch.empty(0), (torch.device("cuda", 0),))
        assert job.dtype == dtype


@pytest.mark.parametrize(
    ("count", "at_once", "sizes"), [(2, 8192, [1, 1]), (20, 8192, [3] * 6 + [2]), (20, 64, [1] * 20)]
)
@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "gpt_neox"])
def test_hidden_states_are_those_of_the_model_and_only_one_layer_has_weights(
    tmp_path: Path, text: str, family: str, count: int, at_once: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    monkeypatch.setattr(calibrating, "_TOKENS_AT_ONCE", at_once)
    source = save_model(tmp_path / "model", family)
    shape = blueprint(source)
    decoder = Decoder(shape, tensors_of(source, shape))
    samples = pieces(wanted(text, samples=count), tiny_tokenizer(bos=False), seq_len=64)
    calibration = Calibration(decoder.start(batches(samples), torch.float32), (CPU,))
    whole, expected = AutoModel.from_pretrained(source).eval(), list[torch.Tensor]()
    for position in range(2):
        whole.get_submodule(decoder.path(position).removeprefix(f"{shape.prefix}.")).register_forward_hook(
            lambda _, inputs, output: expected.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        whole(samples, use_cache=False)
    assert [len(hidden) for hidden in calibration._hidden] == sizes
    for position in range(2):
        calibration.enter(layer_of(decoder, position))
        calibration.leave()
        assert torch.allclose(torch.cat(calibration._hidden), expected[position], atol=1e-5)
        assert all(parameter.is_meta for parameter in decoder._model.parameters())


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"bits": (2, 3, 4), "max_error": 0.05, "desc_act": True}], ids=["4", "mixed"])
def test_killed_and_resumed_on_other_devices_it_is_the_same_to_the_byte(
    tmp_path: Path,
    model: Path,
    text: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(str(model), tmp_path / "expected", wanted(text, **changes))
    written: list[str] = []
    write = making.write_tensors

    def killed_at_the_second(folder: Path, name: str, entries: Any) -> Any:
        if written:
            (folder / f".{name}.unfinished").write_bytes(b"half a file")
            raise Killed
        written.append(name)
        return write(folder, name, entries)

    def noted(folder: Path, name: str, entries: Any) -> Any:
        written.append(name)
        return write(folder, name, entries)

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_tensors", killed_at_the_second)
        with pytest.raises(Killed):
            make(str(model), tmp_path / "out", wanted(text, **changes), devices=(CPU,) * 3)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(making, "write_tensors", noted)
    make(str(model), tmp_path / "out", wanted(text, **changes), devices=(CPU,) * 2)
    assert written == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert "1 of 2  there already" in capsys.readouterr().err
    ours, expected = tmp_path / "out", tmp_path / "expected"
    files = sorted(path.name for path in expected.iterdir())
    assert files == sorted(path.name for path in ours.iterdir())
    assert [name for name in files if (ours / name).read_bytes() != (expected / name).read_bytes()] == []


def test_what_was_begun_with_other_settings_is_not_used(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(making, "_described", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            make(str(model), tmp_path / "out", wanted(text, bits=(8,)))
    assert make(str(model), tmp_path / "out", wanted(text)).shape.bits == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_mixed_widths_keep_their_bound_where_one_can(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    solutions: dict[str, list[Any]] = {}
    solve = making.solve

    def noted(*given: Any, **named: Any) -> Any:
        solutions.setdefault(named["name"], []).append(solve(*given, **named))
        return solutions[named["name"]][-1]

    monkeypatch.setattr(making, "solve", noted)
    bound = 0.02
    gptq = make(str(model), tmp_path / "out", wanted(text, bits=(2, 3, 4), max_error=bound))
    widths = {path: tried[-1].shape.bits for path, tried in solutions.items()}
    assert len(set(widths.values())) > 1
    for tried in solutions.values():
        assert [one.shape.bits for one in tried] == [2, 3, 4][: len(tried)]
        assert all(one.error > bound for one in tried[:-1])
        assert tried[-1].error <= bound or len(tried) == 3
    counts = sorted(widths.values(), key=lambda bits: -list(widths.values()).count(bits))
    assert gptq.shape.bits == counts[0]
    assert {path: gptq.of(path) for path in widths} == {path: Shape(bits, 32) for path, bits in widths.items()}
    assert loaded(tmp_path / "out", model)[1] == gptq
    told, above = capsys.readouterr().err, {path for path, tried in solutions.items() if tried[-1].error > bound}
    assert "bits:relative squared error of each linear's outputs, of these samples\n" in told
    assert bool(above) == (f"{len(above)} of 14 linears err more than 0.02 in the widest of the widths" in told)
    assert max(len(line) for line in told.splitlines() if " of 2 " in line) <= 80


def test_widths_that_keep_no_bound_and_samples_that_are_few_are_told(
    tmp_path: Path, model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(str(model), tmp_path / "out", wanted(text, samples=1, bits=(2,), max_error=1e-6))
    told = capsys.readouterr().err
    assert "note: 64 tokens are fewer than the 128 inputs of down_proj" in told
    assert "14 of 14 linears err more than 1e-06 in the widest of the widths, the most\n  " in told
    assert re.search(r"of layer [12]: 0\.\d+ with 2 bits\. A wider one in --candidate-bits helps", told)


def rewrite(model: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj has weights that are NaN"),
        ("post_attention_layernorm.weight", r"model\.layers\.1\.mlp\.gate_proj reads inputs that are NaN"),
    ],
)
def test_nan_ends_it_with_the_module_named(tmp_path: Path, model: Path, text: str, tensor: str, message: str) -> None:
    rewrite(model, f"model.layers.1.{tensor}", torch.nan)
    with pytest.raises(ModelError, match=message):
        make(str(model), tmp_path / "out", wanted(text))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, model: Path, text: str) -> None:
    cases: list[tuple[Path, GptqSettings, type[QdistError], str]] = [
        (model, wanted(text, seq_len=256), SpecError, "256 tokens are longer than the 128"),
        (model, wanted(text, samples=4000), DataError, r"make \d+ samples of 64 tokens; 4000 are wanted\n.*--samples"),
        (model, wanted(str(tmp_path / "none.txt")), DataError, "none.txt does not exist"),
        (save_config(tmp_path / "bare"), wanted(text), ModelError, "."),
    ]
    narrow = save_model(tmp_path / "narrow", hidden_size=48, num_key_value_heads=4)
    cases.append((narrow, wanted(text), ModelError, "q_proj has 48 inputs, which fill no words: multiples of 32 do"))
    mute = save_model(tmp_path / "mute")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    cases.append((mute, wanted(text), ModelError, "has no tokenizer to read calibration data with"))
    done = tmp_path / "done"
    make(str(model), done, wanted(text))
    cases.append((done, wanted(text), ModelError, "is quantized already, with gptq"))
    for source, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            make(str(source), tmp_path / "out", settings)
        assert not (tmp_path / ".out.unfinished").exists()
    with pytest.raises(RunError, match=r"done exists\n  try: another --out"):
        make(str(model), done, wanted(text))


def test_a_gpu_that_is_too_full_is_told_before_anything_starts(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, asked = {0: 1 << 30, 1: 100_000}, list[torch.device]()

    def room(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return free[device.index], 1 << 34

    monkeypatch.setattr(torch.cuda, "mem_get_info", room)
    gpus = tuple(torch.device("cuda", index) for index in range(2))
    message = (
        r"takes about .* of GPU 1, which has 97.7 KiB free: a decoder layer .*\n  try: CUDA_VISIBLE_DEVICES= in front"
    )
    with pytest.raises(PlanError, match=message):
        make(str(model), tmp_path / "out", wanted(text), devices=gpus)
    assert asked == list(gpus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_memory_that_runs_out_is_told_in_words_and_what_is_written_stays(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = MakeGptq(model=str(model), out=str(tmp_path / "out"), settings=wanted(text))
    solve, left = making.solve, iter(range(8))

    def full(*given: Any, **more: Any) -> Any:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return solve(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(making, "solve", full)
        with pytest.raises(JobError) as caught:
            run(request)
    assert caught.value.message.startswith("GPU memory ran out: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert caught.value.try_.startswith("CUDA_VISIBLE_DEVICES= in front")
    run(request)
    assert "1 of 2  there already" in capsys.readouterr().err


def test_two_do_not_write_the_same_folder(tmp_path: Path, model: Path, text: str, monkeypatch: Any) -> None:
    def held(path: Path, *, busy: str = "") -> Any:
        return locked(lock, busy=busy)

    lock = tmp_path / "lock"
    monkeypatch.setattr(work_folder, "locked", held)
    with locked(lock), pytest.raises(RunError, match=r"another process is writing .*out\n  try: wait"):
        make(str(model), tmp_path / "out", wanted(text))


@pytest.mark.parametrize(("length", "advice"), [(20, "more data"), (640, "more data, or --seq-len 64")])
def test_samples_of_a_few_tokens_are_not_advised(tmp_path: Path, length: int, advice: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * length)
    with pytest.raises(DataError) as caught:
        pieces(wanted(str(path), samples=10), tiny_tokenizer(bos=False), seq_len=1024)
    assert caught.value.try_ == advice


def test_records_and_text_make_samples_drawn_by_a_seed(tmp_path: Path, text: str) -> None:
    tokenizer = tiny_tokenizer(bos=False)
    data = str(save_data(tmp_path / "data.jsonl"))
    for source in (data, text):
        drawn = [pieces(wanted(source, samples=4, seed=seed), tokenizer, seq_len=32) for seed in (0, 0, 1)]
        assert drawn[0].shape == (4, 32)
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_the_command_tells_of_each_layer_and_how_to_go_on(
    tmp_path: Path, model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    request = MakeGptq(model=str(model), out=out, settings=wanted(text))
    run(request)
    told = capsys.readouterr()
    lines = told.err.splitlines()[-4:]
    assert lines[0] == "relative squared error of each linear's outputs, of these samples"
    assert lines[1].split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "left"]
    assert [len(line) for line in lines[1:]] == [len(lines[1])] * 3
    assert re.fullmatch(r"1 of 2( +[1-9]\.\de-[1-9]){7} +\d+ s", lines[2])
    assert lines[3].startswith("2 of 2 ")
    assert lines[3].endswith(" done")
    assert told.out.splitlines()[-1] == f"use it  qdist launch --model {out} --method gptq-lora --data FILE"
    with pytest.raises(RunError, match=f"^{out} exists"):
        run(request)
    shutil.rmtree(out)


def test_a_damping_that_rose_is_told(
    tmp_path: Path, model: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Hessian with a negative eigenvalue, as rounding may leave one."""
    hessian = Calibration.hessian

    def indefinite(calibration: Calibration, path: str) -> torch.Tensor:
        found = hessian(calibration, path)
        if path == "mlp.down_proj":
            least, mean = torch.linalg.eigvalsh(found)[0], found.diagonal().mean()
            found.diagonal().sub_(least + 0.03 * mean)
        return found

    monkeypatch.setattr(Calibration, "hessian", indefinite)
    make(str(model), tmp_path / "out", wanted(text))
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if "damping of" in line]
    assert lines == ["down: its Hessian took a damping of 0.1"] * 2
