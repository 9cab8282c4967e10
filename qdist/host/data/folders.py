"""Which files of a folder to train on: chosen by split, by the state of a saved data set, or all of them."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from qdist.core.errors import DataError
from qdist.host.data.compressed import bare_name
from qdist.host.data.files import READ, SUFFIXES, form_of
from qdist.host.opening import read_value, readable

_TRAIN = frozenset(("train", "training", "trainset"))
_HELD_OUT = frozenset((
    "valid", "validation", "validate", "val", "valset", "eval", "evaluation", "dev", "devset", "test", "testing",
    "testset", "heldout", "holdout",
))  # fmt: skip
_NO_DATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
_MAYBE = frozenset(("", ".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".pkl", ".pickle", ".xlsx", ".feather", ".dat"))
"""Suffixes of files that are inspected, and reported if they hold no records."""
_PAPERS = frozenset(
    ("readme", "license", "licence", "notice", "copying", "makefile", "dockerfile", "citation", "_success")
)
_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")
_DEEPEST = 3
"""How many folder levels deep data files are searched for."""
_NAMED = 5


class Chosen(NamedTuple):
    """A folder's data files in reading order, and what else it contains."""

    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    def notes(self, folder: Path) -> tuple[str, ...]:
        """Notes on choices that may surprise the user; empty if the folder holds a single data file."""
        if len(self.files) == 1 and not self.left_out:
            return ()
        count = f"{len(self.files)} files: " if len(self.files) > 1 else ""
        left = f"; left out: {_listed(self.left_out, folder)} (not trained on)" if self.left_out else ""
        return (f"read {count}{_listed(self.files, folder)}{left}",)


def choose_files(folder: Path) -> Chosen:
    """The files of a folder that are trained on.

    Where names say so, those of the training split; where not, all of them; else those of the only folder in it.
    Raises DataError if there is no data file, where several sets lie side by side, and for a folder without access.
    """
    with readable(folder, DataError):
        return _saved(folder) or _chosen(folder)


def _chosen(folder: Path) -> Chosen:
    files, folders, unread = _entries(folder)
    train = _training([*files, *folders])
    held_out = [path for path in (*files, *folders) if _split(path) not in (None, "train")]
    if not train:
        _refuse_first([path for path in unread if _split(path) == "train"])
    rest = [path for path in files if _split(path) is None]
    used = train or rest or _only(folder, [path for path in folders if _split(path) is None])
    used = used or _only_split(folder, held_out)
    if not used:
        _refuse_first(unread)
        raise DataError(f"{folder} holds no data file", try_=f"a folder with {READ}")
    inner = [choose_files(path) if path.is_dir() else Chosen((path,)) for path in used]
    others = [path for path in (*files, *folders, *unread) if path not in used]
    return Chosen(
        tuple(path for chosen in inner for path in chosen.files),
        (*others, *(path for chosen in inner for path in chosen.left_out)),
    )


def _refuse_first(unread: Sequence[Path]) -> None:
    if unread:
        form_of(unread[0])  # raises what it is


def _entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """A folder's data files, its subfolders that have some, and unread candidates; each sorted.

    Plain text is data where there is nothing else: beside records it is about them.
    """
    files, folders, unread = list[Path](), list[Path](), list[Path]()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _NO_DATA or path.stem.lower() in _PAPERS:
            continue
        if path.is_dir():
            folders += [path] if _may_hold_data(path) else []
        elif path.suffix.lower() in SUFFIXES:
            files.append(path)
        elif path.suffix.lower() in _MAYBE:
            (files if _kind_of(path) not in (None, "text") else unread).append(path)
    if not files and not folders:
        files = [path for path in unread if _kind_of(path) == "text"]
    return files, folders, [path for path in unread if path not in files]


def _may_hold_data(folder: Path, depth: int = 1) -> bool:
    """Whether a folder holds files with a data suffix; True for a folder that may not be listed."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        if any(entry.is_file() and bare_name(Path(entry.name)).suffix.lower() in SUFFIXES for entry in entries):
            return True
        return depth < _DEEPEST and any(entry.is_dir() and _may_hold_data(Path(entry), depth + 1) for entry in entries)
    except OSError:
        return True


def _kind_of(path: Path) -> str | None:
    """The kind of a file's form; None if it has none."""
    with suppress(DataError):
        return form_of(path).kind
    return None


def _split(path: Path) -> str | None:
    """The split that a file or folder name denotes: 'train' or another; None if it denotes none, or both."""
    words = re.split(r"[-_.\d\s]+", path.name.lower())
    train, held_out = (next((word for word in words if word in split), None) for split in (_TRAIN, _HELD_OUT))
    return None if train and held_out else ("train" if train else held_out)


def _training(paths: Sequence[Path]) -> list[Path]:
    """Those named exactly train, else those with it in their name: 'train_small.jsonl' is part of 'train.jsonl'."""
    named = [path for path in paths if _split(path) == "train"]
    return [path for path in named if _SHARD.sub("", path.name.lower().partition(".")[0]) in _TRAIN] or named


def _only(folder: Path, folders: Sequence[Path]) -> list[Path]:
    """The one folder that holds the data; `data` and `default` come before others, as on the hub."""
    usual = [path for path in folders if path.name in ("data", "default")]
    if len(folders) > 1 and len(usual) != 1:
        names = ", ".join(path.name for path in folders)
        raise DataError(f"{folder} holds {len(folders)} data sets: {names}", try_=str(folders[0]))
    return usual or list(folders)


def _only_split(folder: Path, held_out: Sequence[Path]) -> list[Path]:
    """Files of test splits and the like, used for training only if there is nothing else and no choice."""
    if len({_split(path) for path in held_out}) > 1:
        names = ", ".join(path.name for path in held_out)
        raise DataError(f"{folder} holds no training data by its names: {names}", try_=str(held_out[0]))
    return list(held_out)


def _saved(folder: Path) -> Chosen | None:
    """The files of a folder written by datasets' `save_to_disk`, in the order of its state."""
    path = folder / "state.json"
    state = _object_in(path) if path.is_file() else {}
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        return None
    if state.get("_indices_data_files"):
        again = "datasets.load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER)"
        raise DataError(f"{path} picks rows by their numbers, which is not read", try_=again)
    names = [item.get("filename") if isinstance(item, dict) else None for item in listed]
    files = tuple(folder / name for name in names if isinstance(name, str))
    missing = [file.name for file in files if not file.exists()]
    if not files or len(files) < len(names) or missing:
        told = f"data files that are missing: {', '.join(missing)}" if missing else "no data files"
        raise DataError(f"{path} names {told}", try_="save or fetch the data set again")
    return Chosen(files)


def _object_in(path: Path) -> dict[str, object]:
    state = read_value(path, DataError, try_="save the data set again")
    return state if isinstance(state, dict) else {}


def _listed(paths: Sequence[Path], folder: Path) -> str:
    names = [f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in paths]
    if len(names) <= _NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: _NAMED - 1])} and {len(names) - _NAMED + 1} more"
