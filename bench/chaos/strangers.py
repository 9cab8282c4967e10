"""A small world of files as users, hubs, other programs and killed runs leave them; and who reads each of them."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec

from bench.chaos.mutations import Form
from qdist.core.evaluation.course import Outcome
from qdist.core.spec.run_spec import nest, parse_assignment, resolve
from qdist.core.telemetry.events import Event, encode
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.heartbeat import encode as encode_pulse
from qdist.host import templates
from qdist.host.data.records import (
    check_source,
    read_conversations,
    read_prompts,
    read_records,
    source_digest,
    source_notes,
)
from qdist.host.machine import probe
from qdist.host.run import calibration
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import launcher_is_gone, state_of
from qdist.host.sources import cache
from qdist.host.sources.model_folder import INDEX, fingerprint, gptq_of, safetensors_of
from qdist.host.sources.models import known_shape, read_json
from qdist.host.sources.targets import ADAPTER, check_target, step_note


class Reader(NamedTuple):
    """A file of the world, and what reads it."""

    name: str
    file: str
    form: Form
    read: Callable[[Path], object]
    """Takes the world's folder."""
    weight: float = 1.0
    """How often it is chosen; slow ones less."""


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_RECORDS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}], "id": 1},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}], "system": "be brief"},
    {"instruction": "say", "input": "it", "output": "it", "history": [["a", "b"]]},
    {"prompt": "hello", "completion": "there"},
    {"text": "hello there"},
)


def make_world(world: Path) -> Path:
    """Write all of it; takes some seconds, for a tiny model is packed and given an adapter."""
    world.mkdir(parents=True)
    with _cache(world):
        _write_data(world)
        _write_models(world)
        _write_run(world)
        _write_cache(world)
    return world


