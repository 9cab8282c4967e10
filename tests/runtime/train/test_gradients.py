"""Does a run end, and say where, if a tensor that it trains gets no gradient?"""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from qdist.core.errors import JobError
from qdist.core.model.shapes import Experts, LayerRun, Linear
from qdist.core.telemetry.events import Event
from qdist.runtime.engine.torch import Comm
from qdist.runtime.placements.registry import placement_of
from qdist.runtime.train import loop
from qdist.runtime.train.gradients import GradientWatch, _largest, section_of
from qdist.runtime.train.loop import Trainer
from tests.runtime.tiny import dummy_job, save_config, trainable, written

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = (f"{Q_PROJ}.lora_{side}.default.weight" for side in "AB")
FINE = "finite and not zero in all 28 trained tensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("model"))


class Run:
    """One rank in this process."""

    def __init__(self, folder: Path, path: Path, **settings: Any) -> None:
        usual: dict[str, Any] = {"gpus": 1, "steps": 3, "train__save_steps": 3, "train__held_out": 0}
        job = dummy_job(folder, path, **(usual | settings))
        self.plan, self.run = job.plan, written(job)
        self.start()

    def start(self) -> None:
        """As the launcher starts a rank, or starts it again."""
        self.model, self.adapter, self.samples = trainable(self.plan)
        self.events: list[Event] = []

    def parameter(self, name: str) -> Any:
        return self.adapter.named()[name]

    def trainer(self) -> Trainer:
        place, forward = placement_of(self.plan, 0, (CPU,)), self.adapter
        engine = place.build(None, self.adapter, self).engine  # type: ignore[arg-type]
        return Trainer(
            self.plan, self.run, engine, self.samples, Comm(CPU), place, evaluate=self.evaluate,
            checksum=tuple, verify=str, report=self.events.append, stopping=bool,
            gradients=GradientWatch(forward.named(), self.plan.facts, compute_dtype=self.plan.compute_dtype),
        )  # fmt: skip

    def evaluate(self, *_: Any) -> tuple[float, int]:
        return 1.0, 1

    def score(self, *_: Any) -> list[Any]:
        return []

    def train(self) -> list[str]:
        """Train; what was said of the gradients."""
        self.trainer().train()
        return [f"step {event.step}: {event.note}" for event in self.events if event.kind == "gradients"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch": 1},
        {"lora__dropout": 0.3},
        {"optim__warmup_steps": 2, "optim__lr": 1e-6, "optim__schedule": "cosine"},
        {"train__checkpointing": False, "bits": 16},
    ],
    ids=["plain", "accumulated", "with dropout", "warm-up", "16 bits"],
)
def test_a_sound_run_says_after_two_steps_that_all_tensors_have_gradients(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = Run(folder, tmp_path / "run", **settings)
    assert run.train() == [f"step 2: {FINE}"]
    assert not any(parameter._backward_hooks for parameter in run.adapter.parameters())


def test_a_detached_adapter_ends_the_run_before_anything_is_saved(folder: Path, tmp_path: Path) -> None:
    run = Run(folder, tmp_path / "run", train__save_steps=2)
    layer = run.model.get_submodule(Q_PROJ)
    layer.forward = layer.base_layer.forward
    with pytest.raises(
        JobError, match="2 of 28 trained tensors have had no gradient in the first two updates"
    ) as found:
        run.train()
    assert f"{A}, {B}" in found.value.message
    assert run.run.checkpoint_steps() == []
    assert [event.step for event in run.events if event.kind == "step"] == [1, 2]


def test_a_gradient_of_zeros_ends_the_run(folder: Path, tmp_path: Path) -> None:
    run = Run(folder, tmp_path / "run")
    run.parameter(B).register_hook(torch.zeros_like)
    with pytest.raises(JobError, match="2 of 28 trained tensors have had a gradient of nothing but zeros") as found:
        run.train()
    assert A in found.value.message  # as B never moves


def test_the_tensor_with_a_nan_gradient_is_named(folder: Path, tmp_path: Path) -> None:
    run = Run(folder, tmp_path / "run")
    run.parameter(B).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(JobError) as found:
        run.train()
    assert found.value.message == (
        f"gradients are NaN or infinite at step 1, in 1 of 28 trained tensors: {B}; there is no checkpoint yet"
    )


def test_a_step_without_a_learning_rate_does_not_count(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves B in it, so A has no gradient in the second."""
    rates = [0.0, 0.0, 1e-3, 1e-3]
    monkeypatch.setattr(loop, "learning_rate", lambda optim, *, step, steps: rates[step])
    assert Run(folder, tmp_path / "run", steps=4).train() == [f"step 4: {FINE}"]


def test_a_skipped_step_does_not_count(folder: Path, tmp_path: Path) -> None:
    """As in fp16, where the scale is found by overflowing."""
    run, passes = Run(folder, tmp_path / "run", steps=4), iter([math.inf, 1.0, 1.0, 1.0])
    run.parameter(B).register_hook(lambda gradient: gradient * next(passes))
    trainer = run.trainer()
    trainer.scale.dynamic = True
    trainer.train()
    assert [event.skipped for event in run.events if event.kind == "step"] == [True, False, False, False]
    assert [event.step for event in run.events if event.kind == "gradients"] == [3]


@pytest.mark.parametrize(("saved_at", "expected"), [(1, ["step 3: " + FINE]), (2, [])])
def test_a_resumed_run_checks_gradients_unless_it_has_done_so(
    folder: Path, tmp_path: Path, saved_at: int, expected: list[str]
) -> None:
    run = Run(folder, tmp_path / "run", steps=4, train__save_steps=9)
    trainer = run.trainer()
    trainer._stopping = lambda: len([event for event in run.events if event.kind == "step"]) >= saved_at - 1
    assert not trainer.train()
    assert run.run.checkpoint_steps() == [saved_at]
    run.start()
    assert run.train() == expected


def test_rows_of_new_tokens_that_no_sample_has_are_excepted(folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 64))
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    watch = GradientWatch({name: parameter}, _facts(folder), compute_dtype="float32")
    for _ in range(2):
        (parameter * torch.tensor([[1.0], [0.0]])).sum().backward()
        done = watch.end_step(skipped=False, learning_rate=1e-3)
    assert done
    assert watch.found(Comm(CPU)).words == (
        f"finite and not zero in the trained tensor; 1 of 2 rows of new tokens saw no token ({name})"
    )


def _facts(folder: Path) -> Any:
    """Two layers with four experts each."""
    facts = dummy_job(folder, folder / "never", gpus=1).plan.facts
    matrices = (Linear("up", 64, 32, False, "mlp_in"), Linear("down", 32, 64, False, "mlp_out"))
    experts = Experts(path="mlp.experts", count=4, active=2, matrices=matrices)
    shape = msgspec.structs.replace(facts.shapes[0], experts=experts)
    return msgspec.structs.replace(facts, layers=(LayerRun(shape, 2),))


def test_experts_are_looked_at_one_by_one_in_pefts_layout(folder: Path) -> None:
    """PEFT 0.21: A is [experts x r, in], B is [out, r x experts], with experts varying fastest."""
    facts, r = _facts(folder), 3
    for path in ("mlp.experts", "mlp.experts.base_layer"):
        down, up = torch.zeros(4 * r, 64), torch.zeros(32, r, 4)
        down.view(4, r, 64)[2, 1, 5], up[7, 2, 1] = -5.0, 6.0
        name = f"base_model.model.model.layers.1.{path}.lora_%s.default.weight"
        for side, tensor, largest in (("A", down, [0, 0, 5, 0]), ("B", up.reshape(32, 12), [0, 6, 0, 0])):
            section = section_of(name % side, torch.nn.Parameter(tensor), facts)
            assert (section.owner, section.side, section.parts) == ("model.layers.1.mlp.experts", side, 4)
            assert _largest(tensor, section).tolist() == largest
