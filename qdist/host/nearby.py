"""What was meant by a name that is nothing here? Models and runs at the nearest path, in `runs/`, among the aliases."""

from collections.abc import Iterator
from pathlib import Path

from qdist.core.errors import nearest
from qdist.core.models import ALIASES
from qdist.host.rundir import PLAN

_MOST = 5


def nearest_model(name: str) -> str:
    """A path or an alias that opens, nearest to `name`; empty where nothing is near."""
    path = Path(name).expanduser()
    if path.parent != Path() or name.startswith("."):
        return nearest_path(path)
    found = {alias: alias for alias in ALIASES}
    found |= {entry.name: str(entry) for folder in (Path("runs"), Path()) for entry in opening(folder)}
    close = nearest(name, found)
    return found[close] if close else ""


def nearest_path(path: Path) -> str:
    """Each folder on the way that is not there is taken for the nearest that is; empty where that leads nowhere."""
    folder = _existing(path.parent)
    if folder is None:
        return ""
    there = {entry.name: entry for entry in opening(folder)}
    if close := nearest(path.name, there):
        return str(there[close])
    return ", ".join(sorted(map(str, there.values()))) if len(there) <= _MOST else ""


def _existing(folder: Path) -> Path | None:
    """A folder, or the one most like it where it is not there."""
    if folder.is_dir():
        return folder
    above = _existing(folder.parent) if folder != folder.parent else None
    if above is None:
        return None
    close = nearest(folder.name, (entry.name for entry in _entries(above) if entry.is_dir()))
    return above / close if close else None


def opening(folder: Path) -> Iterator[Path]:
    """What lies in a folder and can be opened by its name: models and runs."""
    for entry in _entries(folder):
        if entry.suffix.lower() == ".gguf" or any((entry / file).is_file() for file in ("config.json", PLAN)):
            yield entry


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:  # not there, or not for us to read: nothing in it can be meant
        return []
