"""What is packed once is what transformers would have packed, whole or absent, and made once."""

import json
import os
import shutil
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import ModelError, PlanError, RunError
from qdist.core.model.storage import Packing
from qdist.host.sources.models import Located
from qdist.runtime.formats.checksum import tensor_checksum
from qdist.runtime.formats.packed_folder import read_manifest, tensor_files
from qdist.runtime.formats.packing import pack_matrix, packed_bytes
from qdist.runtime.quantize import pack
from qdist.runtime.quantize.bitsandbytes import packed_folder, quantize
from qdist.runtime.quantize.materialize import materialize
from tests.runtime.tiny import FAMILIES, logits_of, save_model, tiny_model

CPU = torch.device("cpu")
PACKINGS = {
    "nf4": Packing(bits=4),
    "nf4 single": Packing(bits=4, double=False),
    "fp4": Packing(bits=4, type="fp4"),
    "int8": Packing(bits=8),
}
each_packing = pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
Usage = namedtuple("Usage", "total used free")


def by_transformers(folder: Path, packing: Packing, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The model as transformers packs it itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted = BitsAndBytesConfig(
        load_in_4bit=packing.bits == 4,
        load_in_8bit=packing.bits == 8,
        bnb_4bit_quant_type=packing.type if packing.bits == 4 else "fp4",
        bnb_4bit_use_double_quant=packing.bits == 4 and packing.double,
        bnb_4bit_compute_dtype=dtype if packing.bits == 4 else None,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=dtype, device_map=device)
    return model.eval()


def loaded(folder: Path, device: str = "cpu") -> Any:
    """What plain transformers makes of a folder, told nothing."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map=device).eval()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def left_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@each_packing
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), *((family, {}) for family in FAMILIES[1:])],
    ids=["llama", "llama tied", *FAMILIES[1:]],
)
def test_a_packed_folder_is_the_one_that_transformers_would_save(
    tmp_path: Path, family: str, changes: dict[str, Any], packing: Packing
) -> None:
    source = save_model(tmp_path / "source", family, **changes)
    manifest = quantize(str(source), tmp_path / "packed", packing)
    theirs = by_transformers(source, packing)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = tensors_in(tmp_path / "packed"), tensors_in(tmp_path / "theirs")
    if "embed_out.weight" in expected:  # transformers gives Pythia's head its old name when it saves
        expected["lm_head.weight"] = expected.pop("embed_out.weight")
    assert sorted(ours) == sorted(expected)
    assert [name for name, value in expected.items() if not torch.equal(ours[name], value)] == []
    assert [name for name, value in expected.items() if ours[name].dtype != value.dtype] == []
    settings = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("packed", "theirs")]
    assert settings[0] == settings[1]
    assert torch.equal(logits_of(loaded(tmp_path / "packed")), logits_of(theirs))
    assert len(manifest.files) == manifest.layers + 1 == 3
    assert left_beside(tmp_path) == left_beside(tmp_path / "packed") == []


@each_packing
def test_a_source_in_16_bits_is_packed_as_transformers_packs_it_in_16_or_32(tmp_path: Path, packing: Packing) -> None:
    """The compute type changes no packed byte, so that one folder serves every run."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantize(str(tmp_path / "source"), tmp_path / "packed", packing)
    ours = tensors_in(tmp_path / "packed")
    for dtype in (torch.bfloat16, torch.float32):
        theirs = by_transformers(tmp_path / "source", packing, dtype).state_dict()
        same = [name for name in ours if "quant_state" not in name and ours[name].dtype == theirs[name].dtype]
        assert [name for name in same if not torch.equal(ours[name], theirs[name])] == []
        assert {name for name in ours if name.endswith(("_proj.weight", "absmax", "SCB"))} <= set(same)


def test_a_type_asked_for_is_what_is_packed_from_and_what_the_rest_is_in(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    quantize(str(source), tmp_path / "packed", Packing(bits=4, dtype="bfloat16"))
    ours = tensors_in(tmp_path / "packed")
    theirs = by_transformers(source, PACKINGS["nf4"], torch.bfloat16).state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert loaded(tmp_path / "packed").dtype == torch.bfloat16


@each_packing
def test_a_matrix_packed_in_pieces_is_the_matrix_packed_at_once(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(96, 65, generator=torch.Generator().manual_seed(3))
    whole = pack_matrix(weight, packing, CPU)
    monkeypatch.setattr("qdist.runtime.formats.packing._PIECE", 128)
    pieces = pack_matrix(weight, packing, CPU)
    assert [name for name in whole if not torch.equal(whole[name], pieces[name])] == []
    size = sum(value.nbytes for value in whole.values())
    assert size <= packed_bytes((96, 65), packing) <= size + 256


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_older_names_and_torch_files_give_the_same(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    source = save_model(tmp_path / "source", "bloom")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors_in(source).items()}
    quantize(str(source), tmp_path / "expected", PACKINGS["nf4"])
    (source / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    ours, expected = tensors_in(tmp_path / "packed"), tensors_in(tmp_path / "expected")
    assert sorted(ours) == sorted(expected)
    assert [name for name, value in expected.items() if not torch.equal(ours[name], value)] == []


def test_a_source_without_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = save_model(tmp_path / "source")
    tensors = tensors_in(source)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of \d+ tensors, such as model.layers.1.mlp.up_proj.weight"):
        quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_nan_and_infinity_are_refused_with_their_number(tmp_path: Path, name: str, packing: str) -> None:
    from safetensors.torch import save_file

    source = save_model(tmp_path / "source")
    tensors = tensors_in(source)
    tensors[name].view(-1)[3:5] = torch.tensor([torch.nan, -torch.inf])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    count = f"2 values of {tensors[name].numel():,}"
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinite numbers: {count}\n"):
        quantize(str(source), tmp_path / "packed", PACKINGS[packing])


def test_what_float16_does_not_hold_is_not_packed_to_int8(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = save_model(tmp_path / "source")
    tensors = tensors_in(source)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight reaches 1e\+05, and int8 is packed from float16"):
        quantize(str(source), tmp_path / "packed", PACKINGS["int8"])
    quantize(str(source), tmp_path / "packed-4", PACKINGS["nf4"])


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(ModelError, match=r"model.safetensors: .*"):
        quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])


def test_a_hub_model_without_safetensors_is_fetched_with_its_torch_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    materialize(Located(kind="hub", path="some/model", config=None))
    first, *others = asked
    assert first == ["config.json"]  # which may say that nothing else is worth fetching
    assert [("*.safetensors" in patterns, "*.bin" in patterns) for patterns in others] == [(True, False), (False, True)]
    (tmp_path / "model.safetensors").touch()
    materialize(Located(kind="hub", path="some/model", config=None))
    assert len(asked) == 5


class Killed(Exception):
    pass


def test_a_killed_packing_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "source")
    quantize(str(source), tmp_path / "expected", PACKINGS["nf4"])
    written: list[str] = []
    write = pack.write_tensors

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
        patch.setattr(pack, "write_tensors", killed_at_the_second)
        with pytest.raises(Killed):
            quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    assert not (tmp_path / "packed").exists()
    monkeypatch.setattr(pack, "write_tensors", noted)
    quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    assert written == sorted(set(written))
    assert len(written) == 3
    assert "1 of 3 files are there already" in capsys.readouterr().err
    ours, expected = tmp_path / "packed", tmp_path / "expected"
    files = sorted(path.name for path in expected.iterdir())
    assert files == sorted(path.name for path in ours.iterdir())
    assert [name for name in files if (ours / name).read_bytes() != (expected / name).read_bytes()] == []


def test_what_another_source_left_behind_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_write_config", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    assert left_beside(tmp_path) == [".packed.packing"]
    shutil.rmtree(source)
    save_model(source, seed=1)
    quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    quantize(str(source), tmp_path / "expected", PACKINGS["nf4"])
    ours, expected = tensors_in(tmp_path / "packed"), tensors_in(tmp_path / "expected")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_two_runs_share_the_cache_and_a_changed_source_does_not(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    first = packed_folder(source, PACKINGS["nf4"], name="tiny")
    assert first.note.startswith("packed tiny to nf4, once: ")
    assert packed_folder(source, PACKINGS["nf4"], name="tiny") == (first.folder, "")
    assert packed_folder(source, PACKINGS["nf4 single"], name="tiny").folder != first.folder
    file = source / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    assert packed_folder(source, PACKINGS["nf4"], name="tiny").folder != first.folder


def test_what_was_packed_of_other_weights_with_the_same_sizes_and_times_is_not_used(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    file = source / "model.safetensors"
    before = file.stat()
    out = packed_folder(source, PACKINGS["nf4"], name="tiny").folder
    for name, seed in (("again", 0), ("other", 1)):
        shutil.copyfile(save_model(tmp_path / name, seed=seed) / "model.safetensors", file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        if seed == 0:
            assert packed_folder(source, PACKINGS["nf4"], name="tiny").folder == out
    with pytest.raises(ModelError, match="held other weights, in files of the same sizes and times") as caught:
        packed_folder(source, PACKINGS["nf4"], name="tiny")
    assert caught.value.try_ == f"rm -r {out}: it is packed again"


def test_of_two_that_pack_at_once_one_waits_and_uses_what_the_other_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "source")
    written: list[str] = []
    write, both = pack.write_tensors, threading.Barrier(2)

    def slowly(folder: Path, name: str, entries: Any) -> Any:
        written.append(name)
        time.sleep(0.2)
        return write(folder, name, entries)

    def one(_: int) -> Any:
        both.wait()
        return packed_folder(source, PACKINGS["int8"], name="tiny")

    monkeypatch.setattr(pack, "write_tensors", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    assert first.folder == second.folder
    assert len(written) == 3
    assert sorted(map(bool, (first.note, second.note))) == [False, True]
    assert "waiting: another process is packing tiny" in capsys.readouterr().err


def test_sixteen_bits_under_an_old_name_are_written_once(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "gpt_neox")
    folder, _ = packed_folder(source, Packing(bits=16), name="tiny")
    assert folder != source
    assert sorted(tensors_in(folder)) == sorted(tiny_model("gpt_neox").state_dict())


def test_sixteen_bits_are_read_where_they_are_unless_their_names_are_old(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "bloom")
    assert packed_folder(source, Packing(bits=16), name="tiny") == (source, "")
    tensors = tensors_in(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    folder, note = packed_folder(source, Packing(bits=16), name="tiny")
    assert note.startswith("packed tiny to 16-bit")
    ours = tensors_in(folder)
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    assert all(torch.equal(ours[name], value) for name, value in tensors.items())
    assert torch.equal(logits_of(loaded(folder)), logits_of(tiny_model("bloom")))


@each_packing
def test_a_model_that_is_packed_as_asked_is_used_as_it_is(tmp_path: Path, packing: Packing) -> None:
    source = save_model(tmp_path / "source")
    quantize(str(source), tmp_path / "ours", packing)
    by_transformers(source, packing).save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert packed_folder(folder, packing, name="tiny") == (folder, "")


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        (Packing(bits=8), r"is packed to nf4 \(4 bits\); this run wants int8 \(8 bits\)", "--bits 4"),
        (Packing(bits=16), r"wants 16-bit \(16 bits\)", "--bits 4"),
        (Packing(bits=4, type="fp4"), "this run wants fp4", "quant.type=nf4"),
        (PACKINGS["nf4 single"], "wants nf4 without double quantization", "quant.double=true"),
    ],
)
def test_a_model_that_is_packed_otherwise_is_refused(tmp_path: Path, wanted: Packing, message: str, hint: str) -> None:
    quantize(str(save_model(tmp_path / "source")), tmp_path / "packed", PACKINGS["nf4"])
    with pytest.raises(ModelError, match=message) as caught:
        packed_folder(tmp_path / "packed", wanted, name="tiny")
    assert hint in caught.value.try_


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"quant_method": "gptq", "bits": 4}, "quantized with gptq"),
     ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}, "as bfloat16"),
     ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "14 of 35 tensors")],
)  # fmt: skip
def test_a_packing_that_qdist_cannot_read_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source = save_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match=message):
        packed_folder(source, PACKINGS["nf4"], name="tiny")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 100 * 1024))
    with pytest.raises(PlanError, match=r"needs \d+ KiB in .*, which has 100 KiB free: \d+ KiB are missing"):
        quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_packed_folder_is_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    import qdist

    source = save_model(tmp_path / "source")
    quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    model, tokenizer = qdist.load(tmp_path / "packed")
    assert tokenizer("hello")["input_ids"]
    assert torch.equal(logits_of(model), logits_of(by_transformers(source, PACKINGS["nf4"])))
    assert (tmp_path / "packed" / "generation_config.json").is_file()


