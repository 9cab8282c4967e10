"""Does a wheel carry the recipes and policies, and does qdist find them there?"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {
    f"qdist/_data/{folder}/{path.name}": path
    for folder, kind in (("launch", "*.toml"), ("launch", "*.in"), ("ds_configs", "*.json"))
    for path in (ROOT / folder).glob(kind)
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel that the checkout builds."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling, which builds wheels, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_there_is_data_to_ship() -> None:
    assert len(DATA) >= 10


def test_a_wheel_holds_every_recipe_and_policy_to_the_byte(unpacked: Path) -> None:
    shipped = {str(path.relative_to(unpacked)) for path in (unpacked / "qdist/_data").rglob("*") if path.is_file()}
    assert {name for name in DATA if name not in shipped} == set()
    assert [name for name, path in DATA.items() if (unpacked / name).read_bytes() != path.read_bytes()] == []


def test_a_wheel_holds_what_a_report_is_made_of(unpacked: Path) -> None:
    assets = ROOT / "qdist/cli/assets"
    names = {path.name for path in assets.iterdir()}
    assert {"report.html", "uPlot.iife.min.js", "uPlot.LICENSE.txt"} <= names
    for name in names:
        assert (unpacked / "qdist/cli/assets" / name).read_bytes() == (assets / name).read_bytes(), name


def test_a_wheel_holds_the_page(unpacked: Path) -> None:
    page = ROOT / "qdist/runtime/serve/page"
    names = {path.name for path in page.iterdir()}
    assert {"index.html", "style.css", "app.js"} <= names
    assert {path.name for path in (unpacked / "qdist/runtime/serve/page").iterdir()} == names


def test_a_wheel_holds_every_module_and_no_test(unpacked: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qdist").rglob("*.py")}
    assert {str(path.relative_to(unpacked)) for path in unpacked.rglob("*.py")} == modules


def test_an_unpacked_wheel_finds_its_own_data(unpacked: Path) -> None:
    code = (
        "from qdist.host import templates\n"
        "print(templates.folder('launch'), templates.folder('ds_configs'), templates.read_recipe('demo')['model'],"
        " templates.policy('zero2.json')['zero_optimization']['stage'], sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, env=environment, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    data = unpacked / "qdist/_data"
    assert done.stdout.splitlines() == [str(data / "launch"), str(data / "ds_configs"), "smollm2-135m", "2"]
