"""Do all nodes of a run find the same directory and settings?"""

from pathlib import Path

import pytest

from qdist.core.errors import SpecError
from qdist.host.nodes.asked import Asked, asked_of

GIVEN = {"model": "smollm2-135m", "load_format": "dummy"}


def test_a_run_without_a_name_is_called_the_same_on_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/smollm2-135m-qlora-dummy").mkdir(parents=True)  # the first node was faster
    found = asked_of(None, GIVEN, resume=False)
    assert found == Asked(tmp_path / "runs/smollm2-135m-qlora-dummy", GIVEN, False, None)


def test_a_recipe_is_part_of_the_settings_and_the_runs_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('model = "llama-7b"\n[lora]\nr = 8\n')
    given = {"run": str(tmp_path / "one"), "gpus": "2", "lora": {"alpha": 4}}
    found = asked_of(str(tmp_path / "mine.toml"), given, resume=False)
    assert (found.run, found.gpus) == (tmp_path / "one", 2)
    assert found.settings == {"model": "llama-7b", "lora": {"r": 8, "alpha": 4}, "gpus": "2"}


def test_the_rest_of_a_run_has_the_changes_alone(tmp_path: Path) -> None:
    found = asked_of(None, {"run": str(tmp_path), "gpus": "3"}, resume=True)
    assert found == Asked(tmp_path, {"gpus": "3"}, True, 3)


@pytest.mark.parametrize(
    ("recipe", "given", "resume", "wanted"),
    [
        (None, {}, False, "no model was named"),
        (None, {"model": "x", "data": {"path": "-"}}, False, "standard input .* is one node's"),
        (None, {}, True, "--resume goes with --run DIR alone"),
        ("a.toml", {"run": "runs/a"}, True, "--resume goes with --run DIR alone"),
        (None, {"model": "x", "bits": 5}, False, "bits"),
    ],
)
def test_what_cannot_be_is_refused_before_any_node_starts(
    recipe: str | None, given: dict[str, object], resume: bool, wanted: str
) -> None:
    with pytest.raises(SpecError, match=wanted):
        asked_of(recipe, given, resume=resume)