def test_a_packed_model_is_not_packed_again_and_nothing_is_written_over(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    (tmp_path / "packed").mkdir()
    quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    with pytest.raises(RunError, match="exists"):
        quantize(str(source), tmp_path / "packed", PACKINGS["nf4"])
    with pytest.raises(ModelError, match="packed to nf4 already"):
        quantize(str(tmp_path / "packed"), tmp_path / "again", PACKINGS["int8"])


@each_packing
def test_the_manifest_says_what_is_in_each_file(tmp_path: Path, packing: Packing) -> None:
    manifest = quantize(str(save_model(tmp_path / "source")), tmp_path / "packed", packing)
    assert read_manifest(tmp_path / "packed") == manifest
    tensors = tensors_in(tmp_path / "packed")
    assert manifest.checksums == {name: tensor_checksum(value) for name, value in tensors.items()}
    assert manifest.bytes == sum(value.nbytes for value in tensors.values())
    assert manifest.files == {
        path.name: path.stat().st_size for path in sorted((tmp_path / "packed").glob("*.safetensors"))
    }
    files = tensor_files(tmp_path / "packed")
    assert sorted(files) == sorted(tensors)
    assert {files[name] for name in files if ".layers.1." in name} == {"model-00002-of-00003.safetensors"}
    assert {files[name] for name in files if ".layers." not in name} == {"model-00003-of-00003.safetensors"}
