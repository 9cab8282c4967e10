"""Is there a function for every request, and does a rank say what it wants to be started with?"""

from importlib import import_module
from typing import get_args, get_type_hints

import msgspec
import pytest

from qdist.core import requests
from qdist.core.errors import PlanError
from qdist.core.requests import Answer, Request
from qdist.core.spec.suggest import TooBigError
from qdist.runtime.tasks import JOBS, TARGETS
from qdist.runtime.train import worker

KINDS: tuple[type[Request], ...] = get_args(requests.Job)


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_has_a_function_that_takes_it(kind: type[Request]) -> None:
    for place in TARGETS.values() if kind is requests.Export else (JOBS[kind],):
        module, _, name = place.partition(":")
        taken = get_type_hints(getattr(import_module(module), name))["request"]
        assert issubclass(kind, taken)


def test_each_target_of_an_export_has_a_function() -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(requests.Export)}
    assert set(get_args(get_args(fields["to"])[0])) == set(TARGETS)


@pytest.mark.parametrize(
    "request_",
    [
        requests.Gather(run="r", out="o"),
        requests.Export(to="gptq", runs=("a", "b"), out="o", weights=(0.5, -1e-3), bits=3),
        requests.MakeGptq(model="m", out="o", settings=requests.GptqSettings(data="d", bits=(2, 4), max_error=0.1)),
        requests.Convert(source="s", out="o", origin="sparsebit"),
    ],
)
def test_a_request_arrives_as_it_was_made(request_: Request) -> None:
    assert msgspec.json.decode(msgspec.json.encode(request_), type=requests.Job) == request_


def test_an_error_arrives_as_the_nearest_class_that_all_know() -> None:
    sent = msgspec.json.encode(Answer.refusing(TooBigError("too big", try_="less")))
    error = msgspec.json.decode(sent, type=Answer).error
    assert (type(error), str(error)) == (PlanError, "too big\n  try: less")
    assert Answer().error is None


def test_a_rank_that_is_started_otherwise_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["worker", "run"])
    with pytest.raises(SystemExit, match="worker RUN --digest DIGEST"):
        worker.main()
