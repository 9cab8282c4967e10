"""Is what `generate`, `chat` and `launch` cannot open refused before anything heavy, with what is nearest?"""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from qdist.core.data.reading import Reading
from qdist.core.errors import ModelError, QdistError, RunError, SpecError
from qdist.core.model.aliases import ALIASES, config_of
from qdist.host.sources.targets import ServedTargets, check_model, check_target, reading_of_target, targets_to_serve
from tests.plans import CPU, planned


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, an adapter, a finished run and one that has just begun."""
    monkeypatch.chdir(tmp_path)
    for name in ("done", "begun"):
        run = tmp_path / "my runs" / name
        run.mkdir(parents=True)
        (run / "plan.json").write_bytes(msgspec.json.encode(planned("llama-7b", CPU)))
    adapter = tmp_path / "my runs" / "done" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config_of("llama-7b")))
    return tmp_path


@pytest.mark.parametrize("name", ["my runs/done", "tiny", "llama-7b", "owner/unheard-of"])
def test_a_run_with_an_adapter_and_any_model_can_be_opened(name: str, here: Path) -> None:
    check_target(name)


def test_prompts_to_a_run_are_read_as_its_records_are(here: Path) -> None:
    plan = planned("llama-7b", CPU, {"data.columns": ["instruction=question"], "data.roles": ["user=Customer"]})
    (here / "my runs/done/plan.json").write_bytes(msgspec.json.encode(plan))
    assert reading_of_target("my runs/done") == Reading(columns={"instruction": "question"}, roles={"user": "Customer"})
    assert reading_of_target("tiny") == Reading()


def over(here: Path, base: Path, packed: str = "") -> None:
    """Have the run be over a base."""
    plan = planned("llama-7b", CPU)
    source = msgspec.structs.replace(plan.source, kind="folder", path=str(base), packed=packed)
    (here / "my runs/done/plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, source=source)))


@pytest.mark.parametrize("place", ["cache/models/base", "hub/models--a--b/snapshots/1", "models/gone"])
def test_what_was_packed_will_do_and_what_is_gone_from_a_cache_is_made_again(
    place: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(here / "cache"))
    over(here, here / place, packed=str(here / "tiny") if place == "models/gone" else "")
    check_target("my runs/done")


def test_a_run_whose_model_is_gone_is_refused_and_opens_once_it_is_back(here: Path) -> None:
    base = here / "models/my base"
    over(here, base)
    with pytest.raises(RunError, match=f"my runs/done was trained on is no longer at {base}") as caught:
        check_target("my runs/done")
    assert caught.value.try_ == "put it back there"
    base.mkdir(parents=True)
    check_target("my runs/done")


@pytest.mark.parametrize(
    ("name", "message", "attempt"),
    [
        ("my runs/begun", "begun has no adapter yet, and no whole", "qdist launch --resume --run 'my runs/begun'"),
        ("my runs/doen", "my runs/doen is neither a run nor a model", "my runs/done"),
        ("my runs/done/adapter", "adapter is the adapter of a run", "the run: my runs/done"),
        ("my runs", "my runs is neither a run nor a model", "my runs/begun or my runs/done"),
        ("tny", "no model is called 'tny': no run, folder, file or alias here has that name", "tiny"),
        ("./tiny/nothing.gguf", "no file ./tiny/nothing.gguf", "the path of a .gguf file"),
    ],
)
def test_anything_else_is_refused_with_the_nearest(name: str, message: str, attempt: str, here: Path) -> None:
    with pytest.raises(QdistError, match=message) as caught:
        check_target(name)
    assert (caught.value.try_, caught.value.exit_code) == (attempt, 2)


@pytest.mark.parametrize(
    "name",
    [*(alias for alias in ALIASES if alias.startswith("baichuan")), "baichuan-inc/Baichuan2-7B-Chat", "own"],
)
@pytest.mark.parametrize("check", [check_model, check_target])
def test_a_model_of_its_own_code_is_refused_before_a_hub_is_asked(name: str, check: object, here: Path) -> None:
    (here / "own").mkdir()
    (here / "own" / "config.json").write_text(json.dumps(config_of("baichuan-7b") | {"auto_map": {}}))
    assert callable(check)
    with pytest.raises(ModelError) as caught:
        check(name)
    assert caught.value.message.startswith(f"transformers has no class for {name}: Python files out of its own")
    assert caught.value.try_.startswith("--trust-remote-code")


@pytest.mark.parametrize(
    "arguments",
    [
        ("launch", "--model", "models/nothing", "--data", "demo"),
        ("launch", "--model", "baichuan-7b", "--data", "demo"),
        ("quantize", "models/nothing", "--out", "out"),
        ("quantize", "baichuan-7b", "--out", "out"),
        ("generate", "nothing", "--prompts", "p.txt", "--out", "o.jsonl"),
        ("chat", "nothing"),
        ("merge", "nothing", "--out", "out"),
        ("export", "nothing", "--to", "16bit", "--out", "out"),
        ("gather", "nothing"),
        ("convert", "nothing", "--from", "sparsebit", "--out", "out"),
    ],
)
def test_a_command_refuses_a_name_without_torch_and_writes_nothing(arguments: tuple[str, ...], here: Path) -> None:
    (here / "models").mkdir()
    (here / "p.txt").write_text("hello\n")
    before = sorted(here.rglob("*"))
    code = (
        "import sys\nfrom qdist.cli.main import main\ntry:\n    main(sys.argv[1:], prog_name='qdist')\n"
        "except SystemExit as end:\n    print(end.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout == "2 []\n"
    assert done.stderr.startswith("error: ")
    assert sorted(here.rglob("*")) == before


def test_runs_are_served_by_their_own_names_or_those_before_them(here: Path) -> None:
    paths = ["my runs/done", "sql=my runs/begun"]
    found = targets_to_serve(paths)
    assert found == ServedTargets({"done": "my runs/done", "sql": "my runs/begun"}, "llama-7b")
    assert found.title == "done, sql"
    assert targets_to_serve(["llama-7b=my runs/done"]).base == "llama-7b-base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my runs/done", "done=my runs/begun"], r"several of the runs are called done\n.*try: 'done-2=my runs/begun'"),
        (["my runs/done", "tiny"], r"tiny is no run, and a model is served alone.*\n.*try: qdist serve tiny"),
    ],
)
def test_names_given_twice_and_models_beside_runs_are_refused(words: list[str], message: str, here: Path) -> None:
    with pytest.raises(SpecError, match=message):
        targets_to_serve(words)
