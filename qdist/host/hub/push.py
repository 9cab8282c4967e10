"""Uploads an adapter or a merged model to a hub: what loading it takes, and nothing else of the folder."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qdist.core.errors import JobError, MachineError, ModelError, QdistError, RunError, SpecError
from qdist.core.telemetry.card import README
from qdist.core.text import command
from qdist.host.opening import read_object
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER, require_adapter

ADAPTER_CONFIG, CONFIG = "adapter_config.json", "config.json"
MERGED = "merged"
"""Where in a run a merged model is looked for."""
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_BESIDE = frozenset((
    README, ADAPTER_CONFIG, CONFIG, _INDEX, "generation_config.json", "checksums.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "quantize_config.json", "quantization_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE",
    "LICENSE.txt", "NOTICE", "USE_POLICY.md",
))  # fmt: skip
"""Files that go up with the weights, where they are there."""
_BASE = "base_model_name_or_path"
_PLACES = (_BASE, "_name_or_path", "name_or_path", "model_name_or_path")
"""Keys of configurations, at any depth, that may hold a place on this machine."""
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"


class Upload(NamedTuple):
    """What of a folder goes up."""

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    """Names of the other files and folders."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, not a whole model."""
        return ADAPTER_CONFIG in self.files


def check_name(repo: str) -> None:
    """Raise SpecError for what is not OWNER/NAME as the hub has them."""
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise SpecError(f"{repo!r} is not OWNER/NAME", try_="such as me/alpaca-qlora, of letters, digits, - _ and .")


def folder_of(target: str, what: str) -> Path:
    """The folder that is meant: of a run, its adapter or merged model; or a folder that holds one itself.

    Raises RunError if it is not there.
    """
    run, path = RunDir(target), Path(target).expanduser()
    if not run.exists():
        if (path / ADAPTER_CONFIG).is_file() or (path / CONFIG).is_file():
            return path
        run.plan()  # says what is there instead
    if what == "adapter":
        require_adapter(run)
        return run.adapter
    folder = run.path / MERGED
    if not (folder / CONFIG).is_file():
        merge = command("merge", run.path, "--out", folder)
        raise RunError(f"{run.path} has no merged model in {folder}", try_=f"{merge}, or the folder it was merged into")
    return folder


def files_to_push(folder: Path) -> Upload:
    """The weights of a folder and what goes with them. Raises RunError where they are not whole."""
    if (folder / ADAPTER_CONFIG).is_file():
        weights: set[str] = {ADAPTER}
    elif (folder / _INDEX).is_file():
        listed = read_object(folder / _INDEX, ModelError).get("weight_map")
        weights = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    else:
        weights = {_WHOLE}
    if missing := sorted(name for name in weights or {_WHOLE} if "/" in name or not (folder / name).is_file()):
        raise RunError(f"{folder} has no {missing[0]}", try_="a folder that qdist gather or qdist merge wrote")
    entries = sorted(path.name for path in folder.iterdir())
    files = tuple(name for name in entries if _goes_up(folder / name, weights))
    return Upload(folder, files, tuple(name for name in entries if name not in files))


def _goes_up(path: Path, weights: set[str]) -> bool:
    is_code = path.suffix == ".py" and (path.parent / CONFIG).is_file()
    return path.is_file() and (path.name in weights or path.name in _BESIDE or is_code)


def require_card(upload: Upload) -> None:
    """Raise RunError for a folder without a model card."""
    if README not in upload.files:
        raise RunError(f"{upload.folder} has no model card", try_=f"write {upload.folder / README}")


def require_login() -> None:
    """Raise MachineError where no token of a hub is known, or none may be asked."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise MachineError("HF_HUB_OFFLINE is set, and so no hub is reached", try_="unset HF_HUB_OFFLINE")
    if not get_token():
        raise MachineError("no token of the hub is known", try_="hf auth login, or HF_TOKEN in the environment")


def push(upload: Upload, repo: str, *, private: bool, revision: str, base: str) -> str:
    """Upload the files in one commit: all of them are there afterwards, or none. Returns the address.

    base: hub id of an adapter's base; empty if it has none.
    Raises SpecError, RunError, MachineError or JobError for what the hub answers.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    with _answered(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise RunError(f"{repo} is there already, and public", try_="another name, or without --private")
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        files = [CommitOperationAdd(name, _contents(upload.folder / name, base)) for name in upload.files]
        what = "Adapter" if upload.is_adapter else "Merged model"
        api.create_commit(repo, files, commit_message=f"{what}, by qdist", revision=revision)
    tree = "" if revision == "main" else f"/tree/{revision}"
    return f"{api.endpoint}/{repo}{tree}"


def _contents(path: Path, base: str) -> str | bytes:
    """A file's path, or its contents without places on this machine."""
    if not path.name.endswith(CONFIG):
        return str(path)
    found = read_object(path, RunError)
    public = _public(found, base)
    return str(path) if public == found else (json.dumps(public, indent=2) + "\n").encode()


def _public(found: Any, base: str, key: str = "") -> Any:
    """A part of a configuration, with names in the place of places."""
    if isinstance(found, dict):
        return {name: _public(value, base, name) for name, value in found.items()}
    if isinstance(found, list):
        return [_public(value, base) for value in found]
    if key in _PLACES and isinstance(found, str) and found.startswith(("/", "~", ".")):
        return base if base and key == _BASE else Path(found).name
    return found


@contextmanager
def _answered(repo: str) -> Iterator[None]:
    """Raise what a hub answers as errors of ours."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code, error.server_message or "") from error
    except (OfflineModeIsEnabled, LocalTokenNotFoundError) as error:
        raise MachineError(
            f"{repo} cannot be reached: {error}", try_="unset HF_HUB_OFFLINE, or hf auth login"
        ) from error
    except ValueError as error:  # of a card that the hub cannot read, or of an answer that is none
        raise RunError(
            f"the hub does not take the upload: {' '.join(str(error).split())}", try_=f"another {README}"
        ) from error
    except HTTPError as error:
        why = str(error) or type(error).__name__
        raise MachineError(
            f"the hub cannot be reached: {why}", try_="the same command again, with a connection"
        ) from error


def _refused(repo: str, status: int, message: str) -> QdistError:
    """The error for an HTTP status. message: the hub's own, if any."""
    said = f": {' '.join(message.split())}" if message else ""
    owner = repo.partition("/")[0]
    match status:
        case 401:
            return MachineError(
                f"the hub does not take this token{said}", try_="hf auth login, with a token that writes"
            )
        case 403:
            return RunError(f"this token may not write to {repo}{said}", try_=f"a token that may write for {owner}")
        case 404:
            return RunError(
                f"the hub has no {repo}, or no {owner}{said}", try_="OWNER/NAME, with an owner that is there"
            )
        case 409 | 412:
            return RunError(f"{repo} was changed meanwhile{said}", try_="the same command again")
        case 400 | 422:
            return RunError(f"the hub does not take the upload{said}", try_=f"another {README}, or what it asks for")
        case 429:
            return JobError(f"the hub takes no more requests for now{said}", try_="the same command in some minutes")
    return JobError(f"the hub answered with status {status}{said}", try_="the same command again")
