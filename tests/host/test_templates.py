"""Are the shipped recipes and policies ones that work, with the numbers that were published?"""

from pathlib import Path

import pytest

from qdist.core.errors import SpecError
from qdist.core.planning.plan import Source
from qdist.core.planning.planner import make_plan
from qdist.core.spec.run_spec import RunSpec, resolve
from qdist.host.sources.models import shape
from qdist.host.templates import folder, policy, read_recipe
from tests.plans import CPU, gpus

RECIPES = sorted(path.stem for path in folder("launch").glob("*.toml"))
HARDWARE = {"demo": CPU, "guanaco-7b": gpus(1, 24), "guanaco-13b": gpus(1, 24), "guanaco-33b": gpus(1, 32),
            "guanaco-65b": gpus(1, 48)}  # fmt: skip

GUANACO = [
    # Dettmers et al. 2023, table 9, and scripts/finetune_guanaco_*.sh of github.com/artidoro/qlora, whose dropout of
    # 0.05 at 13b ran, where the paper's appendix B says 0.1.
    ("guanaco-7b", "llama-7b", 2e-4, 0.1),
    ("guanaco-13b", "llama-13b", 2e-4, 0.05),
    ("guanaco-33b", "llama-33b", 1e-4, 0.05),
    ("guanaco-65b", "llama-65b", 1e-4, 0.05),
]


def recipe(name: str) -> RunSpec:
    return resolve(read_recipe(name))


def test_every_recipe_has_hardware_to_be_planned_for() -> None:
    assert sorted(HARDWARE) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_fits_its_hardware(name: str) -> None:
    spec = recipe(name)
    config, facts = shape(spec.model)
    assert facts.family == config["model_type"]
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    plan = make_plan(spec, source, facts, HARDWARE[name], None, has_liger=True)
    assert plan.micro_batch * plan.gradient_accumulation == spec.batch


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_first_what_it_is(name: str) -> None:
    first = (folder("launch") / f"{name}.toml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


@pytest.mark.parametrize(("name", "model", "lr", "dropout"), GUANACO)
def test_guanaco_recipes_have_the_published_numbers(name: str, model: str, lr: float, dropout: float) -> None:
    spec = recipe(name)
    assert (spec.model, spec.optim.lr, spec.lora.dropout) == (model, lr, dropout)
    assert (spec.steps, spec.batch, spec.optim.beta2, spec.optim.clip) == (1875, 16, 0.999, 0.3)
    assert (spec.lora.r, spec.lora.alpha, spec.lora.targets) == (64, 16, ("all-linear",))
    assert (spec.bits, spec.quant.type, spec.quant.double, spec.optim.schedule) == (4, "nf4", True, "constant")
    assert spec.seq_len == 512


@pytest.mark.parametrize("path", sorted(folder("ds_configs").iterdir()), ids=lambda path: path.name)
def test_every_policy_is_a_file_of_deepspeeds_without_guesses(path: Path) -> None:
    loaded = policy(path.name)
    assert loaded["zero_optimization"]["stage"] in (0, 1, 2, 3)
    assert "auto" not in path.read_text()


def test_the_adapter_stays_whole_under_zero_3() -> None:
    """Gathering matrices this small one by one costs more than it saves."""
    assert policy("zero3.json")["zero_optimization"]["stage3_param_persistence_threshold"] >= 10**9


@pytest.mark.parametrize("name", ["guanaco-7b", "guanaco-7b.toml"])
def test_a_shipped_recipe_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe(name)["model"] == "llama-7b"


def test_a_file_here_wins_over_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.toml").write_text('model = "mine"')
    assert read_recipe("demo.toml") == {"model": "mine"}
    assert read_recipe("demo")["model"] == "smollm2-135m"


@pytest.mark.parametrize(
    ("name", "attempt"),
    [("guanaco-7", "guanaco-7b"), ("dmo", "demo"), ("else/demo.toml", "demo"), ("xyzzy", ", ".join(RECIPES))],
)
def test_a_recipe_that_does_not_exist_names_the_nearest(name: str, attempt: str) -> None:
    with pytest.raises(SpecError, match=f"no recipe '{name}'") as caught:
        read_recipe(name)
    assert caught.value.try_ == attempt


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("llama-7b", "--model llama-7b"),
        ("meta-llama/Llama-2-7b-hf", "--model meta-llama/Llama-2-7b-hf"),
        ("my model", "--model 'my model'"),
        ("model.gguf", "--model model.gguf"),
        ("my data", "--data 'my data'"),
        ("my recipe.toml", "My Recipe.toml"),
        ("my recipe", "My Recipe.toml"),
        ("below/nine.toml", "below/mine.toml"),
    ],
)
def test_what_is_typed_in_place_of_a_recipe_is_told(
    name: str, attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder_ in ("my model", "my data", "below"):
        Path(folder_).mkdir()
    for file in ("my model/config.json", "My Recipe.toml", "below/mine.toml"):
        Path(file).write_text("")
    with pytest.raises(SpecError, match=f"no recipe '{name}'") as caught:
        read_recipe(name)
    assert caught.value.try_ == attempt


def test_data_in_place_of_a_recipe_is_told(tmp_path: Path) -> None:
    path = tmp_path / "my data.jsonl"
    path.write_text('{"text": "hello"}\n')
    with pytest.raises(SpecError, match=r"my data\.jsonl is data, not a recipe") as caught:
        read_recipe(str(path))
    assert caught.value.try_ == f"--data '{path}'"


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"model = '\xff'\n")
    with pytest.raises(SpecError, match=r"mine\.toml is not text: byte 0xff at position 9 is not UTF-8"):
        read_recipe(str(tmp_path / "mine.toml"))


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("bits = 4\nmodel = llama-7b\n")
    with pytest.raises(SpecError, match=r"mine\.toml is not TOML: .*line 2") as caught:
        read_recipe(str(path))
    assert caught.value.try_ == "TOML: key = value, sections in [brackets]"
