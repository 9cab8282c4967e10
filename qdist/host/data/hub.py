"""Records of data sets on the hub: by id, with a subset and a split, or by a known name."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from msgspec.structs import replace

from qdist.core.data.named import NAMED, NamedData
from qdist.core.errors import DataError, MachineError
from qdist.host.data.text import Located
from qdist.host.opening import reason_of, told

_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[^@/\s]+))?(@(?P<split>\S+))?")
"""'owner/name:subset@split'."""
_PATIENCE_S = 5.0
"""Seconds that an answer of the hub is waited for, to know whether it is there."""


class HubData(NamedTuple):
    """A data set on the hub, as asked for."""

    asked: str
    """As the user typed it."""
    known: NamedData
    told: str | None = None
    """What stands behind a colon where no split is given: a subset if the data set has one of that name, or a split."""


def may_be_hub_id(source: str) -> bool:
    """Whether a name has the form of a hub id, or is that of a known data set."""
    return _ID.fullmatch(source) is not None


def is_known(source: str) -> bool:
    """Whether the name is that of a known data set, with or without a split."""
    found = _ID.fullmatch(source)
    return found is not None and found["name"] in NAMED


def hub_data(source: str) -> HubData:
    """What a source on the hub means; nothing is asked of the hub.

    source: 'owner/name', 'owner/name:subset', 'owner/name@train[:1%]', 'owner/name:subset@split', 'owner/name:split';
    or a known name, with or without a split: 'alpaca', 'alpaca@train[:1%]'.
    """
    found = _ID.fullmatch(source)
    if found is None:
        raise DataError(f"{source} is neither a file nor a hub id", try_="owner/name, owner/name:subset@split")
    name, subset, split = found["name"], found["subset"], found["split"]
    known = NAMED.get(name, NamedData(hub=name))
    if split:
        return HubData(source, replace(known, split=split, subset=subset or known.subset))
    return HubData(source, known, subset)


def hub_records(data: HubData) -> Iterator[Located]:
    """The records of a data set. Raises DataError with the hub's reason, and for one without records."""
    with _hub(data) as datasets:
        loaded, number = _loaded(data, datasets), 0
        for number, row in enumerate(loaded, 1):
            yield f"{data.asked}, record {number}", dict(row)
        if not number:
            raise DataError(f"{data.asked} holds no record", try_="another split, as in owner/name@split")


def hub_identity(data: HubData) -> tuple[str | None, ...]:
    """Name, subset, split and commit on the hub, or in the hub's cache without network."""
    with _hub(data) as datasets:
        known = _settled(data, datasets)
        revision = datasets.load_dataset_builder(known.hub, **_options(known)).hash
    return (known.hub, known.subset, *known.files, known.split, str(revision))


def _loaded(data: HubData, datasets: Any) -> Any:
    known = _settled(data, datasets)
    return datasets.load_dataset(known.hub, split=known.split, **_options(known))


def _settled(data: HubData, datasets: Any) -> NamedData:
    """What `told` says, which the hub must be asked: a subset where there is one of that name, else a split."""
    if data.told is None:
        return data.known
    subset = data.told in datasets.get_dataset_config_names(data.known.hub)
    return replace(data.known, subset=data.told) if subset else replace(data.known, split=data.told)


def _options(known: NamedData) -> dict[str, Any]:
    options = {"name": known.subset, "data_files": list(known.files)}
    return {key: value for key, value in options.items() if value}


@contextmanager
def _hub(data: HubData) -> Iterator[Any]:
    """The datasets package, with its errors and its HTTP client's about a data set raised as DataError."""
    try:
        import datasets
    except ImportError as error:
        message = f"{data.asked} is no file here, and the hub needs the package datasets"
        raise MachineError(message, try_="pip install datasets") from error
    message = f"{data.asked} is no file here, and the hub did not give it"
    with told(message, DataError, try_="a file or folder, or owner/name:subset@split"):
        try:
            with _without_waiting(datasets):
                yield datasets
        except ConnectionError as error:
            raise DataError(
                f"{data.asked} is no file here, and the hub cannot be reached: {reason_of(error)}", try_=_how_to_reach()
            ) from error


@contextmanager
def _without_waiting(datasets: Any) -> Iterator[None]:
    """Have the packages look into their caches at once while the hub is out of reach.

    They try each request for half a minute otherwise, on every launch of a machine without network.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and is_out_of_reach(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def is_out_of_reach(address: str) -> bool:
    """Whether nothing can be connected to there, through proxies too; a slow answer is one."""
    import httpx
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=_PATIENCE_S)
    except httpx.ConnectError:
        return True
    except httpx.HTTPError:
        return False
    return False


def _how_to_reach() -> str:
    """What leads to the hub from a machine that does not reach it."""
    unset = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)]
    return (
        f"unset {unset[0]}"
        if unset
        else "a connection to huggingface.co, a mirror named by HF_ENDPOINT, or a file here"
    )
