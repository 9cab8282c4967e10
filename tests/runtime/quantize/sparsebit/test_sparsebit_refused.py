import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qdist.core.errors import ModelError, PlanError, RunError
from qdist.runtime.quantize.sparsebit.convert import convert
from tests.runtime.sparsebit_files import CONFIG, HIDDEN, Made, make, quick, write_config


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def saved(content: object) -> Path:
        torch.save(content, tmp_path / "llama_4w.pth.tar")
        return tmp_path / "llama_4w.pth.tar"

    return saved


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config")


def spoil(made: Made, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made.content["model"][name] = change(made.content["model"][name])


def add(at: int, factor: float, made: Made, path: str) -> None:
    """Move one zero by a part of its scale."""
    state = made.content["model"]
    moved = torch.zeros_like(state[f"{path}.scales"])
    moved[at] = factor
    state[f"{path}.zeros"] = state[f"{path}.zeros"] + moved * state[f"{path}.scales"]


GATE = "model.layers.0.mlp.gate_proj"
BOTH = ("scales", "zeros")
SPOILED: dict[str, tuple[Callable[[Made], object], str]] = {
    "zeros between integers": (
        lambda made: (add(3, 0.05, made, GATE), add(1, 0.3, made, "model.layers.1.mlp.up_proj")),
        r"model.layers.1.mlp.up_proj.zeros over its scales is 0.300 away from integers, and so are 1 more",
    ),
    "a zero beyond the range": (
        lambda made: add(3, 20.0, made, GATE),
        rf"{GATE}.zeros are 1 to \d+ times the scales; GPTQ at 4 bits holds zeros of 0 to 15",
    ),
    "a zero of 2^bits": (
        lambda made: made.content["model"].update({f"{GATE}.zeros": 16 * made.content["model"][f"{GATE}.scales"]}),
        rf"{GATE}.zeros are 16 to 16 times the scales; GPTQ at 4 bits holds zeros of 0 to 15",
    ),
    "a negative scale": (lambda made: spoil(made, f"{GATE}.scales", torch.neg), rf"{GATE}: scales must be positive"),
    "an infinite scale": (lambda made: spoil(made, f"{GATE}.scales", lambda t: t / 0), rf"{GATE}: scales must be"),
    "scales beyond float16": (
        lambda made: [spoil(made, f"{GATE}.{leaf}", lambda t: t * 1e9) for leaf in BOTH],
        rf"{GATE}: scales of 5.*e\+06 to .* do not fit float16",
    ),
    "words too few": (
        lambda made: spoil(made, f"{GATE}.qweight", lambda t: t[:7]),
        rf"{GATE}.weight has shape \[96, 56\] in .*, \[96, 64\] in the configuration",
    ),
    "columns too few": (
        lambda made: spoil(made, f"{GATE}.qweight", lambda t: t[:, :90]),
        rf"{GATE}.qweight has shape \[8, 90\]; it is \[a multiple of 1, 96\] at 4 bits and scales of \[96, 1\]",
    ),
    "scales of another shape": (
        lambda made: spoil(made, f"{GATE}.scales", lambda t: t[:, 0]),
        rf"{GATE}.scales has shape \[96\]; it is \[out, 1\]"
    ),
    "scales of more groups": (
        lambda made: [spoil(made, f"{GATE}.{leaf}", lambda t: t[:, None].repeat(1, 2, 1)) for leaf in BOTH],
        rf"{GATE}.scales has shape \[96, 2, 1\], which is 2 groups of 64 inputs; hyper_parameters say groupsize -1",
    ),
    "zeros of another shape": (
        lambda made: spoil(made, f"{GATE}.zeros", lambda t: t[:5]),
        rf"{GATE}.zeros has shape \[5, 1\], its scales \[96, 1\]"
    ),
    "words as floats": (lambda made: spoil(made, f"{GATE}.qweight", torch.Tensor.float), rf"{GATE}.qweight is float32"),
    "scales as integers": (
        lambda made: spoil(made, f"{GATE}.scales", torch.Tensor.int),
        rf"{GATE}.scales is int32 \[96, 1\]; only qweight is of integers",
    ),
    "a tensor without values": (
        lambda made: spoil(made, "lm_head.weight", lambda t: t.to("meta")), r"lm_head.weight has no values of its own"
    ),
    "a tensor of no module": (lambda made: made.content["model"].update(loose=torch.ones(1)), r"holds loose \[1\]"),
    "no words": (lambda made: made.content["model"].pop(f"{GATE}.qweight"), rf"lacks {GATE}.qweight"),
    "no scales": (lambda made: made.content["model"].pop(f"{GATE}.scales"), rf"{GATE} lacks scales"),
    "no norm": (lambda made: made.content["model"].pop("model.norm.weight"), r"lacks model.norm.weight of \d+ tensors"),
    "an adapter": (
        lambda made: made.content["model"].update({f"{GATE}.lora_A.weight": torch.ones(8, 64)}),
        rf"holds {GATE}.lora_A.weight \[8, 64\], which a Llama of 2 layers has not",
    ),
    "one module twice": (
        lambda made: made.content["model"].update({"model.decoder.norm.weight": torch.ones(HIDDEN)}),
        r"holds model.norm twice, as model.norm and as model.decoder.norm",
    ),
    "another width": (lambda made: made.content["layers_bit"].update({GATE: 8}), rf"layers_bit gives {GATE} 8 bits"),
    "a width that is wrong": (lambda made: made.content["layers_bit"].update({GATE: 2}), rf"{GATE}.weight has shape"),
    "no width": (lambda made: made.content["layers_bit"].pop(GATE), rf"{GATE}.qweight, which layers_bit does not list"),
    "no widths": (lambda made: made.content.pop("layers_bit"), r"does not say under 'layers_bit'"),
    "no group size": (lambda made: made.content.pop("hyper_parameters"), r"give groupsize None"),
    "no model": (lambda made: made.content.pop("model"), r"no state dict under 'model'"),
    "something else": (lambda made: made.content["model"].update({"step": 3}), r"'step' is int, not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("spoiling", "message"), SPOILED.values(), ids=list(SPOILED))
def test_a_wrong_checkpoint_is_refused_and_leaves_nothing_behind(
    spoiling: Callable[[Made], object], message: str,
    write: Callable[[object], Path], config: Path, tmp_path: Path,
) -> None:  # fmt: skip
    made = make()
    spoiling(made)
    source = write(made.content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out", config=config)
    assert sorted(tmp_path.iterdir()) == before


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "bad.pt", tmp_path / "ran"
    content = {**make().content, "hyper_parameters": Malicious(target)}
    if kind == "pickle":
        source.write_bytes(pickle.dumps({"hyper_parameters": Malicious(target)}, protocol=2))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=kind == "zip")
    message = (
        r"holds more than tensors and plain values( \(posix.system\))?; it was not loaded, for that could run code"
    )
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out")
    assert not target.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_is_refused(part: float, zipped: bool, tmp_path: Path) -> None:
    torch.save(make().content, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ModelError, match=r"cut.pt (is cut off|cannot be read|was not written by torch.save)"):
        convert(tmp_path / "cut.pt", tmp_path / "out")


def test_a_missing_file_and_an_out_that_exists_are_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        convert(tmp_path / "nothing.pt", tmp_path / "out")
    with pytest.raises(RunError, match="exists"):
        convert(tmp_path / "nothing.pt", config)
    assert (config / "config.json").is_file()


def test_without_config_a_model_of_unknown_shapes_is_refused(write: Callable[[object], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"2 layers, model.embed_tokens \[48, 64\].*\n.*--config FOLDER"):
        convert(write(make().content), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (json.dumps({**CONFIG, "model_type": "opt"}), "is of model_type 'opt'; Sparsebit packs llama"),
        (json.dumps({**CONFIG, "num_hidden_layers": 3}), "lacks model.layers.2.*and 8 more"),
        (json.dumps({**CONFIG, "num_hidden_layers": 1}), "which a Llama of 1 layers has not"),
        (json.dumps({**CONFIG, "vocab_size": 50}), r"lm_head.weight has shape \[48, 64\] in .*, \[50, 64\] in the"),
    ],
)
def test_a_config_of_another_model_is_refused(
    content: str, message: str, write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    (config / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        convert(write(make().content), tmp_path / "out", config=config)


def test_a_full_disk_is_said_before_anything_is_written(
    write: Callable[[object], Path], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    source = write(make().content)
    with pytest.raises(PlanError, match="free"):
        convert(source, tmp_path / "out", config=config)