def _write_data(world: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    lines = "".join(json.dumps(record) + "\n" for record in _RECORDS)
    pairs = [{"prompt": f"hello {number}", "completion": "there"} for number in range(20)]
    (world / "data.jsonl").write_text(lines)
    (world / "data.json").write_text(json.dumps(pairs, indent=1))
    (world / "data.csv").write_text("prompt,completion\n" + '"hello, you",there\nagain,"a ""quote"""\n' * 5)
    (world / "data.tsv").write_text("prompt\tcompletion\nhello\tthere\n")
    (world / "data.txt").write_text("hello\nthere\n")
    columns = pyarrow.Table.from_pylist(pairs)
    parquet.write_table(columns, world / "data.parquet")
    for name, open_ in (("data.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with open_(world / name, columns.schema) as sink:
            sink.write_table(columns)
    (world / "saved").mkdir()
    (world / "saved" / "data-00000-of-00001.arrow").write_bytes((world / "stream.arrow").read_bytes())
    (world / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    asked = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]}
    (world / "prompts.jsonl").write_text('{"prompt": "hello"}\n' + json.dumps(asked) + "\n")
    (world / "recipe.toml").write_text('model = "llama-7b"\ndata = "data.jsonl"\nsteps = 5\n[lora]\nr = 8\n')
    (world / "settings").write_text("lora.r=8\nlora.targets=q_proj,v_proj\nmax_memory=24GiB\nsteps=5\nepochs=null")


def _write_models(world: Path) -> None:
    import gguf
    import torch

    from qdist.core.model.gptq import Gptq, Shape
    from qdist.runtime.exports.gguf.file import write_gguf
    from tests.runtime.gptq_files import padded, save_gptq
    from tests.runtime.tiny import save_model

    model = save_model(world / "model")
    names = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": _CHATML}))
    (model / "chat_template.jinja").write_text(_CHATML)
    save_gptq(world / "gptq", Gptq(shape=Shape(4, 32)), tokenizer=padded())
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as handle:
        tensors = dict.fromkeys(handle.keys(), "model.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": tensors}))
    writer = gguf.GGUFWriter(world / "model.gguf", "llama")
    for key, value in (("block_count", 2), ("context_length", 128), ("embedding_length", 64), ("head_count", 4)):
        getattr(writer, f"add_{key}")(value)
    writer.add_feed_forward_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(320)
    writer.add_token_list(["a", "b", "c"])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, torch.zeros(320, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del write_gguf


def _write_run(world: Path) -> None:
    from qdist.runtime.train.measure import HeldMemory, Peak
    from qdist.runtime.train.result import write_result
    from tests.runtime.tiny import adapted_run, real_job

    data = world / "data.json"
    job = real_job(world / "model", data, world / "run", seed=0)
    run, _ = adapted_run(job)
    run.events.mkdir(exist_ok=True)
    run.pulses.mkdir(exist_ok=True)
    run.logs.mkdir(exist_ok=True)
    told = [Event(kind="load", seconds=1.0, time=1.0), Event(kind="start", total_steps=4, time=2.0)]
    told += [Event(kind="step", step=step, total_steps=4, loss=2.0, learning_rate=1e-3, gradient_norm=1.0, tokens=99,
                   seconds=0.5, memory_bytes=10**9, time=2.0 + step) for step in range(1, 5)]  # fmt: skip
    told += [Event(kind="eval", step=4, held_out_loss=2.0, time=7.0), Event(kind="end", step=4, time=8.0)]
    run.event_file(0).write_bytes(b"".join(map(encode, told)))
    beat = Heartbeat(rank=0, pid=os.getpid(), host="here", time=2e9, phase="training", moved=2e9, step=1)
    run.pulse_file(0).write_bytes(encode_pulse(beat))
    run.log_file(0).write_text("hello\n")
    write_result(
        run, job.plan, Outcome(4, ((0, 3.0), (4, 2.0))),
        answers=[{"question": "q", "before": "b", "after": "a", "expected": "e"}],
        peaks=[[Peak(1, 2)]], held=[HeldMemory(1, 2, 3, 4)],
    )  # fmt: skip
    broken = world / "broken"
    import shutil

    shutil.copytree(run.path, broken)
    (broken / "result.json").unlink()
    ended = {"state": "failed", "message": "it is over", "try_": "again", "time": 9.0}
    (broken / "ended.json").write_text(json.dumps(ended))
    (broken / ".lock").write_text(json.dumps({"pid": 1, "host": "here", "began": "1"}))
    (broken / "command.txt").write_text("qdist launch\n")


def _write_cache(world: Path) -> None:
    from qdist.core.machine.calibration import CalibrationSample
    from qdist.core.machine.cluster import Rates
    from qdist.runtime.data import tokenized
    from tests.runtime.tiny import samples_of

    lesson = CalibrationSample(
        card="NVIDIA H200", gpus=1, world_size=1, placement="replicate", gpus_per_group=1, zero_stage=0,
        model="llama-7b", bits=4, seq_len=512, micro_batch=1, checkpointed_layers=0, predicted_bytes=10**10,
        measured_bytes=10**10, predicted_context_bytes=10**9, measured_context_bytes=10**9, predicted_tokens_s=1e4,
        measured_tokens_s=1e4, rates="table", version="",
    )  # fmt: skip
    calibration.append(lesson)
    probe.keep_rates(["NVIDIA H200"], "1", probe.tabled_rates(["NVIDIA H200"]) or _no_rates(Rates))
    plan = RunDir(world / "run").plan()
    from qdist.core.planning.plan import Prepared

    for other in (world / "cache").glob("prepared/*"):  # the launch's own
        other.unlink()
    cache.remember(_spec(world), Prepared(source=plan.source, data=plan.data, notes=("one",)))
    tokenized.save(samples_of([8, 9]), world / "tokens.safetensors", key="key")
    packed = Path(plan.source.packed)
    packed.rename(world / "packed")
    packed.symlink_to(world / "packed")
    for record in sorted((world / "cache" / "prepared").glob("*.json")):  # what is stored under two names
        record.replace(world / "prepared.json")
        record.symlink_to(world / "prepared.json")
    (measured,) = (world / "cache" / "rates").glob("*.json")
    measured.rename(world / "rates.json")
    measured.symlink_to(world / "rates.json")


def _no_rates(kind: Any) -> Any:
    raise AssertionError(f"the table has no {kind} of an H200")


def _spec(world: Path) -> Any:
    return resolve({"model": str(world / "model"), "data": str(world / "data.json"), "steps": 4})


@contextlib.contextmanager
def _cache(world: Path) -> Iterator[None]:
    before = os.environ.get("QDIST_CACHE")
    os.environ["QDIST_CACHE"] = str(world / "cache")
    try:
        yield
    finally:
        os.environ.pop("QDIST_CACHE")
        if before is not None:
            os.environ["QDIST_CACHE"] = before


def _all_of(path: Path) -> None:
    """As `launch` and `prepare` do: looked at, summed, read."""
    check_source(str(path))
    source_digest(str(path))
    source_notes(str(path))
    for _ in read_conversations(str(path)):
        pass


def _data(name: str) -> Callable[[Path], object]:
    return lambda world: _all_of(world / name)


def _set(world: Path) -> None:
    text = (world / "settings").read_bytes().decode(errors="replace")  # other bytes the command line refuses
    resolve(nest(dict(map(parse_assignment, text.split("\n")))))


def _recipe(world: Path) -> None:
    resolve(templates.read_recipe(str(world / "recipe.toml")))


def _command(*words: str) -> Callable[[Path], object]:
    """The command line itself; `@` in a word stands for the world."""

    def read(world: Path) -> None:
        from qdist.cli.main import main

        with _cache(world):
            main([word.replace("@", str(world)) for word in words], standalone_mode=False)

    return read


def _shape(world: Path) -> None:
    check_target(str(world / "model"))
    known_shape(str(world / "model"))


def _opened(world: Path) -> None:
    from qdist.runtime.quantize.source import blueprint, tensors_of

    folder = world / "model"
    shape = blueprint(folder)
    tensors = tensors_of(folder, shape)
    for name in shape.shapes:
        tensors.read(name)
    fingerprint(folder)


def _gptq(world: Path) -> None:
    from qdist.runtime.quantize.gptq import check
    from qdist.runtime.quantize.source import blueprint

    folder = world / "gptq"
    spec = resolve({"model": str(folder), "method": "gptq-lora", "data": "demo", "steps": 1})
    gptq = gptq_of(spec, read_json(folder / "config.json"), folder)
    fingerprint(folder)
    safetensors_of(folder)
    if gptq:
        check.checked(folder, blueprint(folder), gptq)


def _tokenizer(world: Path) -> None:
    from qdist.core.errors import DataError
    from qdist.runtime.data.chat_template import require_template
    from qdist.runtime.data.encode import Encoder
    from qdist.runtime.data.wording import encode_prompt
    from qdist.runtime.infer.prompts import speech_of

    speech = speech_of(str(world / "model"))
    require_template(speech.tokenizer)
    encoder = Encoder(speech.tokenizer)
    for found in read_conversations(str(world / "data.jsonl")):
        if not isinstance(found, DataError):
            encoder.encode(found)
            encode_prompt(found, speech.tokenizer, speech.wording)


def _template(world: Path) -> None:
    from qdist.core.data.conversation import Conversation, Turn
    from qdist.runtime.data.chat_template import prompt_text, render

    tokenizer = _plain_tokenizer(world)
    tokenizer.chat_template = (world / "model" / "chat_template.jinja").read_text(errors="replace")
    turns = (Turn("user", "hello", False), Turn("assistant", "there", True))
    render(Conversation(turns=turns, where="here"), tokenizer)
    prompt_text(Conversation(turns=turns[:1], where="here"), tokenizer)


_KEPT: dict[Path, Any] = {}


def _plain_tokenizer(world: Path) -> Any:
    from qdist.runtime.data.tokenizer import open_tokenizer

    if world not in _KEPT:
        _KEPT[world] = open_tokenizer(world / "gptq", "none")
    return _KEPT[world]


def _run(name: str, *others: Callable[[Path], object]) -> Callable[[Path], object]:
    """What is asked of a run without torch."""
    commands = [
        _command("runs", f"@/{name}"), _command("runs", f"@/{name}", "--json"),
        _command("monitor", "--once", f"@/{name}"),
        _command("monitor", "--json", f"@/{name}"), _command("metrics", f"@/{name}"),
        _command("monitor", "--once", "--rank", "0", f"@/{name}"),
        _command("report", f"@/{name}", "--out", "@/report.html"),
        _command("launch", "--resume", "--run", f"@/{name}", "--dry-run"),
    ]  # fmt: skip

    def read(world: Path) -> None:
        for one in (*commands, *others):
            with contextlib.suppress(SystemExit):
                one(world)
        run = RunDir(world / name)
        state_of(run)
        launcher_is_gone(run)
        step_note(run)

    return read


def _ending(world: Path) -> None:
    from qdist.cli.watch import ending

    run = RunDir(world / "run")
    ending(run, run.plan())
    calibration.learn(run)


def _events(world: Path) -> None:
    Follower(world / "run").new_events()


def _checkpoint(world: Path) -> None:
    from qdist.runtime.train.checkpoint import Progress, load, note
    from qdist.runtime.train.result import choose_step

    run = RunDir(world / "run")
    choose_step(run, "last")
    load(run.checkpoint(4))
    note(run, Progress(step=4, samples=16, held_out=((4, 1.0),)), keep=1)


def _adapter(world: Path) -> None:
    from qdist.runtime.exports.update import Adapters
    from qdist.runtime.infer.load import load

    with _cache(world):
        run = RunDir(world / "run")
        step_note(run)
        adapters = Adapters([run])
        _ = adapters.pool, adapters.stamp
        for path in adapters.paths:
            adapters.of(path)
        load(run.path)


def _packed(world: Path) -> None:
    from qdist.runtime.formats.packed_folder import read_manifest, tensor_files

    read_manifest(world / "packed")
    tensor_files(world / "packed")
    fingerprint(world / "packed")


def _model(world: Path) -> None:
    from qdist.runtime.infer.load import load
    from qdist.runtime.tasks import quiet

    quiet()  # as every command that loads a model is
    with _cache(world):
        load(world / "model")


def _gguf(world: Path) -> None:
    check_target(str(world / "model.gguf"))
    known_shape(str(world / "model.gguf"))


def _remembered(world: Path) -> None:
    with _cache(world):
        cache.remembered(_spec(world), world / "model")


def _lessons(world: Path) -> None:
    with _cache(world):
        calibration.read()
        probe.measured_rates(["NVIDIA H200"], "1")


def _tokens(world: Path) -> None:
    from qdist.runtime.data import tokenized

    tokenized.load(world / "tokens.safetensors", key="key")


def _saved(world: Path) -> None:
    for _ in read_records(str(world / "saved")):
        pass


def _generation(world: Path) -> None:
    from qdist.runtime.exports.model_files import generation_settings

    plan = RunDir(world / "run").plan()
    model = SimpleNamespace(generation_config=SimpleNamespace(to_diff_dict=dict))
    generation_settings(model, msgspec.structs.replace(plan.source, path=str(world / "model")))


READERS: tuple[Reader, ...] = (
    Reader("--set", "settings", "inline", _set, 15),
    Reader("recipe", "recipe.toml", "text", _recipe, 15),
    *(Reader(f"data {name.partition('.')[2]}", name, form, _data(name), 12) for name, form in (
        ("data.jsonl", "jsonl"), ("data.json", "json"), ("data.csv", "text"), ("data.tsv", "text"),
        ("data.parquet", "binary"), ("data.arrow", "binary"), ("stream.arrow", "binary"),
    )),
    Reader("saved data set", "saved/state.json", "json", _saved, 12),
    Reader("prompts jsonl", "prompts.jsonl", "jsonl", lambda world: read_prompts(world / "prompts.jsonl"), 12),
    Reader("prompts txt", "data.txt", "text", lambda world: read_prompts(world / "data.txt"), 8),
    Reader("plan --model", "model/config.json", "json", _command("plan", "--model=@/model", "--set=seq_len=64"), 2),
    Reader("config.json", "model/config.json", "json", _opened, 1),
    Reader("config of gptq", "gptq/config.json", "json", _gptq, 0.5),
    Reader("quantize_config", "gptq/quantize_config.json", "json", _gptq, 0.5),
    Reader("tensors of gptq", "gptq/model.safetensors", "safetensors", _gptq, 0.5),
    Reader("gguf", "model.gguf", "binary", _gguf, 15),
    Reader("index", f"model/{INDEX}", "json", _opened, 1),
    Reader("weights", "model/model.safetensors", "safetensors", _opened, 1),
    Reader("tokenizer.json", "model/tokenizer.json", "json", _tokenizer, 0.7),
    Reader("tokenizer_config", "model/tokenizer_config.json", "json", _tokenizer, 0.7),
    Reader("template", "model/chat_template.jinja", "inline", _template, 5),
    Reader("generation_config", "model/generation_config.json", "json", _generation, 6),
    Reader("load generation_config", "model/generation_config.json", "json", _model, 0.3),
    Reader("load config", "model/config.json", "json", _model, 0.3),
    Reader("load weights", "model/model.safetensors", "safetensors", _model, 0.3),
    Reader("adapter", f"run/adapter/{ADAPTER}", "safetensors", _adapter, 0.5),
    Reader("adapter_config", "run/adapter/adapter_config.json", "json", _adapter, 0.5),
    Reader("tokenizer of adapter", "run/adapter/tokenizer_config.json", "json", _adapter, 0.2),
    Reader("qdist.json", "packed/qdist.json", "json", _packed, 10),
    Reader("packed config", "packed/config.json", "json", _adapter, 0.2),
    Reader("packed index", f"packed/{INDEX}", "json", _adapter, 0.2),
    Reader("packed weights", "packed/model-00001-of-00003.safetensors", "safetensors", _adapter, 0.3),
    Reader("checkpoint state", "run/checkpoints/step_000004/state.json", "json", _checkpoint, 4),
    Reader("checkpoint adapter", "run/checkpoints/step_000004/adapter.safetensors", "safetensors", _checkpoint, 3),
    Reader("checkpoint optimizer", "run/checkpoints/step_000004/optimizer.safetensors", "safetensors", _checkpoint, 3),
    Reader("DONE", "run/checkpoints/step_000004/DONE", "text", _checkpoint, 0.5),
    Reader("plan.json", "run/plan.json", "json", _run("run"), 0.5),
    Reader("plan.json unfinished", "broken/plan.json", "json", _run("broken"), 0.5),
    Reader("result.json", "run/result.json", "json", _run("run", _ending), 0.5),
    Reader("ended.json", "broken/ended.json", "json", _run("broken"), 0.5),
    Reader("machine.json", "broken/machine.json", "json", _run("broken"), 0.3),
    Reader("versions.json", "broken/versions.json", "json", _run("broken"), 0.3),
    Reader("lock", "broken/.lock", "json", _run("broken"), 0.3),
    Reader("commands", "broken/command.txt", "text", _run("broken"), 0.3),
    Reader("log", "broken/logs/rank000.log", "text", _run("broken"), 0.3),
    Reader("events", "run/events/rank000.jsonl", "jsonl", _run("run", _events), 0.5),
    Reader("events unfinished", "broken/events/rank000.jsonl", "jsonl", _run("broken"), 0.5),
    Reader("pulse", "broken/pulse/rank000.json", "json", _run("broken"), 0.5),
    Reader("prepared", "prepared.json", "json", _remembered, 4),
    Reader("lessons", "cache/lessons.jsonl", "jsonl", _lessons, 10),
    Reader("rates", "rates.json", "json", _lessons, 8),
    Reader("tokens", "tokens.safetensors", "safetensors", _tokens, 6),
)  # fmt: skip
